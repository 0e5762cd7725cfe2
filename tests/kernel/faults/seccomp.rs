//! A seccomp filter that refuses a system call, as a container or a service may have it.

use nix::libc::{self, ENOSYS, EPERM};
use tokio_nfqueue::{Action, ErrorKind, FlushPolicy, Queue};

use super::process::{in_a_process, in_runtime};
use crate::{
    common::{DEADLINE, Traffic, account, divert, eventually, give_up_capabilities, hold, next, soon, udp_in},
    support,
};

tests![
    sync where_capget_is_refused_every_verdict_is_sent,
    sync where_capget_is_refused_the_kernels_answer_ends_a_queue_without_the_capability,
    sync where_capget_is_refused_a_second_owner_is_named,
    sync where_recvmmsg_is_refused_every_packet_is_received,
];

/// What the C library calls for `recvmmsg`.
#[cfg(target_pointer_width = "64")]
pub(super) const RECVMMSG: libc::c_long = libc::SYS_recvmmsg;
#[cfg(target_pointer_width = "32")]
pub(super) const RECVMMSG: libc::c_long = 417; // `__NR_recvmmsg_time64`, uapi/asm-generic/unistd.h

/// How the modes of these processes begin; the call and the errno follow.
pub(super) const MODE: &str = "seccomp";

fn where_capget_is_refused_every_verdict_is_sent() {
    for errno in [EPERM, ENOSYS] {
        in_a_process(&format!("{MODE} capget {errno} verdicts"));
    }
}

fn where_capget_is_refused_the_kernels_answer_ends_a_queue_without_the_capability() {
    for errno in [EPERM, ENOSYS] {
        in_a_process(&format!("{MODE} capget {errno} lost"));
    }
}

fn where_capget_is_refused_a_second_owner_is_named() {
    for errno in [EPERM, ENOSYS] {
        in_a_process(&format!("{MODE} capget {errno} owner"));
    }
}

fn where_recvmmsg_is_refused_every_packet_is_received() {
    for errno in [EPERM, ENOSYS] {
        in_a_process(&format!("{MODE} recvmmsg {errno} verdicts"));
    }
}

pub(super) fn child(mode: &str) {
    let words: Vec<&str> = mode.split(' ').collect();
    let [MODE, call, errno, what] = words[..] else { panic!("{mode:?}") };
    let errno = errno.parse().unwrap();
    let call = match call {
        "capget" => libc::SYS_capget,
        "recvmmsg" => RECVMMSG,
        call => panic!("{call:?}"),
    };
    support::refuse_call(call, errno).unwrap();
    match what {
        "verdicts" => in_runtime(verdicts()),
        "lost" => in_runtime(lost()),
        "owner" => in_runtime(owner()),
        what => panic!("{what:?}"),
    }
}

async fn verdicts() {
    let _divert = divert([udp_in().to_queue(0)]);
    let traffic = Traffic::new(60);
    let mut queue = Queue::builder(0).bind().await.unwrap();
    for round in 0..5 {
        let numbers = round * 10..round * 10 + 10;
        for packet in hold(&mut queue, &traffic, numbers.clone()).await {
            packet.accept().submit().unwrap();
        }
        traffic.expect(numbers).await;
    }
    let sink = queue.sink();
    soon("the shutdown", queue.close()).await.unwrap();
    assert_fields!(sink.stats(), decided.accepted: 50, sent.refusals: 0, held.in_flight: 0);
    assert_eq!(account(0), None);

    let mut queue = Queue::builder(0).deadline(DEADLINE, Action::Accept).bind().await.unwrap();
    let held = hold(&mut queue, &traffic, 50..60).await;
    traffic.expect(50..60).await;
    drop(held);
    soon("the shutdown", queue.close()).await.unwrap();
}

async fn lost() {
    let _divert = divert([udp_in().to_queue(0)]);
    let traffic = Traffic::new(10);
    // With this policy this thread sends, not the timer thread, which keeps the capability.
    let mut queue = Queue::builder(0).flush_policy(FlushPolicy::immediate()).bind().await.unwrap();
    let sink = queue.sink();
    let mut held = hold(&mut queue, &traffic, 0..2).await;
    held.remove(0).accept().submit().unwrap();
    soon("the flush", sink.flush()).await;
    traffic.expect([0]).await;
    give_up_capabilities();
    let error = loop {
        let last = held.remove(0);
        let id = last.id();
        last.accept().submit().unwrap();
        let error = soon("the refusal", sink.refusals().recv()).await.unwrap();
        assert_eq!((error.kind(), error.packet_id()), (ErrorKind::NotPermitted, Some(id)), "{error}");
        // If this thread is stopped, the timer thread represents the process meanwhile: it has the
        // capability, and sends the default action.
        let decided = || account(0).is_some_and(|account| account.waiting == 0);
        tokio::select! {
            item = queue.recv() => break item.unwrap().unwrap_err(),
            () = eventually("the end of the stream", decided) => held = hold(&mut queue, &traffic, [1]).await,
        }
    };
    assert_eq!(error.kind(), ErrorKind::NotPermitted, "{error}");
    assert!(soon("the end of the stream", queue.recv()).await.is_none());
    traffic.expect_nothing();
}

async fn owner() {
    let mut queue = Queue::builder(0).bind().await.unwrap();
    let error = Queue::builder(0).bind().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyBound, "{error}");
    let _divert = divert([udp_in().to_queue(0)]);
    let traffic = Traffic::new(1);
    traffic.send([0]);
    next(&mut queue).await.accept().submit().unwrap();
    traffic.expect([0]).await;
    give_up_capabilities();
    let error = Queue::builder(1).bind().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotPermitted, "{error}");
    assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
}
