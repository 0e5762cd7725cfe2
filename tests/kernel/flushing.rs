//! When verdicts reach the kernel: the policies, and the `Sink`.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures::{Sink, SinkExt, StreamExt, TryStreamExt};
use tokio_nfqueue::{
    Error, ErrorKind, FlushPolicy, Queue,
    flush::{FlushContext, FlushDecision, FlushReason},
};

use crate::{
    common::{self, Traffic, account, hold, next, number, soon, start},
    support,
};

tests![
    one immediate_sends_each_verdict_in_its_own_message,
    one adaptive_sends_at_once_when_idle,
    both adaptive_gathers_under_load,
    one fixed_waits_for_its_batch,
    both fixed_keeps_its_time_limit_when_nobody_polls,
    both a_time_limit_below_a_millisecond_is_kept,
    both a_time_limit_is_kept_repeatedly,
    both a_custom_policy_is_asked_after_each_verdict,
    one clones_of_a_builder_have_separate_policies,
    both a_policy_that_always_waits_for_tasks_delays_no_verdict_for_ever,
    both a_policy_that_always_delays_delays_no_verdict_for_ever,
    one verdicts_are_sent_after_a_policy_has_panicked,
    both verdicts_are_sent_after_a_policy_has_panicked_on_the_timer_thread,
    both feed_gathers_and_flush_sends,
    one sink_send_flushes_each_verdict,
    both a_stream_can_be_forwarded_into_a_sink,
    one a_late_verdict_does_not_end_forward,
    both closing_one_sink_leaves_the_others_open,
    both flush_without_verdicts_is_ready,
];

/// Sends nothing before a second has passed, except on request.
fn patient() -> FlushPolicy {
    FlushPolicy::fixed(1_000_000, Duration::from_secs(1))
}

async fn immediate_sends_each_verdict_in_its_own_message() {
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(FlushPolicy::immediate()));
    let traffic = Traffic::new(50);
    for packet in hold(&mut queue, &traffic, 0..50).await {
        let number = number(&packet);
        packet.accept().submit().unwrap();
        // It was sent within the call: nothing was awaited.
        assert_eq!(traffic.delivered(), [number]);
    }
    let stats = queue.stats();
    assert_fields!(stats, sent.sends: 50, sent.messages: 50, sent.flushes: 50, sent.largest_flush: 1);
}

async fn adaptive_sends_at_once_when_idle() {
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(FlushPolicy::adaptive(Duration::from_secs(1))));
    let traffic = Traffic::new(50);
    for expected in 0..50 {
        let packet = hold(&mut queue, &traffic, [expected]).await.remove(0);
        packet.accept().submit().unwrap();
        assert_eq!(traffic.delivered(), [expected], "within the call");
    }
}

async fn adaptive_gathers_under_load() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(1000);
    let packets = hold(&mut queue, &traffic, 0..1000).await;
    let before = queue.stats();
    for packet in packets {
        let verdict = if number(&packet).is_multiple_of(2) { packet.accept() } else { packet.drop() };
        verdict.submit().unwrap();
    }
    traffic.expect((0..1000).step_by(2)).await;
    let sends = queue.stats().sent.sends - before.sent.sends;
    assert!(sends < 500, "{sends} sends for a thousand verdicts");
}

async fn fixed_waits_for_its_batch() {
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(FlushPolicy::fixed(10, Duration::from_secs(1))));
    let traffic = Traffic::new(50);
    let packets = hold(&mut queue, &traffic, 0..15).await;
    let begun = Instant::now();
    let mut delivered = Vec::new();
    for packet in packets {
        packet.accept().submit().unwrap();
        delivered.push(traffic.delivered());
    }
    let flushes = queue.stats().sent.flushes;
    // After a second the timer thread sends what there is.
    if begun.elapsed() < Duration::from_secs(1) {
        let numbers: Vec<usize> = delivered.iter().map(Vec::len).collect();
        assert_eq!((numbers, flushes), (vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0], 1));
    }
    let delivered = delivered.concat();
    traffic.expect((0..15).filter(|number| !delivered.contains(number))).await;
}

async fn fixed_keeps_its_time_limit_when_nobody_polls() {
    cap_is_kept(FlushPolicy::fixed(1000, Duration::from_millis(2)), Duration::from_millis(2), 20).await;
}

async fn a_time_limit_below_a_millisecond_is_kept() {
    cap_is_kept(FlushPolicy::fixed(1000, Duration::from_micros(200)), Duration::from_micros(200), 20).await;
}

async fn a_time_limit_is_kept_repeatedly() {
    cap_is_kept(FlushPolicy::fixed(1000, Duration::from_micros(50)), Duration::from_micros(50), 200).await;
}

async fn cap_is_kept(policy: FlushPolicy, cap: Duration, rounds: u32) {
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(policy));
    let traffic = Traffic::new(1000);
    let packets = hold(&mut queue, &traffic, 0..rounds).await;
    for packet in packets {
        let number = number(&packet);
        let given = Instant::now();
        packet.accept().submit().unwrap();
        // Only the receiver is polled, not the queue.
        traffic.expect([number]).await;
        assert!(given.elapsed() >= cap, "not before");
    }
    assert_eq!(queue.stats().sent.flushes, u64::from(rounds));
}

/// Sends seven verdicts at a time, and records each context.
fn sevens(asked: Arc<Mutex<Vec<FlushContext>>>) -> FlushPolicy {
    FlushPolicy::custom(move |context| {
        asked.lock().unwrap().push(*context);
        match context.reason {
            _ if context.gathered == 7 => FlushDecision::Now,
            FlushReason::DelayOver => FlushDecision::Now,
            _ => FlushDecision::Within(Duration::from_millis(20)),
        }
    })
}

async fn a_custom_policy_is_asked_after_each_verdict() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(sevens(Arc::clone(&asked))));
    let traffic = Traffic::new(50);
    for packet in hold(&mut queue, &traffic, 0..17).await {
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..17).await;
    let asked = asked.lock().unwrap();
    // Not checked if the delay was over in between, on a slow machine: the policy was asked because
    // of that, or would have been if a verdict had not come first.
    let in_time =
        |context: &FlushContext| context.reason == FlushReason::Verdict && context.waited < Duration::from_millis(20);
    let by_verdicts = asked.iter().rposition(|context| context.reason == FlushReason::Verdict).unwrap() + 1;
    if asked[..by_verdicts].iter().all(in_time) {
        assert_eq!(by_verdicts, 17);
        for (index, gathered) in asked[..by_verdicts].iter().enumerate() {
            assert_fields!(gathered, gathered: index % 7 + 1, undecided: 16 - index);
        }
    }
    let due: Vec<_> = asked.iter().filter(|context| context.reason == FlushReason::DelayOver).collect();
    assert!(due.iter().all(|context| context.waited >= Duration::from_millis(20) && context.gathered > 0), "{due:?}");
    assert!(asked.iter().all(|context| context.gathered > 0), "never asked about nothing");
}

async fn clones_of_a_builder_have_separate_policies() {
    // Sends every third verdict, by counting.
    let mut count = 0;
    let policy = FlushPolicy::custom(move |context| {
        count += 1;
        match (count % 3, context.reason) {
            (0, _) | (_, FlushReason::DelayOver) => FlushDecision::Now,
            _ => FlushDecision::Within(Duration::from_secs(1)),
        }
    });
    let builder = Queue::builder(0).flush_policy(policy);
    for _ in 0..2 {
        let (mut queue, divert) = start(builder.clone());
        let traffic = Traffic::new(10);
        let packets = hold(&mut queue, &traffic, 0..2).await;
        let begun = Instant::now();
        packets.into_iter().for_each(|packet| packet.accept().submit().unwrap());
        let in_flight = queue.stats().held.in_flight;
        // The closure of the second clone has its own count. After a second both send.
        if begun.elapsed() < Duration::from_secs(1) {
            assert_eq!(in_flight, 2);
        }
        queue.close().await.unwrap();
        traffic.expect(0..2).await;
        support::drop_now(divert);
    }
}

async fn a_policy_that_always_waits_for_tasks_delays_no_verdict_for_ever() {
    always(FlushDecision::AfterReadyTasks).await;
}

async fn a_policy_that_always_delays_delays_no_verdict_for_ever() {
    always(FlushDecision::Within(Duration::from_micros(300))).await;
}

/// Such a policy keeps no verdict indefinitely, although it never returns `Now`.
async fn always(decision: FlushDecision) {
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(FlushPolicy::custom(move |_| decision)));
    let traffic = Traffic::new(50);
    let mut packets = hold(&mut queue, &traffic, 0..20).await;
    let owed = packets.pop().unwrap();
    for packet in packets {
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..19).await;
    owed.accept().submit().unwrap();
    traffic.expect([19]).await;
}

/// Panics for one reason, and delays otherwise.
fn panics(reason: FlushReason) -> FlushPolicy {
    FlushPolicy::custom(move |context| {
        if context.reason == reason {
            std::panic::resume_unwind(Box::new("as intended"));
        }
        FlushDecision::Within(Duration::from_micros(100))
    })
}

async fn verdicts_are_sent_after_a_policy_has_panicked() {
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(panics(FlushReason::Verdict)));
    let traffic = Traffic::new(50);
    let sink = queue.sink();
    for packet in hold(&mut queue, &traffic, 0..3).await {
        packet.accept().submit().unwrap();
    }
    // The verdicts were stored, and the default policy sends them.
    soon("the flush", sink.flush()).await;
    traffic.expect(0..3).await;
}

async fn verdicts_are_sent_after_a_policy_has_panicked_on_the_timer_thread() {
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(panics(FlushReason::DelayOver)));
    let traffic = Traffic::new(50);
    for packet in hold(&mut queue, &traffic, 0..3).await {
        packet.accept().submit().unwrap();
    }
    // The policy has panicked; verdicts are sent regardless.
    traffic.expect(0..3).await;
    for packet in hold(&mut queue, &traffic, 3..6).await {
        packet.accept().submit().unwrap();
    }
    traffic.expect(3..6).await;
    soon("the shutdown", queue.close()).await.unwrap();
}

async fn feed_gathers_and_flush_sends() {
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(patient()));
    let traffic = Traffic::new(50);
    let mut sink = queue.sink();
    for packet in hold(&mut queue, &traffic, 0..20).await {
        sink.feed(packet.accept()).await.unwrap();
    }
    soon("the flush", SinkExt::flush(&mut sink)).await.unwrap();
    assert_eq!(traffic.delivered().len(), 20);
    assert!(queue.stats().sent.flushes <= 3, "gathered: {:?}", queue.stats());
}

async fn sink_send_flushes_each_verdict() {
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(patient()));
    let traffic = Traffic::new(50);
    let mut sink = queue.sink();
    for packet in hold(&mut queue, &traffic, 0..20).await {
        let number = number(&packet);
        soon("the send", sink.send(packet.accept())).await.unwrap();
        assert_eq!(traffic.delivered(), [number]);
    }
    assert_eq!(queue.stats().sent.flushes, 20);
}

async fn a_stream_can_be_forwarded_into_a_sink() {
    let (queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(1000);
    let (packets, sink) = queue.split();
    let decide = |packet: tokio_nfqueue::Packet| {
        if number(&packet).is_multiple_of(2) { packet.accept() } else { packet.drop() }
    };
    let forwarding = tokio::spawn(packets.map_ok(decide).forward(sink.clone()));
    for portion in 0..10 {
        let numbers = portion * 100..(portion + 1) * 100;
        traffic.send(numbers.clone());
        traffic.expect(numbers.step_by(2)).await;
    }
    soon("the shutdown", sink.close()).await.unwrap();
    // The end of the stream completes the forward.
    soon("the forward's end", forwarding).await.unwrap().unwrap();
    assert_eq!((sink.stats().decided.accepted, sink.stats().decided.dropped), (500, 500));
}

async fn a_late_verdict_does_not_end_forward() {
    let deadline = Duration::from_millis(20);
    let (queue, _divert) = start(Queue::builder(0).deadline(deadline, tokio_nfqueue::Action::Drop));
    let traffic = Traffic::new(50);
    let (packets, sink) = queue.split();
    let verdicts = packets.and_then(|packet| async {
        if number(&packet) == 0 {
            common::eventually("the deadline", || packet.is_expired()).await;
        }
        Ok::<_, Error>(packet.accept())
    });
    let forwarding = tokio::spawn(verdicts.forward(sink.clone()));
    // On a slow machine, the deadline passes before some of these are handed out.
    let late = || {
        traffic.send([0]);
        sink.stats().decided.late > 0
    };
    common::eventually("a late verdict", late).await;
    // One of these is decided in time.
    let mut later = 1..;
    let passed = || {
        traffic.send(later.next());
        !traffic.delivered().is_empty()
    };
    common::eventually("a verdict in time", passed).await;
    assert!(!forwarding.is_finished());
    soon("the shutdown", sink.close()).await.unwrap();
    soon("the forward's end", forwarding).await.unwrap().unwrap();
}

async fn closing_one_sink_leaves_the_others_open() {
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(patient()));
    let traffic = Traffic::new(50);
    let mut packets = hold(&mut queue, &traffic, 0..5).await.into_iter();
    let (mut first, second) = (queue.sink(), queue.sink());
    first.feed(packets.next().unwrap().accept()).await.unwrap();
    soon("the close", SinkExt::close(&mut first)).await.unwrap();
    assert_eq!(traffic.delivered(), [0], "it flushes");
    assert!(!first.is_closed() && !second.is_closed(), "the queue is open");

    let error = first.feed(packets.next().unwrap().accept()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    let packet = packets.next().unwrap();
    let id = packet.id();
    let error = Pin::new(&mut first).start_send(packet.accept()).unwrap_err();
    assert_eq!((error.kind(), error.packet_id()), (ErrorKind::Closed, Some(id)));

    // Those two packets got the default action; the queue and its other sinks still work.
    soon("the reply", packets.next().unwrap().accept().confirm()).await.unwrap();
    traffic.expect([3]).await;
    assert!(account(0).is_some());
    traffic.send([5]);
    let packet = next(&mut queue).await;
    soon("the reply", packet.accept().confirm()).await.unwrap();
    traffic.expect([5]).await;
}

async fn flush_without_verdicts_is_ready() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(1);
    soon("the flush", queue.sink().flush()).await;
    let packet = hold(&mut queue, &traffic, [0]).await.remove(0);
    // A packet that is still undecided does not delay it.
    soon("the flush", queue.sink().flush()).await;
    assert_eq!(queue.stats().sent.sends, 0);
    drop(packet);
}
