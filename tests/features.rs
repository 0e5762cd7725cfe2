//! Several queues as one, other namespaces, settings changed while the queue runs, statistics and advice.

use std::{collections::BTreeSet, net::Ipv4Addr, time::Duration};

use common::{Traffic, divert, eventually, next, number, soon, start, support, udp_in};
use futures::{SinkExt, StreamExt};
use tokio_nfqueue::{Action, Advice, ErrorKind, Hook, NetworkNamespace, Queue, QueueGroup, Reconfigure};

#[macro_use]
mod common;

tests![
    both a_group_is_one_stream_and_one_sink,
    one a_group_gives_its_queues_away,
    one a_group_that_cannot_be_bound_leaves_nothing_bound,
    both a_queue_of_another_namespace,
    one namespaces_that_are_none,
    both a_longer_copy_range_takes_effect,
    both a_shorter_queue_keeps_what_is_queued,
    one what_cannot_be_changed_is_refused,
    both advice_names_the_full_queue,
    one advice_names_the_full_buffer,
    both statistics_tell_what_is_held,
    both statistics_now_and_then,
    both repeating_with_a_mark_never_loops,
    one interfaces_have_names,
];

async fn a_group_is_one_stream_and_one_sink() {
    let group = QueueGroup::bind(4..=7, |builder| builder).unwrap();
    let _rules = divert([udp_in().to_queues(4..=7)]);
    // The kernel balances by addresses; one source each finds every queue.
    let receiver = support::udp((Ipv4Addr::UNSPECIFIED, common::PORT));
    let hosts: Vec<_> = (1..=40).map(|host| Ipv4Addr::new(127, 0, 1, host)).collect();
    for host in &hosts {
        support::udp((*host, 0)).send_to(&[host.octets()[3]], (Ipv4Addr::LOCALHOST, common::PORT)).unwrap();
    }
    let (mut packets, mut verdicts) = group.split();
    let mut queues = BTreeSet::new();
    for turn in 0..hosts.len() {
        let packet = next(&mut packets).await;
        queues.insert(packet.queue());
        match turn % 3 {
            0 => verdicts.submit(packet.accept()).unwrap(),
            1 => soon("the kernel's answer", verdicts.confirm(packet.accept())).await.unwrap(),
            _ => soon("room", verdicts.send(packet.accept())).await.unwrap(),
        }
    }
    soon("the flush", verdicts.flush()).await.unwrap();
    assert_eq!(queues, BTreeSet::from([4, 5, 6, 7]));
    let mut heard = BTreeSet::new();
    for _ in &hosts {
        let mut datagram = [0; 4];
        receiver.recv(&mut datagram).unwrap();
        heard.insert(datagram[0]);
    }
    assert_eq!(heard.len(), hosts.len());
    assert_eq!(verdicts.stats().map(|(_, stats)| stats.accepted).sum::<u64>(), 40);
    soon("the end", verdicts.close()).await.unwrap();
    assert!(soon("the end of the stream", packets.next()).await.is_none());
    assert!((4..=7).all(|queue| support::queue_line(queue).is_none()));
}

async fn a_group_gives_its_queues_away() {
    let queues = QueueGroup::bind(1..=3, |builder| builder.on_unanswered(Action::Accept)).unwrap().into_queues();
    assert_eq!(queues.iter().map(Queue::number).collect::<Vec<_>>(), [1, 2, 3]);
    let mut again: QueueGroup = queues.into_iter().collect();
    let traffic = Traffic::new(1);
    let _rules = divert([udp_in().to_queue(2)]);
    traffic.send([0]);
    let packet = next(&mut again).await;
    assert_eq!(packet.queue(), 2);
    drop(packet);
    soon("the end", again.close()).await.unwrap();
}

async fn a_group_that_cannot_be_bound_leaves_nothing_bound() {
    let _owner = Queue::builder(11).bind().unwrap();
    let error = QueueGroup::bind(10..=12, |builder| builder).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyBound);
    assert!(support::queue_line(10).is_none() && support::queue_line(12).is_none());
}

async fn a_queue_of_another_namespace() {
    let peer = support::veth();
    let here = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let path = peer.run(|| format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid()));
    // The path is that of a thread that has ended; the peer's descriptor keeps the namespace.
    assert!(NetworkNamespace::open(&path).is_err());
    let namespace = peer.run(NetworkNamespace::current).unwrap();
    let mut queue = Queue::builder(3).namespace(namespace.clone()).bind().unwrap();
    assert_eq!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), here, "the thread has been moved");
    assert!(support::queue_line(3).is_none(), "it is not bound here");
    assert!(peer.run(|| support::queue_line(3)).is_some(), "it is bound there");

    let rules = peer.run(|| divert([udp_in().to_queue(3)]));
    let (receiver, sender) = (peer.run(|| support::udp((peer.far_v4, common::PORT))), support::udp((peer.near_v4, 0)));
    sender.send_to(b"over there", (peer.far_v4, common::PORT)).unwrap();
    let packet = next(&mut queue).await;
    // The name of an interface there, asked for from here.
    let name = packet.interface_name(packet.interface_in().unwrap()).unwrap();
    assert_eq!(name, peer.far);
    soon("the kernel's answer", queue.sink().confirm(packet.accept())).await.unwrap();
    let mut datagram = [0; 16];
    let length = receiver.recv(&mut datagram).unwrap();
    assert_eq!(&datagram[..length], b"over there");
    // The kernel's table is that of the queue's namespace, and so is what a second owner is told.
    assert_eq!(queue.sink().kernel_stats().unwrap().last_id, 1);
    let error = Queue::builder(3).namespace(namespace).bind().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyBound);
    let other = Queue::builder(3).bind().unwrap();
    drop((rules, other));
    soon("the end", queue.close()).await.unwrap();
}

async fn namespaces_that_are_none() {
    assert_eq!(NetworkNamespace::named("../escape").unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(NetworkNamespace::named("").unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(NetworkNamespace::named("there-is-no-such-namespace").unwrap_err().kind(), ErrorKind::Other);
    let file = NetworkNamespace::open("/dev/null").unwrap();
    let error = Queue::builder(1).namespace(file).bind().unwrap_err();
    assert!(error.to_string().starts_with("network namespace"), "{error}");
}

async fn a_longer_copy_range_takes_effect() {
    let (mut queue, _rules) = start(Queue::builder(0).copy_range(30));
    let traffic = Traffic::new(3);
    traffic.send([0]);
    let sink = queue.sink();
    // One is queued and unread while the setting changes.
    sink.reconfigure(&Reconfigure::new().copy_range(65_531).max_len(2048).uid_gid(true)).unwrap();
    traffic.send([1]);
    let (first, second) = (next(&mut queue).await, next(&mut queue).await);
    assert_eq!((first.payload().len(), first.original_len(), first.is_truncated()), (30, Some(32), true));
    assert!(!second.is_truncated() && number(&second) == 1);
    assert_eq!(sink.stats().max_len, 2048);
    assert_eq!(support::queue_line(0).unwrap()[4], 65_531);
    for packet in [first, second] {
        sink.submit(packet.accept()).unwrap();
    }
    sink.reconfigure(&Reconfigure::new().copy_metadata()).unwrap();
    traffic.send([2]);
    let third = next(&mut queue).await;
    assert_eq!((third.payload().len(), third.original_len()), (0, None));
    sink.submit(third.accept()).unwrap();
    soon("the flush", sink.flush()).await.unwrap();
    traffic.expect([0, 1, 2]).await;
}

async fn a_shorter_queue_keeps_what_is_queued() {
    let (mut queue, _rules) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    traffic.send(0..100);
    queue.sink().reconfigure(&Reconfigure::new().max_len(10).fail_open(true)).unwrap();
    for expected in 0..100 {
        let packet = next(&mut queue).await;
        assert_eq!(number(&packet), expected);
        queue.sink().submit(packet.accept()).unwrap();
    }
    soon("the flush", queue.sink().flush()).await.unwrap();
    traffic.expect(0..100).await;
    assert_eq!(queue.stats().lost, 0);
}

async fn what_cannot_be_changed_is_refused() {
    let (queue, _rules) = start(Queue::builder(0));
    let sink = queue.sink();
    for change in
        [Reconfigure::new().copy_range(0), Reconfigure::new().copy_range(70_000), Reconfigure::new().max_len(0)]
    {
        assert_eq!(sink.reconfigure(&change).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    match sink.reconfigure(&Reconfigure::new().conntrack(true)) {
        // A kernel with the glue.
        Ok(()) => {}
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains("conntrack"), "{error}");
        }
    }
    soon("the end", queue.close()).await.unwrap();
    assert_eq!(sink.reconfigure(&Reconfigure::new().max_len(5)).unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(sink.kernel_stats().unwrap_err().kind(), ErrorKind::Closed);
}

async fn advice_names_the_full_queue() {
    let (queue, _rules) = start(Queue::builder(0).max_len(20));
    let traffic = Traffic::new(100);
    assert_eq!(queue.sink().advice(), []);
    traffic.send(0..100);
    let kernel = queue.sink().kernel_stats().unwrap();
    assert_eq!((kernel.queued, kernel.dropped_queue, kernel.dropped_socket), (20, 80, 0));
    let advice = queue.sink().advice();
    assert_eq!(advice, [Advice::RaiseMaxLen { dropped: 80, now: 20, to: 40 }]);
    assert!(advice[0].to_string().contains("raise max_len from 20 to 40"));
}

async fn advice_names_the_full_buffer() {
    // Smaller than the kernel allows: it takes its own least.
    let (mut queue, _rules) = start(Queue::builder(0).receive_buffer(1));
    let traffic = Traffic::new(100);
    traffic.send(0..100);
    let first = next(&mut queue).await;
    queue.sink().submit(first.accept()).unwrap();
    // The gap shows with the next packet behind it.
    eventually("the gap is seen", || {
        traffic.send([0]);
        queue.sink().kernel_stats().unwrap().dropped_socket > 0
    })
    .await;
    while queue.stats().lost == 0 {
        let packet = next(&mut queue).await;
        queue.sink().submit(packet.accept()).unwrap();
        traffic.send([0]);
    }
    let stats = queue.stats();
    match queue.sink().advice()[..] {
        [Advice::RaiseReceiveBuffer { lost, now, to, rmem_max: None }] => {
            assert_eq!((lost, now, to), (stats.lost, stats.receive_buffer, 2 * stats.receive_buffer));
        }
        ref other => panic!("{other:?}"),
    }
}

async fn statistics_tell_what_is_held() {
    let (mut queue, _rules) = start(Queue::builder(0));
    let traffic = Traffic::new(10);
    assert_eq!((queue.stats().held_bytes, queue.stats().oldest_undecided), (0, None));
    let held = common::hold(&mut queue, &traffic, 0..10).await;
    let before = std::time::Instant::now();
    let stats = queue.stats();
    let payloads: usize = held.iter().map(|packet| packet.payload().len()).sum();
    assert!(stats.held_bytes > payloads, "metadata counts as well");
    assert_eq!((stats.in_flight, stats.fill.max >= 1), (10, true));
    eventually("the oldest ages", || {
        let waited = before.elapsed();
        waited > Duration::from_millis(5) && queue.stats().oldest_undecided.unwrap() >= waited
    })
    .await;
    drop(held);
    assert_eq!((queue.stats().held_bytes, queue.stats().oldest_undecided, queue.stats().unanswered), (0, None, 10));
}

async fn statistics_now_and_then() {
    let (mut queue, _rules) = start(Queue::builder(0));
    let sink = queue.sink();
    assert!(sink.watch(Duration::ZERO).is_err());
    let mut watch = sink.watch(Duration::from_millis(2)).unwrap();
    let traffic = Traffic::new(1);
    assert_eq!(soon("statistics", watch.next()).await.unwrap().received, 0);
    traffic.send([0]);
    let packet = next(&mut queue).await;
    sink.submit(packet.drop()).unwrap();
    while soon("statistics", watch.next()).await.unwrap().dropped == 0 {}
    soon("the end", queue.close()).await.unwrap();
    assert!(soon("the end of the watch", watch.next()).await.is_none());
}

async fn repeating_with_a_mark_never_loops() {
    // The rule does not look at the mark, so without the helper's own look the packet would come back for ever.
    let (mut queue, _rules) = start(Queue::builder(0));
    let traffic = Traffic::new(1);
    traffic.send([0]);
    for (turn, action) in [(0, Action::Repeat), (1, Action::Accept)] {
        let packet = next(&mut queue).await;
        assert_eq!((packet.mark(), packet.has_mark(0x10, 0xf0)), (turn * 0x10, turn == 1));
        let verdict = packet.repeat_marked(0x10, 0xf0);
        assert_eq!(verdict.action(), action);
        queue.sink().submit(verdict).unwrap();
    }
    soon("the flush", queue.sink().flush()).await.unwrap();
    traffic.expect([0]).await;
}

async fn interfaces_have_names() {
    let (mut queue, _rules) = start(Queue::builder(0));
    let traffic = Traffic::new(1);
    traffic.send([0]);
    let packet = next(&mut queue).await;
    assert_eq!(packet.hook(), Hook::Input);
    assert_eq!(packet.interface_name(packet.interface_in().unwrap()).unwrap(), "lo");
    assert!(packet.interface_name(9999).is_err());
    assert!(packet.attributes().count() >= 3);
    assert_eq!(packet.vlan(), None);
}
