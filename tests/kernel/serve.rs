//! `Queue::serve` on a real kernel, and the programs of the design as they read there.

use std::{
    net::{Ipv4Addr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_nfqueue::{Divert, Error, Packet, Protocol, Queue, Rule, Verdict};

use crate::{
    common::{self, Hook, Load, PATIENCE, PORT, Traffic, account, divert, eventually, many, number, soon, udp_in},
    support,
};

tests![
    both every_packet_under_load_is_served_once,
    both in_flow_order_no_connection_is_reordered,
    both in_flow_order_other_connections_are_not_held_up,
    multi several_numbers_are_served_by_their_tasks,
    both the_filter_of_the_design_runs,
    both the_loop_of_the_design_runs,
];

/// A signal, and the future that waits for it.
fn signal() -> (oneshot::Sender<()>, impl Future<Output = ()> + Send + 'static) {
    let (send, receive) = oneshot::channel();
    (send, async move { _ = receive.await })
}

async fn every_packet_under_load_is_served_once() {
    const COUNT: u32 = many(5000);
    let (queue, _divert) = common::start(Queue::builder(0));
    let (stop, stopped) = signal();
    let load = Load::start(COUNT);
    let decide = load.decide();
    let serving = queue.serve(move |packet: Packet| {
        let decide = decide.clone();
        async move {
            if number(&packet).is_multiple_of(4) {
                tokio::task::yield_now().await;
            }
            decide(packet)
        }
    });
    let serving = tokio::spawn(serving.concurrency(50).with_graceful_shutdown(stopped).run());
    load.finish(COUNT).await;
    stop.send(()).unwrap();
    let served = soon("the shutdown", serving).await.unwrap().unwrap();
    assert_eq!((served.packets, served.errors, served.panics), (COUNT.into(), 0, 0));
    assert!(account(0).is_none());
}

/// Datagrams of several connections: the connection in the upper 8 bits, a number in the lower 24.
struct Connections {
    senders: Vec<UdpSocket>,
    receiver: UdpSocket,
}

impl Connections {
    fn new(count: u8) -> Self {
        let receiver = support::udp((Ipv4Addr::LOCALHOST, PORT));
        receiver.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { senders: (0..count).map(|_| support::udp((Ipv4Addr::LOCALHOST, 0))).collect(), receiver }
    }

    /// Sends `each` datagrams of every connection, with a limited number under way. Returns the
    /// datagrams in the order in which they arrive.
    fn exchange(self, each: u32) -> thread::JoinHandle<Vec<u32>> {
        let total = each as usize * self.senders.len();
        let arrived = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&arrived);
        thread::spawn(move || {
            thread::scope(|scope| {
                let Self { senders, receiver } = &self;
                scope.spawn(move || {
                    let mut patience = Instant::now() + PATIENCE;
                    for sent in 0..total as u32 {
                        while sent - arrived.load(SeqCst) >= 100 {
                            assert!(Instant::now() < patience, "{sent} sent, {arrived:?} have arrived");
                            thread::sleep(Duration::from_micros(50));
                        }
                        patience = Instant::now() + PATIENCE;
                        let connection = sent as usize % senders.len();
                        let datagram = ((connection as u32) << 24) | (sent / senders.len() as u32);
                        senders[connection].send_to(&datagram.to_be_bytes(), (Ipv4Addr::LOCALHOST, PORT)).unwrap();
                    }
                });
                let mut datagrams = Vec::with_capacity(total);
                let mut datagram = [0; 4];
                while datagrams.len() < total && receiver.recv(&mut datagram).is_ok() {
                    datagrams.push(u32::from_be_bytes(datagram));
                    counted.fetch_add(1, SeqCst);
                }
                datagrams
            })
        })
    }
}

/// `NFQUEUE_SERVE_PACKETS` datagrams through a handler that waits for a random time.
async fn in_flow_order_no_connection_is_reordered() {
    const CONNECTIONS: u32 = 20;
    let total = std::env::var("NFQUEUE_SERVE_PACKETS").map_or(10_000, |number| number.parse().expect("a number"));
    let (queue, _divert) = common::start(Queue::builder(0));
    let exchange = Connections::new(CONNECTIONS as u8).exchange(total / CONNECTIONS);
    let seed = Arc::new(AtomicU32::new(1));
    let late = Arc::new(AtomicU32::new(0));
    let (random, reordered) = (seed.clone(), late.clone());
    let (stop, stopped) = signal();
    let last = Arc::new(std::sync::Mutex::new(std::collections::HashMap::new()));
    let serving = queue.serve(move |packet: Packet| {
        let (random, reordered, last) = (random.clone(), reordered.clone(), last.clone());
        async move {
            let draw = random.fetch_update(SeqCst, SeqCst, |seed| Some(seed.wrapping_mul(1_664_525).wrapping_add(1)));
            match draw.unwrap() >> 24 {
                0..64 => {}
                64..250 => {
                    for _ in 0..draw.unwrap() >> 29 {
                        tokio::task::yield_now().await;
                    }
                }
                _ => tokio::time::sleep(Duration::from_micros((draw.unwrap() >> 22).into())).await,
            }
            // Whether they are decided in another order, or the test shows nothing.
            let datagram = number(&packet);
            let before = last.lock().unwrap().insert(datagram >> 24, datagram);
            reordered.fetch_add(u32::from(before.is_some_and(|before| before > datagram)), SeqCst);
            packet.accept()
        }
    });
    let serving = tokio::spawn(serving.in_flow_order().with_graceful_shutdown(stopped).run());
    let datagrams = tokio::task::spawn_blocking(|| exchange.join()).await.unwrap().unwrap();
    stop.send(()).unwrap();
    assert_eq!(soon("the shutdown", serving).await.unwrap().unwrap().packets, total.into());
    assert_eq!(datagrams.len(), total as usize);
    for connection in 0..CONNECTIONS {
        let of_connection = datagrams.iter().filter(|datagram| *datagram >> 24 == connection);
        assert!(of_connection.map(|datagram| datagram & 0xff_ffff).eq(0..total / CONNECTIONS), "{connection}");
    }
    assert!(late.load(SeqCst) > 0, "no handler was overtaken");
}

async fn in_flow_order_other_connections_are_not_held_up() {
    let (queue, _divert) = common::start(Queue::builder(0));
    let traffic = Traffic::new(200);
    let other = support::udp((Ipv4Addr::LOCALHOST, 0));
    let gate = Arc::new(Semaphore::new(0));
    let closed = gate.clone();
    let serving = queue.serve(move |packet: Packet| {
        let gate = closed.clone();
        async move {
            if number(&packet) == 0 {
                drop(gate.acquire().await);
            }
            packet.accept()
        }
    });
    let serving = tokio::spawn(serving.in_flow_order().run());
    traffic.send(0..10);
    traffic.send_from(&other, 10..100);
    traffic.expect(10..100).await;
    gate.add_permits(1);
    traffic.expect(0..10).await;
    serving.abort();
}

async fn several_numbers_are_served_by_their_tasks() {
    const COUNT: u32 = many(5000);
    let queue = Queue::builder(0..4).bind().await.unwrap();
    let _divert = divert([udp_in().to_queues(0..=3)]);
    let load = Load::start(COUNT);
    let decide = load.decide();
    let (stop, stopped) = signal();
    let serving = queue.serve(move |packet: Packet| std::future::ready(decide(packet)));
    let serving = tokio::spawn(serving.with_graceful_shutdown(stopped).run());
    load.finish(COUNT).await;
    stop.send(()).unwrap();
    assert_eq!(soon("the shutdown", serving).await.unwrap().unwrap().packets, COUNT.into());
}

/// A whole filter, with its rules, and a stop that loses nothing.
async fn filter(shutdown_signal: impl Future<Output = ()> + Send + 'static) -> Result<(), Error> {
    let dns = Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(PORT);
    let queue = Queue::builder(Queue::ANY).divert(Divert::builder().rule(dns)).bind().await?;
    queue
        .serve(async |packet: Packet| if allowed(&packet).await { packet.accept() } else { packet.reject() })
        .with_graceful_shutdown(shutdown_signal)
        .await
}

async fn allowed(packet: &Packet) -> bool {
    tokio::task::yield_now().await;
    number(packet).is_multiple_of(2)
}

async fn the_filter_of_the_design_runs() {
    let taken = Queue::builder(0).bind().await.unwrap();
    let (stop, stopped) = signal();
    let running = tokio::spawn(filter(stopped));
    let traffic = Traffic::new(100);
    let rejected = support::udp((Ipv4Addr::LOCALHOST, 0));
    rejected.connect((Ipv4Addr::LOCALHOST, PORT)).unwrap();
    rejected.set_nonblocking(true).unwrap();
    // What is sent before the rules are installed passes.
    eventually("the rules are installed", || {
        rejected.send(&1_u32.to_be_bytes()).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    })
    .await;
    let before = traffic.delivered();
    assert!(before.iter().all(|number| *number == 1), "{before:?}");
    traffic.send([0, 3]);
    traffic.expect([0]).await;
    assert!(account(1).unwrap().last_id >= 2, "the queue has the first free number");
    stop.send(()).unwrap();
    soon("the shutdown", running).await.unwrap().unwrap();
    assert!(account(1).is_none());
    traffic.send([5]);
    traffic.expect([5]).await;
    drop(taken);
}

/// The loop, for those who await other things beside packets.
async fn event_loop(
    queue: Queue,
    mut service: mpsc::Receiver<u32>,
    shutdown_signal: impl Future<Output = ()>,
) -> Result<Vec<u32>, Error> {
    let mut requests = Vec::new();
    let (mut packets, verdicts) = queue.split();
    let mut shutdown_signal = std::pin::pin!(shutdown_signal);
    loop {
        tokio::select! {
            packet = packets.recv() => {
                let Some(packet) = packet else { break };
                let packet = packet?;
                tokio::spawn(async move { decide(packet).await.submit() });
            }
            Some(request) = service.recv() => requests.push(request),
            () = &mut shutdown_signal => break,
        }
    }
    verdicts.close().await?;
    Ok(requests)
}

async fn decide(packet: Packet) -> Verdict {
    if allowed(&packet).await { packet.accept() } else { packet.drop() }
}

async fn the_loop_of_the_design_runs() {
    let rules = Divert::builder().rule(udp_in());
    let queue = Queue::builder(Queue::ANY).divert(rules).bind().await.unwrap();
    let (ask, service) = mpsc::channel(10);
    let (stop, stopped) = signal();
    let running = tokio::spawn(event_loop(queue, service, stopped));
    let traffic = Traffic::new(100);
    traffic.send(0..50);
    ask.send(7).await.unwrap();
    traffic.expect((0..50).step_by(2)).await;
    eventually("the request is taken", || ask.capacity() == 10).await;
    stop.send(()).unwrap();
    assert_eq!(soon("the shutdown", running).await.unwrap().unwrap(), [7]);
    assert!(account(0).is_none());
    traffic.send([5]);
    traffic.expect([5]).await;
}
