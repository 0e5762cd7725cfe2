//! What becomes of packets when the process ends, with rules that fail open and with rules that
//! fail closed: the table of `Divert`'s documentation.

use std::{
    future::{Ready, ready},
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Context, Poll},
};

use tokio_nfqueue::{Action, Divert, ErrorKind, Packet, Verdict};

use super::{MODE, TABLE, queue, rules, table_exists};
use crate::{
    common::{Traffic, account, eventually, freed, kernel_release, next, queued, soon, udp_in},
    faults::process::Process,
    support,
};

tests![
    one after_a_kill_packets_pass_or_are_dropped_as_the_rules_say,
    one after_a_panic_packets_pass_or_are_dropped_as_the_rules_say,
    one after_an_early_return_packets_pass_or_are_dropped_as_the_rules_say,
    one after_a_drop_packets_pass_or_are_dropped_as_the_rules_say,
    one after_a_close_packets_pass,
    one accepted_connections_pass_after_a_kill,
    multi no_packet_passes_while_a_table_is_replaced,
    both a_dropped_table_that_fails_closed_stays,
    both close_removes_rules_that_fail_closed_after_a_drop,
    both a_table_of_a_live_owner_is_not_replaced,
    both a_table_of_another_program_is_not_replaced,
    one what_lets_packets_pass_is_refused,
    both a_dropped_queue_that_is_not_settled_lets_no_packet_pass,
    both rules_that_fail_closed_stay_when_serving_fails,
];

/// The queue stays bound while a packet is held, and its rules send packets to it.
async fn a_dropped_queue_that_is_not_settled_lets_no_packet_pass() {
    for fail_closed in [true, false] {
        let traffic = Traffic::new(100);
        let rules = if fail_closed { rules().fail_closed() } else { rules() };
        // The default action is to accept.
        let (mut packets, sink) = queue(rules.clone()).bind().await.unwrap().split();
        traffic.send(0..2);
        queued(0, 2);
        let held = next(&mut packets).await;
        drop(packets);
        if fail_closed {
            // What was queued gets the default action.
            traffic.expect([1]).await;
            traffic.send(10..20);
        }
        held.accept().submit().unwrap();
        freed(0).await;
        traffic.expect(if fail_closed { 0..1 } else { 0..2 }).await;
        traffic.expect_nothing();
        if fail_closed {
            assert!(table_exists());
        } else {
            // It is removed when the queue has been closed.
            eventually("the table is removed", || !table_exists()).await;
        }
        if let Some(divert) = sink.divert() {
            soon("the end of the table", divert.close()).await.unwrap();
        }
    }
}

/// Fails instead of taking a second packet.
#[derive(Clone, Default)]
struct Failing(Arc<AtomicBool>);

impl tower_service::Service<Packet> for Failing {
    type Response = Verdict;
    type Error = String;
    type Future = Ready<Result<Verdict, String>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), String>> {
        Poll::Ready(if self.0.load(SeqCst) { Err("it has failed".to_owned()) } else { Ok(()) })
    }

    fn call(&mut self, packet: Packet) -> Self::Future {
        self.0.store(true, SeqCst);
        ready(Ok(packet.accept()))
    }
}

async fn rules_that_fail_closed_stay_when_serving_fails() {
    for fail_closed in [true, false] {
        let traffic = Traffic::new(100);
        let rules = if fail_closed { rules().fail_closed() } else { rules() };
        let served = queue(rules).bind().await.unwrap();
        let divert = served.divert().unwrap();
        let serving = tokio::spawn(served.serve_service(Failing::default()).run());
        traffic.send([0]);
        let error = soon("the failure", serving).await.unwrap().unwrap_err();
        assert!(error.to_string().contains("it has failed"), "{error}");
        traffic.expect([0]).await;
        assert_eq!((account(0), table_exists()), (None, fail_closed));
        traffic.send([1]);
        if fail_closed {
            traffic.expect_nothing();
        } else {
            traffic.expect([1]).await;
        }
        soon("the end of the table", divert.close()).await.unwrap();
    }
}

/// A process with rules comes to its end; then packets pass or are dropped. A new process with the
/// same rules gets them again.
async fn ends(ending: &str, passes: [bool; 2]) {
    for (fail_closed, passes) in [false, true].into_iter().zip(passes) {
        let mode = if fail_closed { "closed" } else { "open" };
        let traffic = Traffic::new(100);
        let (mut process, _) = Process::start(&format!("{MODE}{mode} {ending}"));
        traffic.send(0..10);
        traffic.expect(0..10).await;
        match ending {
            "kill" | "flow" => process.kill(),
            "drop" => process.go_on(),
            "panic" => assert!(!process.finish()),
            _ => assert!(process.finish()),
        }
        freed(0).await;
        let stays = !passes;
        eventually("the table is gone, or stays", || table_exists() == stays).await;
        traffic.send(10..20);
        if passes {
            traffic.expect(10..20).await;
        }
        if ending == "drop" {
            // Without its process, an owned table can be replaced.
            process.kill();
        }
        let rules = if fail_closed { rules().fail_closed() } else { rules() };
        let mut queue = soon("the queue", queue(rules).bind()).await.unwrap();
        traffic.send(20..30);
        for _ in 20..30 {
            next(&mut queue).await.accept().submit().unwrap();
        }
        traffic.expect(20..30).await;
        soon("the shutdown", queue.close()).await.unwrap();
        assert_eq!((account(0), table_exists()), (None, false));
        traffic.send(30..40);
        traffic.expect(30..40).await;
    }
}

async fn after_a_kill_packets_pass_or_are_dropped_as_the_rules_say() {
    ends("kill", [true, false]).await;
}

async fn after_a_panic_packets_pass_or_are_dropped_as_the_rules_say() {
    ends("panic", [true, false]).await;
}

async fn after_an_early_return_packets_pass_or_are_dropped_as_the_rules_say() {
    ends("return", [true, false]).await;
}

async fn after_a_drop_packets_pass_or_are_dropped_as_the_rules_say() {
    ends("drop", [true, false]).await;
}

async fn after_a_close_packets_pass() {
    ends("close", [true, true]).await;
}

async fn accepted_connections_pass_after_a_kill() {
    let traffic = Traffic::new(10);
    let (mut process, _) = Process::start(&format!("{MODE}closed flow"));
    traffic.send([0]);
    traffic.expect([0]).await;
    process.kill();
    freed(0).await;
    // Those of another connection are dropped.
    let other = support::udp((Ipv4Addr::LOCALHOST, 0));
    traffic.send_from(&other, [1, 2]);
    traffic.send([3]);
    traffic.expect([3]).await;
    // A new process decides all again.
    let mut queue = queue(rules().fail_closed()).bind().await.unwrap();
    traffic.send([4]);
    next(&mut queue).await.accept().submit().unwrap();
    traffic.expect([4]).await;
    soon("the shutdown", queue.close()).await.unwrap();
}

async fn no_packet_passes_while_a_table_is_replaced() {
    for _ in 0..5 {
        let traffic = Traffic::new(1);
        let (mut process, _) = Process::start(&format!("{MODE}closed kill"));
        process.kill();
        freed(0).await;
        let stop = Arc::new(AtomicBool::new(false));
        let sending = std::thread::spawn({
            let (stop, sender, to) = (Arc::clone(&stop), traffic.sender.try_clone().unwrap(), traffic.to(0));
            move || {
                while !stop.load(SeqCst) {
                    sender.send_to(&[0; 4], to).unwrap();
                }
            }
        });
        let queue = queue(rules().fail_closed()).on_unanswered(Action::Drop).bind().await.unwrap();
        eventually("packets are queued", || account(0).unwrap().last_id > 0).await;
        let sink = queue.sink();
        // The rules stay.
        drop(queue);
        freed(0).await;
        stop.store(true, SeqCst);
        sending.join().unwrap();
        traffic.expect_nothing();
        soon("the shutdown", sink.close()).await.unwrap();
    }
}

async fn a_dropped_table_that_fails_closed_stays() {
    let rules = rules().default_queues(0..=0).fail_closed();
    let traffic = Traffic::new(10);
    drop(Divert::install(&rules).await.unwrap());
    // The kernel is told by a thread.
    let old = eventually_installed(&rules).await;
    traffic.send([0]);
    old.close().await.unwrap();
    assert!(!table_exists());
    traffic.send([1]);
    traffic.expect([1]).await;
}

async fn eventually_installed(rules: &tokio_nfqueue::divert::DivertBuilder) -> Divert {
    soon("the rules", Divert::install_when_free(rules)).await.unwrap()
}

async fn close_removes_rules_that_fail_closed_after_a_drop() {
    let queue = queue(rules().fail_closed()).bind().await.unwrap();
    let (sink, divert) = (queue.sink(), queue.divert().unwrap());
    let traffic = Traffic::new(10);
    drop(queue);
    freed(0).await;
    traffic.send([0]);
    assert!(table_exists());
    drop(divert);
    soon("the shutdown", sink.close()).await.unwrap();
    assert!(!table_exists());
    traffic.send([1]);
    traffic.expect([1]).await;
}

async fn a_table_of_a_live_owner_is_not_replaced() {
    let owner = rules().default_queues(5..=5).install().unwrap();
    let error = queue(rules().fail_closed()).bind().await.unwrap_err();
    assert_eq!((error.kind(), account(0)), (ErrorKind::AlreadyExists, None), "{error}");
    owner.close().unwrap();
    if kernel_release() < (6, 9) {
        return eprintln!("not tested: a table that fails closed has no owner on this kernel");
    }
    let mut old = queue(rules().fail_closed()).bind().await.unwrap();
    let second = || tokio_nfqueue::Queue::builder(1).divert(rules().fail_closed());
    let error = second().bind().await.unwrap_err();
    assert_eq!((error.kind(), account(1)), (ErrorKind::AlreadyExists, None), "{error}");
    // The first one is not affected.
    let traffic = Traffic::new(10);
    traffic.send([0]);
    next(&mut old).await.accept().submit().unwrap();
    traffic.expect([0]).await;
    // A new process may wait for its end.
    let waiting = tokio::spawn(second().bind_when_free());
    tokio::time::sleep(std::time::Duration::from_millis(30)).await;
    assert!(!waiting.is_finished());
    soon("the shutdown", old.close()).await.unwrap();
    let mut new = soon("the queue", waiting).await.unwrap().unwrap();
    traffic.send([1]);
    next(&mut new).await.accept().submit().unwrap();
    traffic.expect([1]).await;
    soon("the shutdown", new.close()).await.unwrap();
}

async fn a_table_of_another_program_is_not_replaced() {
    if kernel_release() < (6, 9) {
        return eprintln!("not tested: this kernel cannot tell it from what a process has left");
    }
    crate::divert::make_table(TABLE);
    let error = queue(rules().fail_closed()).bind().await.unwrap_err();
    assert_eq!((error.kind(), account(0)), (ErrorKind::AlreadyExists, None), "{error}");
    assert!(error.to_string().contains("fail_closed"), "{error}");
    assert!(table_exists());
}

async fn what_lets_packets_pass_is_refused() {
    let closed = || Divert::builder().table(TABLE).fail_closed();
    let error = queue(closed().rule(udp_in().bypass(true))).bind().await.unwrap_err();
    assert_eq!((error.kind(), table_exists()), (ErrorKind::InvalidInput, false), "{error}");
    let error = queue(Divert::builder().rule(udp_in()).fail_closed()).bind().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("fail_closed: the table needs a name"), "{error}");
    let queue = queue(closed().rule(udp_in())).bind().await.unwrap();
    let error = queue.divert().unwrap().replace_rules([udp_in().bypass(true)]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    soon("the shutdown", queue.close()).await.unwrap();
}
