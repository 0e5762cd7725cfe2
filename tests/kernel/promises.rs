//! The promises in unusual situations: refusals, lost replies, busy threads, runtimes that have
//! ended, and users' code that calls the queue.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::{Duration, Instant},
};

use futures::{FutureExt, Stream, StreamExt, TryStreamExt};
use rustix::{
    event::{PollFd, PollFlags, poll},
    thread::{CapabilitySet, capabilities, set_capabilities},
    time::Timespec,
};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_nfqueue::{
    Action, ErrorKind, FlushPolicy, NetworkNamespace, Packet, Queue, Reconfigure, Stats, TryRecvError,
    flush::FlushDecision,
};

use crate::{
    common::{
        self, DEADLINE, Divert, Hook, PATIENCE, Protocol, Rule, Traffic, account, eventually, freed,
        give_up_capabilities, hold, next, number, soon, start,
    },
    faults::process::in_a_process,
    support,
};

tests![
    multi large_packets_are_decided_while_eight_threads_change_the_copy_range,
    both reconfigure_works_with_a_full_receive_buffer,
    multi a_refused_drop_never_becomes_an_accept,
    one a_briefly_missing_capability_leaves_no_packet_undecided,
    sync a_packet_refused_after_the_runtime_has_ended_gets_the_default_action,
    one the_shutdown_continues_when_the_last_thread_has_no_capability,
    one refusals_do_not_end_a_program_that_uses_the_question_mark,
    one a_datagram_longer_than_the_send_buffer_is_split,
    sync close_returns_when_the_runtime_of_the_queue_ends_meanwhile,
    sync close_returns_when_the_runtime_of_the_queue_is_not_driven,
    sync close_returns_after_the_runtime_has_ended_and_the_stream_was_dropped,
    both close_within_shortens_the_time_out_of_close,
    sync the_time_limit_holds_while_the_only_task_is_busy,
    both a_delay_of_a_custom_policy_is_never_lost,
    sync verdicts_drops_and_deadlines_take_effect_outside_block_on,
    both gone_packets_are_counted_exactly,
    both the_statistics_add_up,
    one the_default_receive_buffer_holds_a_full_queue,
    one one_held_packet_of_a_hundred_keeps_one_small_buffer,
    one unreadable_kernel_counters_name_the_capability,
    sync wakers_may_call_the_queue,
    one subscribers_may_call_the_queue,
    both a_policy_may_call_the_queue,
    one a_panicking_policy_loses_no_verdict,
    one messages_of_other_processes_are_not_received,
    both the_longest_durations_do_not_panic,
    one a_default_action_that_requeues_for_ever_is_refused,
    one bind_works_while_the_last_owner_closes,
    one already_bound_names_this_process,
    sync a_runtime_without_an_io_driver_is_an_error,
    one each_poll_of_confirm_receives_few_packets,
    one each_poll_of_reconfigure_receives_few_packets,
    sync try_recv_works_without_a_runtime,
    sync readable_fd_reports_every_packet,
    sync events_have_their_documented_names,
];

/// Runs `body` while the calling thread has no capability in effect.
fn without_capabilities<T>(body: impl FnOnce() -> T) -> T {
    let held = capabilities(None).unwrap();
    let mut none = held;
    none.effective = CapabilitySet::empty();
    set_capabilities(None, none).unwrap();
    let result = body();
    set_capabilities(None, held).unwrap();
    result
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn adds_up(stats: &Stats) {
    let taken = stats.decided.accepted + stats.decided.dropped + stats.decided.repeated + stats.decided.requeued;
    let sum = taken + stats.sent.refused + stats.sent.gone_at_least + stats.held.in_flight as u64;
    assert_eq!(stats.received.packets, sum, "{stats:?}");
}

const LARGE: usize = 4000;

async fn large_packets_are_decided_while_eight_threads_change_the_copy_range() {
    const ROUNDS: u32 = 60;
    let (queue, _divert) = start(Queue::builder(0).copy_range(100));
    let traffic = Traffic::new(1);
    let sink = queue.sink();
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..8)
        .map(|thread| {
            let (sink, stop) = (sink.clone(), Arc::clone(&stop));
            thread::spawn(move || {
                let mut range = 50 + thread;
                while !stop.load(SeqCst) {
                    range = if range > 30_000 { 50 + thread } else { range * 3 };
                    let change = Reconfigure::new().copy_range(range);
                    match futures::executor::block_on(sink.reconfigure(&change)) {
                        Ok(()) => {}
                        Err(error) => assert_eq!(error.kind(), ErrorKind::Unconfirmed, "{error}"),
                    }
                }
            })
        })
        .collect();
    // Large packets are dropped, small ones are accepted.
    let mut packets = queue;
    let deciding = tokio::spawn(async move {
        while let Some(packet) = packets.try_next().await? {
            let large = packet.original_len().is_some_and(|length| length > LARGE);
            if large { packet.drop() } else { packet.accept() }.submit()?;
        }
        Ok::<_, tokio_nfqueue::Error>(())
    });
    let mut delivered = Vec::new();
    for round in 0..ROUNDS {
        for _ in 0..10 {
            traffic.sender.send_to(&[7; LARGE + 10], traffic.to(0)).unwrap();
            traffic.send([round]);
        }
        let all = (round as usize + 1) * 10;
        eventually("all small ones are delivered", || {
            delivered.extend(traffic.delivered());
            delivered.len() >= all
        })
        .await;
    }
    stop.store(true, SeqCst);
    eventually("the threads end", || threads.iter().all(thread::JoinHandle::is_finished)).await;
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    eventually("nothing is stuck", || account(0).unwrap().waiting == 0).await;
    assert!(delivered.iter().all(|number| *number < ROUNDS), "a large one was delivered");
    assert_eq!(delivered.len(), ROUNDS as usize * 10);
    let stats = sink.stats();
    assert_fields!(stats, received.malformed: 0, decided.dropped: u64::from(ROUNDS) * 10, held.in_flight: 0);
    soon("the shutdown", sink.close()).await.unwrap();
    soon("the task", deciding).await.unwrap().unwrap();
}

async fn reconfigure_works_with_a_full_receive_buffer() {
    // About 30 small packets fill it.
    let (mut queue, _divert) = start(Queue::builder(0).copy_range(100).receive_buffer(30_000).max_len(1000));
    let traffic = Traffic::new(100);
    traffic.send(0..100);
    eventually("the buffer is full", || account(0).unwrap().socket_full > 0).await;
    soon("the reply", queue.sink().reconfigure(&Reconfigure::new().copy_range(65_531))).await.unwrap();
    soon("the reply", queue.sink().reconfigure(&Reconfigure::new().max_len(500))).await.unwrap();
    let held = account(0).unwrap().waiting;
    let mut packets = Vec::new();
    for _ in 0..held {
        packets.push(next(&mut queue).await);
    }
    // A large packet is received completely.
    traffic.sender.send_to(&[7; 20_000], traffic.to(0)).unwrap();
    let large = next(&mut queue).await;
    assert_eq!(large.payload().len(), 20_028);
    drop(large);
    let expected: Vec<u32> = packets.iter().map(number).collect();
    for packet in packets {
        packet.accept().submit().unwrap();
    }
    traffic.expect(expected).await;
    assert_eq!((queue.stats().received.malformed, account(0).unwrap().waiting), (0, 0));
}

async fn a_refused_drop_never_becomes_an_accept() {
    const COUNT: u32 = 500;
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(FlushPolicy::immediate()));
    let traffic = Traffic::new(2 * COUNT);
    let mut packets = hold(&mut queue, &traffic, 0..2 * COUNT).await;
    let odd: Vec<Packet> = packets.extract_if(.., |packet| number(packet) % 2 == 1).collect();
    let sink = queue.sink();
    // A thread without the capability drops every second packet, first alone and then while this
    // thread accepts the others.
    let half_done = Arc::new(AtomicBool::new(false));
    let dropping = thread::spawn({
        let half_done = Arc::clone(&half_done);
        move || {
            give_up_capabilities();
            for (index, packet) in odd.into_iter().enumerate() {
                packet.drop().submit().unwrap();
                half_done.fetch_or(index as u32 > COUNT / 2, SeqCst);
            }
        }
    });
    support::wait_until("half of them are dropped", || half_done.load(SeqCst));
    for packet in packets {
        packet.accept().submit().unwrap();
        tokio::task::yield_now().await;
    }
    eventually("the thread's end", || dropping.is_finished()).await;
    dropping.join().unwrap();
    eventually("every packet is decided", || account(0).unwrap().waiting == 0).await;
    let delivered = traffic.delivered();
    assert!(delivered.iter().all(|number| number % 2 == 0), "a dropped one was delivered: {delivered:?}");
    let stats = sink.stats();
    adds_up(&stats);
    assert_eq!(stats.held.in_flight, 0);
    // Each refusal is reported with its packet. A verdict that another thread has sent was not
    // refused.
    let mut refusals = sink.refusals();
    let reported = std::iter::from_fn(|| refusals.recv().now_or_never().flatten());
    let reported =
        reported.filter(|error| error.kind() == ErrorKind::NotPermitted && error.packet_id().is_some()).count();
    assert_eq!((reported as u64, stats.sent.refusals_unread), (stats.sent.refusals, 0));
    assert!(stats.sent.refusals > 0, "{stats:?}");
    assert_eq!(stats.decided.dropped + stats.decided.accepted, u64::from(2 * COUNT), "{stats:?}");
    // The queue still works, with batches.
    for packet in hold(&mut queue, &traffic, 0..50).await {
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..50).await;
}

async fn a_briefly_missing_capability_leaves_no_packet_undecided() {
    // With this policy this thread sends, not the timer thread.
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(FlushPolicy::immediate()));
    let traffic = Traffic::new(100);
    let mut refusals = queue.sink().refusals();
    for round in 0..20 {
        let mut packets = hold(&mut queue, &traffic, 3 * round..3 * round + 3).await;
        let (last, middle, first) = (packets.remove(2), packets.remove(1), packets.remove(0));
        let id = middle.id();
        without_capabilities(|| middle.accept().submit().unwrap());
        first.accept().submit().unwrap();
        last.accept().submit().unwrap();
        soon("the flush", queue.sink().flush()).await;
        let error = soon("the refusal", refusals.recv()).await.unwrap();
        assert_eq!((error.kind(), error.packet_id()), (ErrorKind::NotPermitted, Some(id)));
        // The refused packet got the default action.
        traffic.expect([3 * round, 3 * round + 2]).await;
        eventually("nothing is left", || account(0).unwrap().waiting == 0).await;
    }
    let stats = queue.stats();
    adds_up(&stats);
    assert_fields!(stats, sent.refusals: 20, decided.accepted: 40, decided.dropped: 20, held.in_flight: 0);
}

fn a_packet_refused_after_the_runtime_has_ended_gets_the_default_action() {
    let (inside, outside) = (runtime(), runtime());
    let traffic = outside.block_on(async { Traffic::new(1) });
    let (mut queue, _divert) = inside.block_on(async { start(Queue::builder(0).on_unanswered(Action::Accept)) });
    let packet = inside.block_on(hold(&mut queue, &traffic, [0])).remove(0);
    drop(inside);
    // No task can send the default action any more, and no other verdict is submitted.
    thread::spawn(|| without_capabilities(|| packet.drop().submit())).join().unwrap().unwrap();
    assert_eq!(queue.stats().sent.refusals, 1);
    outside.block_on(traffic.expect([0]));
    assert_eq!(queue.stats().held.in_flight, 0);
}

async fn the_shutdown_continues_when_the_last_thread_has_no_capability() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(20);
    let mut packets = hold(&mut queue, &traffic, 0..10).await;
    let sink = queue.sink();
    let last = packets.split_off(5);
    // A thread without the capability drops the stream, and another one drops the last packets.
    thread::spawn(move || without_capabilities(|| drop(queue))).join().unwrap();
    for packet in packets {
        packet.accept().submit().unwrap();
    }
    // This thread has the capability. A thread that flushes also sends the verdicts of others, or
    // gets them refused.
    soon("the flush", sink.flush()).await;
    traffic.send(10..20);
    thread::spawn(move || without_capabilities(|| drop(last))).join().unwrap();
    // The sink keeps the socket open, so the queue is not unbound by closing the socket.
    freed(0).await;
    assert!(sink.is_closed());
    assert_eq!(sink.stats().held.in_flight, 0);
    adds_up(&sink.stats());
    traffic.expect(0..5).await;
}

async fn refusals_do_not_end_a_program_that_uses_the_question_mark() {
    async fn program(mut queue: Queue) -> Result<u32, tokio_nfqueue::Error> {
        let sink = queue.sink();
        let mut seen = 0;
        while let Some(packet) = queue.try_next().await? {
            seen += 1;
            match seen % 4 {
                0 => without_capabilities(|| packet.accept().submit().inspect(|()| sink.flush_now()))?,
                1 => {
                    // After the deadline.
                    let id = packet.id();
                    eventually("the deadline", || packet.is_expired()).await;
                    assert_eq!(packet.id(), id);
                    packet.accept().submit()?;
                }
                2 => drop(packet),
                _ => packet.accept().submit()?,
            }
            sink.flush().await;
            sink.reconfigure(&Reconfigure::new().max_len(100 + seen)).await?;
            // A thread that is stopped finds packets expired, and then none is refused.
            if seen == 400 || seen >= 40 && sink.stats().sent.refusals > 0 {
                queue.close().await?;
                return Ok(seen);
            }
        }
        Ok(0)
    }
    let (queue, _divert) = start(Queue::builder(0).deadline(Duration::from_millis(5), Action::Drop));
    let traffic = Traffic::new(1);
    let sink = queue.sink();
    let running = program(queue);
    let mut running = std::pin::pin!(running);
    loop {
        traffic.send([0]);
        match tokio::time::timeout(Duration::from_millis(2), &mut running).await {
            Ok(result) => break assert!(result.unwrap() >= 40),
            Err(_) => traffic.delivered(),
        };
    }
    assert!(sink.stats().decided.late >= 10 && sink.stats().sent.refusals >= 1, "{:?}", sink.stats());
}

/// Sets the send buffers of all netfilter sockets of this network namespace.
fn send_buffers(bytes: usize) {
    let table = std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
    // sk, Eth (12: netfilter), ..., inode
    let rows = table.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let links: Vec<String> = rows
        .filter(|fields| fields.get(1) == Some(&"12"))
        .map(|fields| format!("socket:[{}]", fields.last().unwrap()))
        .collect();
    let mut changed = 0;
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        let is_one = std::fs::read_link(&path).is_ok_and(|link| links.contains(&link.display().to_string()));
        if is_one {
            let number: i32 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            let own =
                rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty()).unwrap();
            let copy = rustix::process::pidfd_getfd(own, number, rustix::process::PidfdGetfdFlags::empty()).unwrap();
            rustix::net::sockopt::set_socket_send_buffer_size(copy, bytes).unwrap();
            changed += 1;
        }
    }
    assert!(changed > 0, "the queue's socket was found");
}

async fn a_datagram_longer_than_the_send_buffer_is_split() {
    let policy = FlushPolicy::fixed(1000, Duration::from_secs(1));
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(policy));
    let traffic = Traffic::new(600);
    let packets = hold(&mut queue, &traffic, 0..600).await;
    // The kernel sets it to 4608; 600 plain verdicts take 19 200 bytes.
    send_buffers(1);
    let mut refusals = queue.sink().refusals();
    let mut long = None;
    for packet in packets {
        match number(&packet) {
            // A message that is too long even alone.
            300 => {
                long = Some(packet.id());
                let payload = packet.payload().to_vec();
                let payload = [&payload[..], &[0; 8000]].concat();
                packet.accept().payload(payload).submit().unwrap();
            }
            number if number % 3 == 0 => packet.drop().submit().unwrap(),
            _ => packet.accept().submit().unwrap(),
        }
    }
    soon("the flush", queue.sink().flush()).await;
    traffic.expect((0..600).filter(|number| number % 3 != 0)).await;
    let error = soon("the refusal", refusals.recv()).await.unwrap();
    assert_eq!((error.kind(), error.packet_id()), (ErrorKind::InvalidInput, long), "{error}");
    soon("the flush", queue.sink().flush()).await;
    eventually("nothing is left", || account(0).unwrap().waiting == 0).await;
    let stats = queue.stats();
    adds_up(&stats);
    assert_fields!(stats, decided.accepted: 400, decided.dropped: 200, sent.refusals: 1);
    // Batches are sent again.
    let before = queue.stats().sent.messages;
    for packet in hold(&mut queue, &traffic, 0..50).await {
        packet.accept().submit().unwrap();
    }
    soon("the flush", queue.sink().flush()).await;
    assert!(queue.stats().sent.messages - before < 50, "{:?}", queue.stats());
    traffic.expect(0..50).await;
}

/// A queue that was bound in `inside`, with ten held packets.
fn held_in(inside: &Runtime, outside: &Runtime, timeout: Duration) -> (Queue, Divert, Vec<Packet>, Traffic) {
    let traffic = outside.block_on(async { Traffic::new(10) });
    let (mut queue, divert) = inside.block_on(async { start(Queue::builder(0).close_timeout(timeout)) });
    let packets = inside.block_on(hold(&mut queue, &traffic, 0..10));
    (queue, divert, packets, traffic)
}

const SHORT: Duration = Duration::from_millis(50);

fn close_returns_when_the_runtime_of_the_queue_ends_meanwhile() {
    let (inside, outside) = (runtime(), runtime());
    let (queue, divert, packets, _traffic) = held_in(&inside, &outside, SHORT);
    let sink = queue.sink();
    let closing = thread::spawn(move || futures::executor::block_on(sink.close()));
    support::wait_until("the drain has begun", || queue.sink().is_closed());
    drop(inside);
    support::wait_until("close ends", || closing.is_finished());
    assert_eq!(closing.join().unwrap().unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(account(0), None);
    drop((packets, queue, divert));
}

fn close_returns_when_the_runtime_of_the_queue_is_not_driven() {
    let (inside, outside) = (runtime(), runtime());
    let (queue, divert, packets, _traffic) = held_in(&inside, &outside, SHORT);
    let error = outside.block_on(soon("close", queue.close())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert_eq!(account(0), None);
    drop((packets, divert, inside));
}

fn close_returns_after_the_runtime_has_ended_and_the_stream_was_dropped() {
    let (inside, outside) = (runtime(), runtime());
    let (queue, divert, packets, traffic) = held_in(&inside, &outside, SHORT);
    let (stream, sink) = queue.split();
    drop(inside);
    drop(stream);
    let error = outside.block_on(soon("close", sink.close())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert_eq!(account(0), None);
    drop(packets);
    traffic.expect_nothing();
    drop(divert);
}

async fn close_within_shortens_the_time_out_of_close() {
    let (mut queue, _divert) = start(Queue::builder(0).on_unanswered(Action::Accept).close_timeout(Duration::MAX));
    let traffic = Traffic::new(10);
    let packets = hold(&mut queue, &traffic, 0..10).await;
    let sink = queue.sink();
    let patient = tokio::spawn(queue.close());
    eventually("the shutdown has begun", || sink.is_closed()).await;
    let hurried = soon("the shutdown", sink.close_within(Duration::ZERO)).await;
    let patient = soon("the shutdown", patient).await.unwrap();
    // Only the first caller gets the error.
    let errors: Vec<_> = [hurried, patient].into_iter().filter_map(Result::err).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert_eq!(errors[0].kind(), ErrorKind::TimedOut);
    assert_eq!(account(0), None);
    traffic.expect(0..10).await;
    drop(packets);
}

fn the_time_limit_holds_while_the_only_task_is_busy() {
    let runtime = Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    let traffic = runtime.block_on(async { Traffic::new(30) });
    let (mut queue, _divert) = runtime.block_on(async { start(Queue::builder(0)) });
    let traffic = Arc::new(traffic);
    let task = runtime.spawn({
        let traffic = Arc::clone(&traffic);
        async move {
            let packets = hold(&mut queue, &traffic, 0..30).await;
            for packet in packets {
                let number = number(&packet);
                packet.accept().submit().unwrap();
                // Busy without an `await` until the verdict has taken effect.
                support::wait_until("the verdict takes effect", || traffic.delivered() == [number]);
            }
            queue
        }
    });
    let queue = runtime.block_on(soon("the task", task)).unwrap();
    assert_eq!(queue.stats().decided.accepted, 30);
}

async fn a_delay_of_a_custom_policy_is_never_lost() {
    let five = FlushPolicy::custom(|_| FlushDecision::Within(Duration::from_millis(5)));
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(five));
    let traffic = Traffic::new(100);
    for number in 0..60 {
        let packet = hold(&mut queue, &traffic, [number]).await.remove(0);
        packet.accept().submit().unwrap();
        if number % 3 == 0 {
            // A flush leaves a timer for which nothing is due.
            soon("the flush", queue.sink().flush()).await;
        }
        traffic.expect([number]).await;
    }
}

fn verdicts_drops_and_deadlines_take_effect_outside_block_on() {
    let (inside, outside) = (runtime(), runtime());
    let traffic = outside.block_on(async { Traffic::new(10) });
    let builder = Queue::builder(0).on_unanswered(Action::Accept).deadline(DEADLINE, Action::Accept);
    let (mut queue, _divert) = inside.block_on(async { start(builder) });
    let mut packets = inside.block_on(hold(&mut queue, &traffic, 0..6));
    // From here on no thread drives the runtime.
    packets.remove(0).accept().submit().unwrap();
    outside.block_on(traffic.expect([0]));
    drop(packets.remove(0));
    outside.block_on(traffic.expect([1]));
    packets.remove(0).drop().submit().unwrap();
    // Deadlines of held and of unread packets.
    traffic.send([6, 7]);
    outside.block_on(traffic.expect([3, 4, 5, 6, 7]));
    assert_eq!((queue.stats().decided.expired, queue.stats().decided.dropped), (5, 1));
}

async fn gone_packets_are_counted_exactly() {
    let (mut queue, _divert) = start(Queue::builder(0));
    // Of another program: a base chain at the same hook.
    let other = Divert::builder()
        .rule(Rule::new(Hook::Input).protocol(Protocol::Tcp).destination_port(1).to_queue(99))
        .priority(10)
        .install()
        .unwrap();
    let traffic = Traffic::new(20);
    let mut packets = hold(&mut queue, &traffic, 0..10).await;
    drop(other);
    eventually("the kernel has dropped them", || account(0).unwrap().waiting == 0).await;
    packets.append(&mut hold(&mut queue, &traffic, 10..12).await);
    for packet in packets {
        packet.accept().submit().unwrap();
    }
    soon("the flush", queue.sink().flush()).await;
    traffic.expect([10, 11]).await;
    eventually("the replies are read", || {
        queue.recv().now_or_never().is_none() && queue.stats().sent.gone_at_least == 10
    })
    .await;
    let stats = queue.stats();
    adds_up(&stats);
    assert_fields!(stats, received.packets: 12, decided.accepted: 2, sent.gone_at_least: 10, held.in_flight: 0);
}

async fn the_statistics_add_up() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(200);
    let sink = queue.sink();
    for (index, packet) in hold(&mut queue, &traffic, 0..60).await.into_iter().enumerate() {
        adds_up(&sink.stats());
        match index % 6 {
            0 => packet.accept().submit().unwrap(),
            1 => packet.drop().submit().unwrap(),
            2 => drop(packet),
            3 => packet.requeue(9).submit().unwrap(),
            4 => soon("the reply", packet.stop().confirm()).await.unwrap(),
            _ => packet.accept().mark(3).submit().unwrap(),
        }
    }
    soon("the flush", sink.flush()).await;
    let stats = sink.stats();
    adds_up(&stats);
    assert_fields!(stats, decided.accepted: 30, decided.dropped: 20, decided.requeued: 10, held.in_flight: 0);
}

async fn the_default_receive_buffer_holds_a_full_queue() {
    if common::outer_id("uid_map") != 0 {
        eprintln!("skipped: the system limits the receive buffer");
        return;
    }
    // Datagrams that arrive in fragments take the most memory in the kernel.
    let peer = support::veth();
    let sender = peer.run(|| support::udp((peer.far_v4, 0)));
    for (range, length) in [(2000, 2500), (16_000, 16_500), (65_531, 40_000)] {
        let (queue, divert) = start(Queue::builder(0).copy_range(range).max_len(256));
        let datagram = vec![7; length];
        for sent in 0..256_u64 {
            sender.send_to(&datagram, (peer.near_v4, 9000)).unwrap();
            eventually("it is queued", || account(0).unwrap().last_id > sent).await;
        }
        let account = account(0).unwrap();
        assert_eq!((account.waiting, account.socket_full, account.queue_full), (256, 0, 0), "copy range {range}");
        drop((queue, divert));
        freed(0).await;
    }
}

async fn one_held_packet_of_a_hundred_keeps_one_small_buffer() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(2000);
    let mut held = Vec::new();
    for round in 0..20 {
        let mut packets = hold(&mut queue, &traffic, 100 * round..100 * round + 100).await;
        held.push(packets.remove(50));
        packets.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    }
    soon("the flush", queue.sink().flush()).await;
    let stats = queue.stats();
    assert_eq!(stats.held.in_flight, 20);
    assert!((8 * 1024..=20 * 8 * 1024).contains(&stats.held.bytes), "{} bytes", stats.held.bytes);
}

async fn unreadable_kernel_counters_name_the_capability() {
    // In a separate thread: root changes to another user and keeps one capability.
    let runtime = Handle::current();
    let result = thread::spawn(move || {
        use rustix::thread::{Gid, Uid, set_keep_capabilities, set_thread_res_gid, set_thread_res_uid};
        let (user, group) = (Uid::from_raw(65_534), Gid::from_raw(65_534));
        set_keep_capabilities(true).unwrap();
        if set_thread_res_gid(group, group, group).is_err() || set_thread_res_uid(user, user, user).is_err() {
            return None;
        }
        let mut sets = capabilities(None).unwrap();
        sets.permitted = CapabilitySet::NET_ADMIN;
        sets.effective = CapabilitySet::NET_ADMIN;
        sets.inheritable = CapabilitySet::empty();
        set_capabilities(None, sets).unwrap();
        let _entered = runtime.enter();
        let queue = common::bind_now(Queue::builder(0));
        Some((queue.sink().kernel_stats().unwrap_err(), queue.sink().advice()))
    });
    eventually("the thread's end", || result.is_finished()).await;
    let Some((error, advice)) = result.join().unwrap() else {
        eprintln!("skipped: no other user can be had here");
        return;
    };
    assert_eq!(error.kind(), ErrorKind::NotPermitted);
    let text = error.to_string();
    assert!(text.contains("/proc/net/netfilter/nfnetlink_queue") && text.contains("CAP_DAC_READ_SEARCH"), "{text}");
    assert_eq!(advice.len(), 1);
    assert!(advice[0].to_string().contains("CAP_DAC_READ_SEARCH"), "{}", advice[0]);
}

/// A waker that calls the queue.
struct Looks {
    sink: tokio_nfqueue::VerdictSink,
    woken: AtomicUsize,
}

impl Wake for Looks {
    fn wake(self: Arc<Self>) {
        let _ = self.sink.stats();
        let _ = self.sink.is_closed();
        self.woken.fetch_add(1, SeqCst);
    }
}

fn wakers_may_call_the_queue() {
    let (inside, outside) = (runtime(), runtime());
    let traffic = outside.block_on(async { Traffic::new(10) });
    let immediate = FlushPolicy::immediate();
    let (mut queue, _divert) = inside.block_on(async { start(Queue::builder(0).flush_policy(immediate)) });
    let mut packets = inside.block_on(hold(&mut queue, &traffic, 0..5));
    let looks = Arc::new(Looks { sink: queue.sink(), woken: AtomicUsize::new(0) });
    let waker = Waker::from(Arc::clone(&looks));
    let mut cx = Context::from_waker(&waker);

    // A waiting stream, a confirmation, a refusal and the shutdown.
    let _entered = inside.enter();
    assert!(matches!(std::pin::Pin::new(&mut queue).poll_next(&mut cx), Poll::Pending));
    let mut confirm = packets.remove(0).accept().confirm();
    let sink = queue.sink();
    let mut refusals = sink.refusals();
    assert!(refusals.poll_next_unpin(&mut cx).is_pending());
    without_capabilities(|| packets.remove(0).accept().submit().unwrap());
    outside.block_on(async {
        soon("the reply", &mut confirm).await.unwrap();
        soon("the refusal", refusals.recv()).await.unwrap();
    });
    let mut close = Box::pin(sink.close_within(PATIENCE));
    assert!(close.as_mut().poll_unpin(&mut cx).is_pending());
    drop(packets);
    outside.block_on(soon("the shutdown", close)).unwrap();
    support::wait_until("the wakers have been called", || looks.woken.load(SeqCst) >= 2);
}

/// A subscriber that calls the queue for each event, and records the names of events.
struct Subscriber {
    sink: Arc<Mutex<Option<tokio_nfqueue::VerdictSink>>>,
    events: Arc<Mutex<Vec<String>>>,
}

impl tracing::Subscriber for Subscriber {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "tokio_nfqueue"
    }

    fn new_span(&self, attributes: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        self.note(attributes.metadata().name().to_owned());
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        struct Message(String);
        impl tracing::field::Visit for Message {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    self.0 = format!("{value:?}");
                }
            }
        }
        let mut message = Message(String::new());
        event.record(&mut message);
        self.note(message.0);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

impl Subscriber {
    fn note(&self, text: String) {
        let sink = self.sink.lock().unwrap().clone();
        if let Some(sink) = sink {
            let _ = sink.stats();
            let _ = sink.is_closed();
        }
        self.events.lock().unwrap().push(text);
    }
}

/// Records the names of events and spans of this thread, until the guard is dropped.
pub(crate) fn record_events() -> (Arc<Mutex<Vec<String>>>, tracing::subscriber::DefaultGuard) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let subscriber = Subscriber { sink: Arc::default(), events: Arc::clone(&events) };
    (events, tracing::subscriber::set_default(subscriber))
}

/// Records the names of events and spans of all threads of this process, until it ends.
pub(crate) fn record_all_events() -> Arc<Mutex<Vec<String>>> {
    let events = Arc::new(Mutex::new(Vec::new()));
    let subscriber = Subscriber { sink: Arc::default(), events: Arc::clone(&events) };
    tracing::subscriber::set_global_default(subscriber).unwrap();
    events
}

async fn subscribers_may_call_the_queue() {
    let sink = Arc::new(Mutex::new(None));
    let subscriber = Subscriber { sink: Arc::clone(&sink), events: Arc::default() };
    let _default = tracing::subscriber::set_default(subscriber);
    cause_events(&sink).await;
}

/// In a process of its own: any thread may read the kernel's reply, and reports it then.
fn events_have_their_documented_names() {
    in_a_process(EVENTS);
}

/// The mode of that process.
pub(crate) const EVENTS: &str = "documented events";

pub(crate) async fn documented_events() {
    let (events, began) = (record_all_events(), Instant::now());
    cause_events(&Mutex::new(None)).await;
    for name in [
        "nfqueue",
        "bound",
        "reconfigured",
        "default action",
        "verdict refused",
        "capability missing",
        "verdict too late",
        "closing",
        "closed",
    ] {
        eventually(name, || events.lock().unwrap().iter().any(|event| event == name)).await;
    }
    // Frequent events are reported once a second.
    let events = events.lock().unwrap().clone();
    let reported = events.iter().filter(|event| *event == "default action").count() as u64;
    assert!(reported <= 2 + began.elapsed().as_secs(), "{events:?}");
}

async fn cause_events(sink: &Mutex<Option<tokio_nfqueue::VerdictSink>>) {
    // Longer than the steps before it take, also if this thread is stopped.
    let builder = Queue::builder(0).deadline(Duration::from_secs(5 + support::SLOWNESS), Action::Drop);
    let (mut queue, _divert) = start(builder.flush_policy(FlushPolicy::immediate()));
    *sink.lock().unwrap() = Some(queue.sink());
    let traffic = Traffic::new(100);
    let mut packets = hold(&mut queue, &traffic, 0..100).await;
    soon("the reply", queue.sink().reconfigure(&Reconfigure::new().max_len(77))).await.unwrap();
    let late = packets.remove(0);
    without_capabilities(|| packets.remove(0).accept().submit().unwrap());
    // The kernel's reply to the one before is read by then.
    soon("the reply", packets.remove(0).accept().confirm()).await.unwrap();
    drop(packets);
    let verdicts = queue.sink();
    eventually("the deadline", || late.is_expired()).await;
    late.accept().submit().unwrap();
    soon("the shutdown", queue.close()).await.unwrap();
    assert_eq!(verdicts.stats().held.in_flight, 0);
    *sink.lock().unwrap() = None;
}

async fn a_policy_may_call_the_queue() {
    let sink = Arc::new(Mutex::new(None::<tokio_nfqueue::VerdictSink>));
    let others = Arc::new(Mutex::new(Vec::<Packet>::new()));
    let (sink_of_policy, others_of_policy) = (Arc::clone(&sink), Arc::clone(&others));
    let policy = FlushPolicy::custom(move |_| {
        if let Some(sink) = &*sink_of_policy.lock().unwrap() {
            let _ = sink.stats();
        }
        let another = others_of_policy.lock().unwrap().pop();
        if let Some(packet) = another {
            packet.accept().submit().unwrap();
        }
        FlushDecision::Within(Duration::from_millis(1))
    });
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(policy));
    let traffic = Traffic::new(40);
    *sink.lock().unwrap() = Some(queue.sink());
    let mut packets = hold(&mut queue, &traffic, 0..40).await;
    others.lock().unwrap().extend(packets.split_off(20));
    for packet in packets {
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..40).await;
    *sink.lock().unwrap() = None;
}

async fn a_panicking_policy_loses_no_verdict() {
    let panics = FlushPolicy::custom(|_| std::panic::resume_unwind(Box::new("as intended")));
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(panics));
    let traffic = Traffic::new(20);
    let packets = hold(&mut queue, &traffic, 0..20).await;
    // The task holds other packets, which would be dropped by unwinding.
    let result = catch_unwind(AssertUnwindSafe(|| {
        for packet in packets {
            packet.accept().submit().unwrap();
        }
    }));
    assert!(result.is_ok(), "the panic stays with the policy");
    traffic.expect(0..20).await;
}

async fn messages_of_other_processes_are_not_received() {
    let (mut queue, _divert) = start(Queue::builder(7));
    let traffic = Traffic::new(10);
    let port = queue.sink().kernel_stats().unwrap().port_id;
    let mut forger = netlink_sys::Socket::new(netlink_sys::protocols::NETLINK_NETFILTER).unwrap();
    forger.bind_auto().unwrap();
    // A packet message with id 1, and an EPERM reply to the first message.
    let packet: &[u8] =
        &[32, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 7, 11, 0, 1, 0, 0, 0, 0, 1, 8, 0, 1, 0];
    let reply: &[u8] = &[
        36, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 16, 0, 0, 0, 1, 3, 1, 0, 1, 0, 0, 0, 0, 0,
        0, 0,
    ];
    for message in [packet, reply] {
        let error = forger.send_to(message, &netlink_sys::SocketAddr::new(port, 0), 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
    }
    for packet in hold(&mut queue, &traffic, 0..5).await {
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..5).await;
    assert_eq!((queue.stats().received.packets, queue.stats().sent.refusals), (5, 0));
}

async fn the_longest_durations_do_not_panic() {
    let builder = Queue::builder(0).deadline(Duration::MAX, Action::Accept).close_timeout(Duration::MAX);
    let (mut queue, _divert) = start(builder);
    let traffic = Traffic::new(10);
    let packets = hold(&mut queue, &traffic, 0..5).await;
    for packet in packets {
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..5).await;
    soon("the shutdown", queue.close()).await.unwrap();
}

async fn a_default_action_that_requeues_for_ever_is_refused() {
    let own = Action::Requeue { queue: 5, bypass: true };
    for (builder, name) in [
        (Queue::builder(5).on_unanswered(own), "on_unanswered"),
        (Queue::builder(5).deadline(Duration::from_secs(1), own), "deadline"),
    ] {
        let error = builder.bind().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains(name) && error.to_string().contains("same queue"), "{error}");
    }
    let queue = Queue::builder(5).on_unanswered(Action::Requeue { queue: 6, bypass: true }).bind().await.unwrap();
    let error = soon("the reply", queue.sink().close_with(own)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(!queue.sink().is_closed());
}

async fn bind_works_while_the_last_owner_closes() {
    // The error must not be `NotPermitted`.
    let namespace = NetworkNamespace::current().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let other = thread::spawn({
        let stop = Arc::clone(&stop);
        let namespace = support::Namespace::current();
        move || {
            namespace.run(|| {
                while !stop.load(SeqCst) {
                    drop(support::RawQueue::bind(0));
                }
            });
        }
    });
    for _ in 0..300 {
        match Queue::builder(0).namespace(namespace.clone()).bind().await {
            Ok(queue) => drop(queue),
            Err(error) => assert_eq!(error.kind(), ErrorKind::AlreadyBound, "{error}"),
        }
    }
    stop.store(true, SeqCst);
    eventually("the thread's end", || other.is_finished()).await;
    other.join().unwrap();
}

async fn already_bound_names_this_process() {
    let _queue = Queue::builder(7).bind().await.unwrap();
    let error = Queue::builder(7).bind().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyBound);
    assert!(error.to_string().contains("of this process"), "{error}");
}

fn a_runtime_without_an_io_driver_is_an_error() {
    let runtime = Builder::new_current_thread().build().unwrap();
    let bind = || runtime.block_on(async { Queue::builder(0).bind().await });
    let error = common::without_panic_messages(bind).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoRuntime);
    assert!(error.to_string().starts_with("bind queue 0"), "{error}");
    assert_eq!(account(0), None);
}

/// A queue with `count` unread packets. `None` if the system limits the receive buffer.
async fn filled(count: u32) -> Option<(Queue, Divert, Traffic)> {
    let (queue, divert) = start(Queue::builder(0).max_len(count).copy_range(40));
    let traffic = Traffic::new(200);
    if queue.stats().limits.receive_buffer < count as usize * 832 {
        eprintln!("skipped: the system limits the receive buffer");
        return None;
    }
    for portion in 0..count.div_ceil(100) {
        traffic.send(0..100);
        let sent = u64::from(portion + 1) * 100;
        eventually("they are queued", || account(0).unwrap().last_id >= sent).await;
    }
    Some((queue, divert, traffic))
}

async fn each_poll_of_confirm_receives_few_packets() {
    let Some((mut queue, _divert, _traffic)) = filled(10_000).await else { return };
    let first = next(&mut queue).await;
    let before = queue.stats().received.packets;
    let mut confirm = first.accept().confirm();
    assert!((&mut confirm).now_or_never().is_none(), "its reply is behind ten thousand packets");
    let received = queue.stats().received.packets - before;
    assert!(received <= 256, "{received} packets were received in one go");
    soon("the reply", confirm).await.unwrap();
}

async fn each_poll_of_reconfigure_receives_few_packets() {
    let Some((queue, _divert, _traffic)) = filled(10_000).await else { return };
    let sink = queue.sink();
    let mut change = Box::pin(sink.reconfigure(&Reconfigure::new().max_len(20_000)));
    assert!(change.as_mut().now_or_never().is_none(), "its reply is behind ten thousand packets");
    let received = queue.stats().received.packets;
    assert!(received <= 256, "{received} packets were received in one go");
    soon("the reply", change).await.unwrap();
    assert_eq!(queue.stats().limits.max_len, 20_000);
}

fn try_recv_works_without_a_runtime() {
    let (inside, outside) = (runtime(), runtime());
    let traffic = outside.block_on(async { Traffic::new(100) });
    let (mut queue, _divert) = inside.block_on(async { start(Queue::builder(0)) });
    assert!(matches!(queue.try_recv(), Err(TryRecvError::Empty)));
    traffic.send(0..100);
    let mut seen = 0;
    let deadline = Instant::now() + PATIENCE;
    while seen < 100 {
        assert!(Instant::now() < deadline, "{seen} packets");
        match queue.try_recv() {
            Ok(packet) => {
                seen += 1;
                packet.accept().submit().unwrap();
            }
            Err(TryRecvError::Empty) => thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
    // When `Empty` is returned, gathered verdicts have been sent.
    assert!(matches!(queue.try_recv(), Err(TryRecvError::Empty)));
    support::wait_until("nothing is in flight", || queue.stats().held.in_flight == 0);
    outside.block_on(traffic.expect(0..100));
    drop(inside);
    assert!(matches!(queue.try_recv(), Err(TryRecvError::Empty)), "also when the runtime has gone");
    let sink = queue.sink();
    outside.block_on(soon("the shutdown", sink.close())).unwrap();
    assert!(matches!(queue.try_recv(), Err(TryRecvError::Closed)));
}

fn readable_fd_reports_every_packet() {
    const COUNT: u32 = 500;
    let (inside, outside) = (runtime(), runtime());
    let (mut stream, sink, _divert) = {
        let (queue, divert) = inside.block_on(async { start(Queue::builder(0)) });
        let (stream, sink) = queue.split();
        (stream, sink, divert)
    };
    let traffic = outside.block_on(async { Traffic::new(COUNT) });
    assert!(matches!(stream.try_recv(), Err(TryRecvError::Empty)));
    stream.readable_fd().unwrap();
    let mut sent = 0;
    let mut numbers = Vec::new();
    while numbers.len() < COUNT as usize {
        // At most as many as fit into the receivers' buffers.
        if sent < COUNT {
            traffic.send(sent..sent + 5);
            sent += 5;
        }
        // `reconfigure` receives packets too: its reply is behind them.
        if sent % 50 == 0 {
            outside.block_on(soon("the reply", sink.reconfigure(&Reconfigure::new().max_len(1000 + sent)))).unwrap();
        }
        let fd = stream.readable_fd().unwrap();
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        let timeout = Timespec { tv_sec: PATIENCE.as_secs() as _, tv_nsec: 0 };
        assert_eq!(poll(&mut fds, Some(&timeout)).unwrap(), 1, "{} of {sent} packets seen", numbers.len());
        loop {
            match stream.try_recv() {
                Ok(packet) => {
                    numbers.push(number(&packet));
                    packet.accept().submit().unwrap();
                }
                Err(TryRecvError::Empty) => break,
                Err(error) => panic!("{error}"),
            }
        }
        outside.block_on(async { tokio::task::yield_now().await });
    }
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..COUNT));
}
