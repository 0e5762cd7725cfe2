//! Programs with an event loop of their own. They bind the queue in a runtime, which is never
//! driven again.

use std::{
    net::{Ipv4Addr, UdpSocket},
    thread,
    time::Duration,
};

use futures::executor::block_on;
use rustix::{
    event::{PollFd, PollFlags, poll},
    time::Timespec,
};
use tokio::runtime::{Builder, Runtime};
use tokio_nfqueue::{
    Action, Divert, ErrorKind, FlushPolicy, Packet, PacketStream, Queue, QueueBuilder, Reconfigure, TryRecvError,
};

use crate::{
    common::{DEADLINE, PATIENCE, PORT, many, number, udp_in},
    support::{self, wait_until},
};

tests![
    sync a_poll_loop_decides_every_packet,
    sync gathered_verdicts_are_sent_in_time,
    sync deadlines_and_refusals_work,
    sync replies_of_the_kernel_arrive,
];

/// The queue, and the runtime in which it was bound.
fn bound(builder: QueueBuilder) -> (Queue, Runtime) {
    let runtime = Builder::new_current_thread().enable_io().build().unwrap();
    let builder = builder.divert(Divert::builder().rule(udp_in()));
    let queue = runtime.block_on(builder.bind()).unwrap();
    (queue, runtime)
}

fn sockets() -> (UdpSocket, UdpSocket) {
    let (sender, receiver) = (support::udp((Ipv4Addr::LOCALHOST, 0)), support::udp((Ipv4Addr::LOCALHOST, PORT)));
    sender.connect(receiver.local_addr().unwrap()).unwrap();
    (sender, receiver)
}

fn send(sender: &UdpSocket, number: u32) {
    sender.send(&number.to_be_bytes()).unwrap();
}

fn heard(receiver: &UdpSocket) -> u32 {
    let mut datagram = [0; 4];
    receiver.recv(&mut datagram).expect("a datagram");
    u32::from_be_bytes(datagram)
}

fn wait(packets: &PacketStream) {
    let mut fds = [PollFd::from_borrowed_fd(packets.readable_fd().unwrap(), PollFlags::IN)];
    let timeout = Timespec { tv_sec: PATIENCE.as_secs() as _, tv_nsec: 0 };
    assert_eq!(poll(&mut fds, Some(&timeout)), Ok(1), "the descriptor is readable in time");
}

/// Waits for this many packets.
fn take(packets: &mut PacketStream, count: usize) -> Vec<Packet> {
    let mut taken = Vec::new();
    while taken.len() < count {
        match packets.try_recv_many(&mut taken, count) {
            Ok(_) => {}
            Err(TryRecvError::Empty) => wait(packets),
            Err(error) => panic!("{error}"),
        }
    }
    taken
}

fn a_poll_loop_decides_every_packet() {
    const COUNT: u32 = many(2000);
    for kept in [true, false] {
        let (queue, runtime) = bound(Queue::builder(Queue::any(2)));
        // It need not even exist.
        let runtime = kept.then_some(runtime);
        let (mut packets, verdicts) = queue.split();
        let (sender, receiver) = sockets();
        let sending = thread::spawn(move || {
            for number in 0..COUNT {
                send(&sender, number);
                // No more than fit into the receiver's buffer.
                if number % 100 == 99 {
                    (number - 99..=number).for_each(|expected| assert_eq!(heard(&receiver), expected));
                }
            }
        });
        let closing = thread::spawn({
            let verdicts = verdicts.clone();
            move || {
                let all = sending.join();
                block_on(verdicts.close()).unwrap();
                all.unwrap();
            }
        });
        let mut batch = Vec::new();
        let mut seen = 0;
        'all: loop {
            wait(&packets);
            loop {
                match packets.try_recv_many(&mut batch, 64) {
                    Ok(count) => seen += count,
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Closed) => break 'all,
                    Err(TryRecvError::Failed(error)) => panic!("{error}"),
                }
                batch.drain(..).for_each(|packet| packet.accept().submit().unwrap());
            }
        }
        closing.join().unwrap();
        let stats = verdicts.stats();
        assert_eq!((seen, stats.decided.accepted, stats.held.in_flight), (COUNT as usize, u64::from(COUNT), 0));
        drop((packets, verdicts, runtime));
    }
}

fn gathered_verdicts_are_sent_in_time() {
    for (kept, policy) in [
        (true, FlushPolicy::default()),
        (true, FlushPolicy::fixed(10, Duration::from_millis(1))),
        // Each verdict is sent at once.
        (false, FlushPolicy::fixed(10, Duration::from_secs(1))),
    ] {
        let (queue, runtime) = bound(Queue::builder(0).flush_policy(policy.clone()));
        let runtime = kept.then_some(runtime);
        let (mut packets, verdicts) = queue.split();
        let (sender, receiver) = sockets();
        (0..3).for_each(|number| send(&sender, number));
        let held = take(&mut packets, 3);
        let mut held = held.into_iter();
        let first = held.next().unwrap();
        assert_eq!(number(&first), 0);
        // The other two are undecided, so this one waits for their verdicts, and not for long.
        first.accept().submit().unwrap();
        assert_eq!(heard(&receiver), 0, "{policy:?}");
        // At once.
        held.next().unwrap().accept().submit().unwrap();
        verdicts.flush_now();
        assert_eq!(heard(&receiver), 1, "{policy:?}");
        drop(held);
        block_on(verdicts.close()).unwrap();
        drop((packets, runtime));
    }
}

fn deadlines_and_refusals_work() {
    let builder = Queue::builder(0).deadline(DEADLINE, Action::Accept);
    let (queue, _runtime) = bound(builder);
    let (mut packets, verdicts) = queue.split();
    let mut refusals = verdicts.refusals();
    let (sender, receiver) = sockets();
    send(&sender, 1);
    let packet = take(&mut packets, 1).remove(0);
    assert!(refusals.try_recv().is_none());
    assert_eq!(heard(&receiver), 1, "by its deadline");
    wait_until("it has expired", || packet.is_expired());
    let id = packet.id();
    packet.drop().submit().unwrap();
    let refusal = refusals.try_recv().expect("a refusal");
    assert_eq!((refusal.kind(), refusal.packet_id()), (ErrorKind::Expired, Some(id)));
}

fn replies_of_the_kernel_arrive() {
    let runtime = Builder::new_current_thread().enable_io().build().unwrap();
    let builder = Queue::builder(0).divert(Divert::builder().rule(udp_in()));
    let (mut packets, verdicts) = runtime.block_on(builder.bind_when_free()).unwrap().split();
    let (sender, receiver) = sockets();
    (0..500).for_each(|number| send(&sender, number));
    let first = take(&mut packets, 1).remove(0);
    // The replies are behind the other packets.
    block_on(first.accept().confirm()).unwrap();
    assert_eq!(heard(&receiver), 0);
    block_on(verdicts.reconfigure(&Reconfigure::new().max_len(2000))).unwrap();
    assert_eq!(verdicts.stats().limits.max_len, 2000);
    for packet in take(&mut packets, 499) {
        packet.drop().submit().unwrap();
    }
    block_on(verdicts.flush());
    assert_eq!(verdicts.stats().decided.dropped, 499);
    block_on(verdicts.close()).unwrap();
    assert!(matches!(packets.try_recv(), Err(TryRecvError::Closed)));
}
