//! Refusals by the crate and by the kernel, and how they are reported.

use std::time::{Duration, Instant};

use futures::FutureExt;
use tokio::runtime::Handle;
use tokio_nfqueue::{Action, ErrorKind, FlushPolicy, Packet, Queue};

use crate::{
    common::{
        self, Traffic, account, eventually, freed, give_up_capabilities, hold, next, not_by_the_timer, number, soon,
        start, udp_in, without_net_admin,
    },
    support,
};

tests![
    one invalid_values_are_refused,
    sync bind_outside_a_runtime_is_an_error,
    both a_queue_is_bound_only_once,
    one a_queue_of_another_socket_is_already_bound,
    one a_queue_number_is_free_after_close,
    both namespaces_have_separate_queue_numbers,
    one bind_needs_the_capability,
    one verdicts_without_the_capability_are_refused_with_the_ids_of_their_packets,
    one confirm_without_the_capability_is_an_error,
    one close_without_the_capability_is_an_error_and_ends_the_stream,
    both a_thread_without_the_capability_does_not_stop_close,
    one dropping_without_the_capability_frees_the_queue,
    both packets_of_an_interface_that_went_down_are_counted_as_gone,
    both packets_whose_hook_was_unregistered_are_counted_as_gone,
    both confirm_resolves_when_the_kernel_has_acknowledged,
    one an_unsupported_setting_is_named,
];

async fn invalid_values_are_refused() {
    let builder = || Queue::builder(3);
    for (builder, name) in [
        (builder().receive_buffer(0), "receive buffer"),
        (builder().on_unanswered(Action::Repeat), "on_unanswered"),
        (builder().deadline(Duration::ZERO, Action::Drop), "deadline"),
        (builder().deadline(Duration::from_secs(1), Action::Repeat), "deadline"),
        (builder().flush_policy(FlushPolicy::fixed(0, Duration::ZERO)), "flush policy"),
        (builder().flush_policy(FlushPolicy::adaptive(Duration::from_secs(2))), "flush policy"),
    ] {
        let error = builder.bind().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("queue 3") && error.to_string().contains(name), "{error}");
        assert_eq!(account(3), None, "and nothing was bound");
    }
    let queue = builder().bind().await.unwrap();
    assert_eq!(queue.sink().close_with(Action::Repeat).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(!queue.sink().is_closed());
}

fn bind_outside_a_runtime_is_an_error() {
    let error = Queue::builder(0).bind().now_or_never().expect("no waiting").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoRuntime);
    assert_eq!(account(0), None);
}

async fn a_queue_is_bound_only_once() {
    let (mut queue, _divert) = start(Queue::builder(7));
    let error = Queue::builder(7).bind().await.unwrap_err();
    assert_eq!((error.kind(), error.packet_id()), (ErrorKind::AlreadyBound, None));
    let text = error.to_string();
    assert!(text.starts_with("bind queue 7: already bound by another socket"), "{text}");
    // The first owner is not affected.
    let traffic = Traffic::new(10);
    for packet in hold(&mut queue, &traffic, 0..10).await {
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..10).await;
    // Other numbers are free.
    Queue::builder(8).bind().await.unwrap();
}

async fn a_queue_of_another_socket_is_already_bound() {
    let other = support::RawQueue::bind(7).unwrap();
    assert_eq!(Queue::builder(7).bind().await.unwrap_err().kind(), ErrorKind::AlreadyBound);
    support::drop_now(other);
    Queue::builder(7).bind().await.unwrap();
}

async fn a_queue_number_is_free_after_close() {
    for round in 0..20 {
        let (mut queue, divert) = start(Queue::builder(7));
        let traffic = Traffic::new(1);
        let packet = hold(&mut queue, &traffic, [0]).await.remove(0);
        assert_eq!(packet.id().get(), 1, "ids begin anew in round {round}");
        packet.accept().submit().unwrap();
        traffic.expect([0]).await;
        support::drop_now(divert);
        if round % 2 == 0 {
            soon("the shutdown", queue.close()).await.unwrap();
        } else {
            drop(queue);
            // The timer thread may have it.
            freed(7).await;
        }
    }
}

async fn namespaces_have_separate_queue_numbers() {
    let namespace = support::Namespace::new();
    let (mut here, _divert) = start(Queue::builder(0));
    let runtime = Handle::current();
    let (mut there, _divert_there, traffic_there) = namespace.run(|| {
        let _entered = runtime.enter();
        let (queue, divert) = start(Queue::builder(0));
        (queue, divert, Traffic::new(20))
    });
    let traffic_here = Traffic::new(20);
    for packet in hold(&mut here, &traffic_here, 0..10).await {
        packet.accept().submit().unwrap();
    }
    for packet in hold(&mut there, &traffic_there, 10..20).await {
        packet.accept().submit().unwrap();
    }
    traffic_here.expect(0..10).await;
    traffic_there.expect(10..20).await;
}

async fn bind_needs_the_capability() {
    give_up_capabilities();
    let error = Queue::builder(7).bind().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotPermitted);
    assert!(error.to_string().contains("bind queue 7") && error.to_string().contains("CAP_NET_ADMIN"), "{error}");
}

async fn verdicts_without_the_capability_are_refused_with_the_ids_of_their_packets() {
    /// If this thread does nothing for half a second, the timer thread, which has the capability,
    /// takes its place. Then the test ends.
    const STOPPED: Duration = Duration::from_millis(400);
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(not_by_the_timer()));
    let traffic = Traffic::new(20);
    let mut packets = hold(&mut queue, &traffic, 0..20).await.into_iter();
    let good = packets.next().unwrap();
    soon("the reply", good.accept().confirm()).await.unwrap();
    give_up_capabilities();
    let missing = Instant::now();

    // One by one, then several in one send, of which the kernel refuses only the first with a
    // reply: each refusal is reported.
    let mut refusals = queue.sink().refusals();
    for together in [1, 1, 5] {
        let portion: Vec<Packet> = packets.by_ref().take(together).collect();
        let ids: Vec<_> = portion.iter().map(|packet| Some(packet.id())).collect();
        for packet in portion {
            packet.accept().submit().unwrap();
        }
        soon("the flush", queue.sink().flush()).await;
        if missing.elapsed() > STOPPED {
            return;
        }
        for id in ids {
            let error = soon("the refusal", refusals.recv()).await.unwrap();
            assert_eq!((error.kind(), error.packet_id()), (ErrorKind::NotPermitted, id), "{error}");
            assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
        }
    }
    traffic.expect([0]).await;
    let stats = queue.stats();
    let mut alive = missing;
    if missing.elapsed() > STOPPED {
        return;
    }
    assert_fields!(stats, sent.refusals: 7, decided.accepted: 1, held.in_flight: 19);

    // Packets are still received until the capability counts as lost permanently, after 3 s.
    traffic.send([20]);
    let mut received = Vec::new();
    let end = async {
        loop {
            let item = tokio::time::timeout(Duration::from_millis(10), queue.recv()).await;
            let now = Instant::now();
            if now.duration_since(alive) > STOPPED {
                return None;
            }
            alive = now;
            match item.map(|item| item.expect("an error comes first")) {
                Ok(Ok(packet)) => received.push(number(&packet)),
                Ok(Err(error)) => return Some(error),
                Err(_) => {}
            }
        }
    };
    let Some(error) = soon("the end of the stream", end).await else { return };
    assert_eq!(received, [20]);
    assert_eq!((error.kind(), error.packet_id()), (ErrorKind::NotPermitted, None), "{error}");
    assert!(error.to_string().contains("CAP_NET_ADMIN has been lost"), "{error}");
    assert!(soon("the end of the stream", queue.recv()).await.is_none(), "it is the last item");
}

async fn confirm_without_the_capability_is_an_error() {
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(not_by_the_timer()));
    let traffic = Traffic::new(5);
    let packets = hold(&mut queue, &traffic, 0..5).await;
    give_up_capabilities();
    for packet in packets {
        let id = packet.id();
        let error = soon("the reply", packet.accept().confirm()).await.unwrap_err();
        assert_eq!((error.kind(), error.packet_id()), (ErrorKind::NotPermitted, Some(id)), "{error}");
    }
    traffic.expect_nothing();
}

async fn close_without_the_capability_is_an_error_and_ends_the_stream() {
    for still_held in [0, 2] {
        let (mut queue, divert) = start(Queue::builder(still_held).close_timeout(Duration::from_millis(50)));
        let traffic = Traffic::new(5);
        let mut packets = hold(&mut queue, &traffic, 0..5).await;
        // In a separate thread, because a capability cannot be regained.
        let runtime = Handle::current();
        let sink = queue.sink();
        let closing = std::thread::spawn(move || {
            give_up_capabilities();
            for packet in packets.drain(usize::from(still_held)..) {
                packet.accept().submit().unwrap();
            }
            let error = runtime.block_on(soon("the shutdown", sink.close())).unwrap_err();
            (error, packets)
        });
        eventually("the queue is unbound", || closing.is_finished()).await;
        let (error, packets) = closing.join().unwrap();
        let timed_out = still_held > 0 && error.kind() == ErrorKind::TimedOut;
        assert!(error.kind() == ErrorKind::NotPermitted || timed_out, "{error}");
        drop(packets);
        assert!(soon("the end of the stream", queue.recv()).await.is_none());
        support::drop_now((queue, divert));
        // The last handle unbinds the queue; the timer thread may have it.
        freed(still_held).await;
    }
}

/// The runtime has the capability, and both the verdicts and the default action accept.
async fn a_thread_without_the_capability_does_not_stop_close() {
    const COUNT: u32 = 20;
    for round in 0..100 {
        let (mut queue, divert) = start(Queue::builder(0).on_unanswered(Action::Accept));
        let traffic = Traffic::new(COUNT);
        let packets = hold(&mut queue, &traffic, 0..COUNT).await;
        let sink = queue.sink();
        let closing = tokio::spawn(queue.close_within(Duration::from_micros(10 * round)));
        let deciding = std::thread::spawn(|| {
            without_net_admin(|| packets.into_iter().for_each(|packet| packet.accept().submit().unwrap()));
        });
        let result = soon("the shutdown", closing).await.unwrap();
        assert!(result.as_ref().err().is_none_or(|error| error.kind() == ErrorKind::TimedOut), "{result:?}");
        assert_eq!(account(0), None, "unbound in round {round}: {:?}", sink.stats());
        eventually("the thread's end", || deciding.is_finished()).await;
        deciding.join().unwrap();
        traffic.expect(0..COUNT).await;
        support::drop_now(divert);
    }
}

async fn dropping_without_the_capability_frees_the_queue() {
    let (mut queue, divert) = start(Queue::builder(0).on_unanswered(Action::Accept));
    let traffic = Traffic::new(5);
    let mut packets = hold(&mut queue, &traffic, 0..5).await;
    traffic.send(5..10);
    give_up_capabilities();
    packets.remove(0).accept().submit().unwrap();
    drop(packets.remove(0));
    drop(queue);
    drop(packets);
    freed(0).await;
    // Gathered verdicts may have been sent by a thread with the capability, or are lost with the
    // socket.
    assert!(traffic.delivered().iter().all(|number| *number < 10));
    drop(divert);
}

async fn packets_of_an_interface_that_went_down_are_counted_as_gone() {
    let peer = support::veth();
    let (mut queue, _divert) = start(Queue::builder(0));
    let sender = peer.run(|| support::udp((peer.far_v4, 0)));
    let mut packets = Vec::new();
    for number in 0..20_u32 {
        sender.send_to(&number.to_be_bytes(), (peer.near_v4, 9000)).unwrap();
        packets.push(next(&mut queue).await);
    }
    // A packet of another interface.
    let traffic = Traffic::new(20);
    let other = hold(&mut queue, &traffic, [0]).await.remove(0);

    support::link_down(&peer.near);
    eventually("the kernel has dropped the packets", || account(0).unwrap().waiting == 1).await;
    let confirmed = packets.pop().unwrap();
    let id = confirmed.id();
    for (index, packet) in packets.into_iter().enumerate() {
        (if index % 3 == 0 { packet.drop() } else { packet.accept() }).submit().unwrap();
    }
    queue.sink().flush().await;
    let error = soon("the reply", confirmed.accept().confirm()).await.unwrap_err();
    assert_eq!((error.kind(), error.packet_id()), (ErrorKind::PacketGone, Some(id)), "{error}");

    // No error on the stream: the next item is a packet.
    let packet = hold(&mut queue, &traffic, [1]).await.remove(0);
    packet.accept().submit().unwrap();
    other.accept().submit().unwrap();
    traffic.expect([0, 1]).await;
    let stats = queue.stats();
    assert_fields!(stats, sent.gone_at_least: 20, decided.accepted: 2, decided.dropped: 0);
    assert_fields!(stats, sent.refused: 0, held.in_flight: 0);
}

async fn packets_whose_hook_was_unregistered_are_counted_as_gone() {
    let (mut queue, divert) = start(Queue::builder(0));
    let traffic = Traffic::new(30);
    let packets = hold(&mut queue, &traffic, 0..10).await;
    drop(divert);
    eventually("the kernel has dropped the packets", || account(0).unwrap().waiting == 0).await;
    for packet in packets {
        let id = packet.id();
        let error = soon("the reply", packet.accept().confirm()).await.unwrap_err();
        assert_eq!((error.kind(), error.packet_id()), (ErrorKind::PacketGone, Some(id)));
    }
    let _divert = common::divert([udp_in().to_queue(0)]);
    for packet in hold(&mut queue, &traffic, 10..20).await {
        packet.accept().submit().unwrap();
    }
    traffic.expect(10..20).await;
    assert_eq!((queue.stats().sent.gone_at_least, queue.stats().sent.refused), (10, 0));
}

async fn confirm_resolves_when_the_kernel_has_acknowledged() {
    // A policy that would keep plain verdicts for a second.
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(FlushPolicy::fixed(1000, Duration::from_secs(1))));
    let traffic = Traffic::new(50);
    let sink = queue.sink();
    let mut packets = hold(&mut queue, &traffic, 0..50).await;
    // It sends the gathered verdicts too.
    for packet in packets.drain(..10) {
        packet.accept().submit().unwrap();
    }
    soon("the reply", packets.remove(0).accept().confirm()).await.unwrap();
    assert_eq!(traffic.delivered().len(), 11);
    // The call submits the verdict; the future need not be awaited.
    let confirmation = packets.remove(0).accept().confirm();
    traffic.expect([11]).await;
    drop(confirmation);
    // Many at the same time, from tasks.
    let confirmations: Vec<_> = packets.drain(..).map(|packet| tokio::spawn(packet.accept().confirm())).collect();
    for confirmation in confirmations {
        soon("the reply", confirmation).await.unwrap().unwrap();
    }
    traffic.expect(12..50).await;
    assert_eq!((sink.stats().sent.gone_at_least, sink.stats().sent.refused, sink.stats().held.in_flight), (0, 0, 0));
}

async fn an_unsupported_setting_is_named() {
    // The kernel may or may not have the glue for connection tracking.
    if let Err(error) = Queue::builder(0).conntrack(true).bind().await {
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("conntrack"), "{error}");
        assert_eq!(account(0), None, "nothing is half applied");
    }
    // The same for security contexts.
    if let Err(error) = Queue::builder(0).security_context(true).bind().await {
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("security_context"), "{error}");
    }
    Queue::builder(0).bind().await.unwrap();
}
