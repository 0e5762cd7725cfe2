use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use futures::channel::oneshot;
use tokio::sync::Semaphore;

use super::Served;
use crate::{
    Action, ErrorKind, Packet, Queue,
    simulated::{Kernel, Sent, TestPacket, queue},
};

/// A datagram of the connection from this port, with a number.
fn datagram(port: u16, number: u32) -> TestPacket {
    let from = SocketAddr::from(([10, 0, 0, 1], port));
    TestPacket::udp(from, "10.0.0.2:53".parse().unwrap(), &number.to_be_bytes())
}

fn number(packet: &Packet) -> u32 {
    u32::from_be_bytes(packet.payload()[28..].try_into().unwrap())
}

async fn accepted(sent: &[Sent]) -> usize {
    let mut accepted = 0;
    for sent in sent {
        accepted += usize::from(sent.outcome().await.accepted);
    }
    accepted
}

/// Closes the queue after what was sent before has been decided.
async fn stop(stop: oneshot::Sender<()>) {
    stop.send(()).unwrap();
}

/// A signal, and the future that waits for it.
fn signal() -> (oneshot::Sender<()>, impl Future<Output = ()> + Send + 'static) {
    let (send, receive) = oneshot::channel();
    (send, async move { _ = receive.await })
}

#[tokio::test]
async fn every_packet_gets_the_verdict_that_the_handler_returns() {
    let (kernel, queue) = queue(Queue::builder(0)).unwrap();
    let sent = kernel.send_all((0..100).map(|number| datagram(1, number)));
    let (stopped, signal) = signal();
    // Half of them at once, half in tasks.
    let serving = queue.serve(async |packet: Packet| {
        if number(&packet) % 2 == 0 {
            tokio::task::yield_now().await;
        }
        if number(&packet) < 60 { packet.accept() } else { packet.drop() }
    });
    let serving = tokio::spawn(serving.with_graceful_shutdown(signal).run());
    assert_eq!(accepted(&sent).await, 60);
    stop(stopped).await;
    assert_eq!(serving.await.unwrap().unwrap(), Served { packets: 100, errors: 0, panics: 0 });
    assert!(kernel.stats(0).is_none(), "the queue is unbound");
}

#[tokio::test]
async fn errors_and_panics_give_the_default_action_and_are_counted() {
    let (kernel, queue) = queue(Queue::builder(0).on_unanswered(Action::Accept)).unwrap();
    let sent = kernel.send_all((0..60).map(|number| datagram(1, number)));
    let (stopped, signal) = signal();
    let serving = queue.serve(|packet: Packet| async move {
        let number = number(&packet);
        if number % 2 == 0 {
            tokio::task::yield_now().await;
        }
        match number / 20 {
            0 => Ok(packet.drop()),
            1 => Err(format!("packet {number} is odd")),
            _ => std::panic::panic_any(number),
        }
    });
    let serving = tokio::spawn(serving.with_graceful_shutdown(signal).run());
    assert_eq!(accepted(&sent).await, 40);
    stop(stopped).await;
    assert_eq!(serving.await.unwrap().unwrap(), Served { packets: 60, errors: 20, panics: 20 });
}

#[tokio::test]
async fn a_panic_before_the_future_exists_is_caught_too() {
    let (kernel, queue) = queue(Queue::builder(0)).unwrap();
    let sent = [kernel.send(datagram(1, 0)), kernel.send(datagram(1, 1))];
    let serving = queue.serve(|packet: Packet| {
        assert_ne!(number(&packet), 0, "the first one panics");
        async { packet.accept() }
    });
    let serving = tokio::spawn(serving.run());
    assert!(!sent[0].outcome().await.accepted && sent[1].outcome().await.accepted);
    serving.abort();
}

#[tokio::test]
async fn a_handler_that_returns_none_has_decided_elsewhere() {
    let (kernel, queue) = queue(Queue::builder(0)).unwrap();
    let sent = [kernel.send(datagram(1, 0)), kernel.send(datagram(1, 1))];
    let serving = queue.serve(async |packet: Packet| {
        if number(&packet) == 0 {
            packet.accept().submit().unwrap();
            return None;
        }
        Some(packet.drop())
    });
    let serving = tokio::spawn(serving.run());
    assert!(sent[0].outcome().await.accepted && !sent[1].outcome().await.accepted);
    serving.abort();
}

#[tokio::test]
async fn no_more_handlers_run_than_may_and_no_packet_is_read_meanwhile() {
    let (kernel, queue) = queue(Queue::builder(0)).unwrap();
    let sink = queue.sink();
    let (gate, running, most) =
        (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let sent = kernel.send_all((0..10).map(|number| datagram(1, number)));
    let (passed, counted, peak) = (gate.clone(), running.clone(), most.clone());
    let serving = queue.serve(move |packet: Packet| {
        let (gate, running, most) = (passed.clone(), counted.clone(), peak.clone());
        async move {
            most.fetch_max(running.fetch_add(1, SeqCst) + 1, SeqCst);
            gate.acquire().await.unwrap().forget();
            running.fetch_sub(1, SeqCst);
            packet.accept()
        }
    });
    let serving = tokio::spawn(serving.concurrency(3).run());
    while running.load(SeqCst) < 3 {
        tokio::task::yield_now().await;
    }
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
    assert_eq!((running.load(SeqCst), sink.stats().decided.accepted), (3, 0));
    gate.add_permits(10);
    assert_eq!((accepted(&sent).await, most.load(SeqCst)), (10, 3));
    serving.abort();
}

#[tokio::test]
async fn in_flow_order_a_verdict_waits_for_earlier_packets_of_its_connection_only() {
    let (kernel, queue) = queue(Queue::builder(0)).unwrap();
    let gates: Arc<Mutex<HashMap<u32, oneshot::Receiver<()>>>> = Arc::default();
    let mut open = HashMap::new();
    for number in 0..4 {
        let (send, receive) = oneshot::channel();
        gates.lock().unwrap().insert(number, receive);
        open.insert(number, send);
    }
    let serving = queue.serve(move |packet: Packet| {
        let gate = gates.lock().unwrap().remove(&number(&packet));
        async move {
            if let Some(gate) = gate {
                let _ = gate.await;
            }
            packet.accept()
        }
    });
    let serving = tokio::spawn(serving.in_flow_order().run());
    // 0, 1 and 2 are of one connection; so is 9, which is decided at once.
    let sent = [datagram(1, 0), datagram(1, 1), datagram(1, 2), datagram(2, 3), datagram(1, 9), datagram(3, 8)];
    let sent = kernel.send_all(sent);
    assert!(sent[5].outcome().await.accepted, "another connection is not held up");
    open.remove(&2).unwrap().send(()).unwrap();
    open.remove(&1).unwrap().send(()).unwrap();
    open.remove(&3).unwrap().send(()).unwrap();
    assert!(sent[3].outcome().await.accepted);
    assert!([0, 1, 2, 4].iter().all(|at| sent[*at].is_waiting()), "they wait for the first one");
    open.remove(&0).unwrap().send(()).unwrap();
    for at in [0, 1, 2, 4] {
        assert!(sent[at].outcome().await.accepted);
    }
    // What panics does not delay the others indefinitely.
    serving.abort();
}

#[tokio::test]
async fn in_flow_order_a_failed_handler_gives_way() {
    let (kernel, queue) = queue(Queue::builder(0)).unwrap();
    let serving = queue.serve(async |packet: Packet| {
        tokio::task::yield_now().await;
        match number(&packet) {
            0 => panic!("the first one"),
            1 => Err("the second one"),
            _ => Ok(packet.accept()),
        }
    });
    let serving = tokio::spawn(serving.in_flow_order().run());
    let sent = kernel.send_all((0..3).map(|number| datagram(1, number)));
    assert!(sent[2].outcome().await.accepted);
    assert!(!sent[0].outcome().await.accepted && !sent[1].outcome().await.accepted);
    serving.abort();
}

#[tokio::test]
async fn a_graceful_shutdown_awaits_the_handlers_that_run() {
    let (kernel, queue) = queue(Queue::builder(0)).unwrap();
    let sent = kernel.send(datagram(1, 0));
    let (begun, mut begins) = tokio::sync::mpsc::unbounded_channel();
    let (release, released) = (Arc::new(Semaphore::new(0)), ());
    let gate = release.clone();
    let serving = queue.serve(move |packet: Packet| {
        let (begun, gate) = (begun.clone(), gate.clone());
        async move {
            begun.send(()).unwrap();
            let _permit = gate.acquire().await.unwrap();
            packet.accept()
        }
    });
    let (stopped, signal) = signal();
    let serving = tokio::spawn(serving.with_graceful_shutdown(signal).run());
    begins.recv().await.unwrap();
    stop(stopped).await;
    tokio::task::yield_now().await;
    assert!(sent.is_waiting() && !serving.is_finished());
    release.add_permits(1);
    assert!(sent.outcome().await.accepted);
    assert_eq!(serving.await.unwrap().unwrap().packets, 1);
    let () = released;
}

#[tokio::test]
async fn a_handler_that_does_not_end_is_aborted_at_the_time_out() {
    for concurrency in [1, 10] {
        a_handler_that_does_not_end(concurrency).await;
    }
}

async fn a_handler_that_does_not_end(concurrency: usize) {
    let builder = Queue::builder(0).on_unanswered(Action::Accept).close_timeout(Duration::from_millis(50));
    let (kernel, queue) = queue(builder).unwrap();
    let sent = kernel.send(datagram(1, 0));
    let held = Arc::new(());
    let copy = held.clone();
    let serving = queue.serve(move |packet: Packet| {
        let held = copy.clone();
        async move {
            std::future::pending::<()>().await;
            drop(held);
            packet.drop()
        }
    });
    let (stopped, signal) = signal();
    let serving = serving.concurrency(concurrency).with_graceful_shutdown(signal);
    let serving = tokio::spawn(serving.into_future());
    while Arc::strong_count(&held) < 3 {
        tokio::task::yield_now().await;
    }
    stop(stopped).await;
    // The clock of the simulated kernel stands.
    while !serving.is_finished() {
        kernel.advance(Duration::from_millis(10));
        tokio::task::yield_now().await;
    }
    assert_eq!(serving.await.unwrap().unwrap_err().kind(), ErrorKind::TimedOut);
    assert!(sent.outcome().await.accepted);
    // An aborted task is dropped when the runtime runs it next.
    while Arc::strong_count(&held) > 1 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn it_ends_when_the_queue_is_closed_elsewhere() {
    let (kernel, queue) = queue(Queue::builder(0)).unwrap();
    let sink = queue.sink();
    let serving = tokio::spawn(queue.serve(async |packet: Packet| packet.accept()).run());
    assert!(kernel.send(datagram(1, 0)).outcome().await.accepted);
    sink.close().await.unwrap();
    assert_eq!(serving.await.unwrap().unwrap().packets, 1);
}

#[tokio::test]
async fn a_dropped_future_closes_the_queue() {
    let (kernel, queue) = queue(Queue::builder(0).on_unanswered(Action::Accept)).unwrap();
    let sent = kernel.send(datagram(1, 0));
    let serving = queue.serve(async |packet: Packet| {
        std::future::pending::<()>().await;
        packet.drop()
    });
    let serving = tokio::spawn(serving.into_future());
    while sent.is_waiting() && kernel.stats(0).is_some_and(|stats| stats.queued == 0) {
        tokio::task::yield_now().await;
    }
    serving.abort();
    assert!(sent.outcome().await.accepted);
    while kernel.stats(0).is_some() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_numbers_are_served_by_a_task_each() {
    let kernel = Kernel::new();
    let queue = kernel.bind(Queue::builder(0..4)).unwrap();
    let tasks: Arc<Mutex<HashMap<u16, tokio::task::Id>>> = Arc::default();
    let seen = tasks.clone();
    let (stopped, signal) = signal();
    let serving = queue.serve(move |packet: Packet| {
        // Before the first await, in the task that reads.
        seen.lock().unwrap().insert(packet.queue_number(), tokio::task::id());
        async { packet.accept() }
    });
    let serving = tokio::spawn(serving.with_graceful_shutdown(signal).run());
    let sent = kernel.send_all((0..400).map(|number| datagram(1, number).to_queue((number % 4) as u16)));
    assert_eq!(accepted(&sent).await, 400);
    stop(stopped).await;
    assert_eq!(serving.await.unwrap().unwrap().packets, 400);
    let tasks: std::collections::HashSet<_> = tasks.lock().unwrap().values().copied().collect();
    assert_eq!(tasks.len(), 4);
}

#[cfg(feature = "tower")]
mod tower {
    use std::{
        future::{Ready, ready},
        task::{Context, Poll, Waker},
    };

    use super::*;
    use crate::Verdict;

    /// Takes as many packets as it is allowed to.
    #[derive(Clone, Default)]
    struct Allowed(Arc<Mutex<(usize, Option<Waker>)>>);

    impl Allowed {
        fn allow(&self, packets: usize) {
            let mut state = self.0.lock().unwrap();
            state.0 += packets;
            state.1.take().into_iter().for_each(Waker::wake);
        }
    }

    impl tower_service::Service<Packet> for Allowed {
        type Response = Verdict;
        type Error = String;
        type Future = Ready<Result<Verdict, String>>;

        fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), String>> {
            let mut state = self.0.lock().unwrap();
            match state.0 {
                usize::MAX => Poll::Ready(Err("it is broken".to_owned())),
                0 => {
                    state.1 = Some(cx.waker().clone());
                    Poll::Pending
                }
                _ => Poll::Ready(Ok(())),
            }
        }

        fn call(&mut self, packet: Packet) -> Self::Future {
            self.0.lock().unwrap().0 -= 1;
            ready(if number(&packet) == 1 { Err("one is refused".to_owned()) } else { Ok(packet.accept()) })
        }
    }

    #[tokio::test]
    async fn no_packet_is_read_while_a_service_is_not_ready() {
        let (kernel, queue) = queue(Queue::builder(0)).unwrap();
        let service = Allowed::default();
        let sent = kernel.send_all((0..3).map(|number| datagram(1, number)));
        let (stopped, signal) = signal();
        let serving = tokio::spawn(queue.serve_service(service.clone()).with_graceful_shutdown(signal).run());
        service.allow(2);
        assert!(sent[0].outcome().await.accepted && !sent[1].outcome().await.accepted);
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
        assert!(sent[2].is_waiting());
        service.allow(1);
        assert!(sent[2].outcome().await.accepted);
        stop(stopped).await;
        assert_eq!(serving.await.unwrap().unwrap(), Served { packets: 3, errors: 1, panics: 0 });
    }

    #[tokio::test]
    async fn a_service_that_fails_ends_it() {
        let (kernel, queue) = queue(Queue::builder(0)).unwrap();
        let service = Allowed::default();
        service.allow(usize::MAX);
        let error = queue.serve_service(service).await.unwrap_err();
        assert!(error.to_string().contains("it is broken"), "{error}");
        assert!(kernel.stats(0).is_none(), "the queue is closed");
    }
}
