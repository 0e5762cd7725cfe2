//! Restarts of the plain kind: the new process waits until the old one has ended.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio_nfqueue::{Action, Divert, ErrorKind, NetworkNamespace, Queue};

use super::processes::Service;
use crate::{
    common::{Traffic, account, eventually, give_up_capabilities, next, soon, start, udp_in},
    support::{self, RawQueue},
};

tests![
    both a_free_queue_is_bound_at_once,
    both bind_when_free_waits_for_a_close,
    both bind_when_free_waits_for_a_process_that_is_killed,
    one bind_when_free_waits_for_another_program,
    both one_waits_for_the_other,
    both a_cancelled_wait_leaves_nothing,
    one bind_when_free_waits_in_another_namespace,
    one what_does_not_change_by_waiting_is_an_error,
    both install_when_free_waits_for_the_owner,
    one install_when_free_waits_for_a_process_that_is_killed,
    one install_when_free_does_not_wait_for_a_table_without_an_owner,
    one install_when_free_waits_in_another_namespace,
    both a_cancelled_install_leaves_nothing,
];

async fn a_free_queue_is_bound_at_once() {
    let queue = soon("the queue", Queue::builder(0).bind_when_free()).await.unwrap();
    assert!(account(0).is_some());
    soon("the shutdown", queue.close()).await.unwrap();
}

async fn bind_when_free_waits_for_a_close() {
    let (mut old, _divert) = start(Queue::builder(0).on_unanswered(Action::Accept));
    let traffic = Traffic::new(50);
    let waiting = tokio::spawn(Queue::builder(0).bind_when_free());
    traffic.send(0..10);
    for _ in 0..10 {
        next(&mut old).await.accept().submit().unwrap();
    }
    // Several intervals.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    soon("the shutdown", old.close()).await.unwrap();
    let mut new = soon("the queue", waiting).await.unwrap().unwrap();
    traffic.send(10..20);
    for _ in 10..20 {
        next(&mut new).await.accept().submit().unwrap();
    }
    traffic.expect(0..20).await;
}

async fn bind_when_free_waits_for_a_process_that_is_killed() {
    let mut service = Service::start("serve", None, 0);
    service.expect("ready");
    let waiting = tokio::spawn(Queue::builder(0).bind_when_free());
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!waiting.is_finished());
    service.kill();
    let queue = soon("the queue", waiting).await.unwrap().unwrap();
    assert_eq!(queue.stats().received.packets, 0);
}

async fn bind_when_free_waits_for_another_program() {
    let other = RawQueue::bind(0).unwrap();
    let waiting = tokio::spawn(Queue::builder(0).bind_when_free());
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!waiting.is_finished());
    drop(other);
    soon("the queue", waiting).await.unwrap().unwrap();
}

async fn one_waits_for_the_other() {
    let first = Queue::builder(0).bind().await.unwrap();
    let waiting: Vec<_> = (0..4)
        .map(|_| {
            tokio::spawn(async {
                let queue = Queue::builder(0).bind_when_free().await.unwrap();
                queue.close().await.unwrap();
            })
        })
        .collect();
    soon("the shutdown", first.close()).await.unwrap();
    for one in waiting {
        soon("its turn", one).await.unwrap();
    }
}

/// The number of netlink sockets for netfilter in this namespace.
fn sockets() -> usize {
    let sockets = std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
    let families = sockets.lines().filter_map(|line| line.split_ascii_whitespace().nth(1));
    // One is the kernel's own.
    families.filter(|family| *family == "12").count()
}

async fn a_cancelled_wait_leaves_nothing() {
    let before = sockets();
    let queue = Queue::builder(0).bind().await.unwrap();
    let waiting = tokio::spawn(Queue::builder(0).bind_when_free());
    eventually("it waits", || sockets() == before + 2).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    drop(Queue::builder(0).bind_when_free());
    eventually("its socket is closed", || sockets() == before + 1).await;
    soon("the shutdown", queue.close()).await.unwrap();
    eventually("every socket is closed", || sockets() == before).await;
    assert_eq!(account(0), None);
    Queue::builder(0).bind().await.unwrap();
}

async fn bind_when_free_waits_in_another_namespace() {
    let namespace = support::Namespace::new();
    let handle = namespace.run(|| NetworkNamespace::current().unwrap());
    let old = Queue::builder(0).namespace(handle.clone()).bind().await.unwrap();
    let waiting = tokio::spawn(Queue::builder(0).namespace(handle).bind_when_free());
    // The number is free here.
    assert_eq!(account(0), None);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!waiting.is_finished());
    soon("the shutdown", old.close()).await.unwrap();
    let _new = soon("the queue", waiting).await.unwrap().unwrap();
    assert!(namespace.run(|| account(0)).is_some());
}

async fn what_does_not_change_by_waiting_is_an_error() {
    let error = soon("the error", Queue::builder(0).receive_buffer(0).bind_when_free()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    give_up_capabilities();
    let error = soon("the error", Queue::builder(0).bind_when_free()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotPermitted);
    let named = Divert::builder().table("named").rule(udp_in().to_queue(0));
    let error = soon("the error", Divert::install_when_free(&named)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotPermitted);
    let error = soon("the error", Divert::install_when_free(&Divert::builder())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

async fn install_when_free_waits_for_the_owner() {
    let named = Divert::builder().table("named").rule(udp_in().mark(1, 1).to_queue(0));
    let old = soon("the rules", Divert::install_when_free(&named)).await.unwrap();
    let waiting = tokio::spawn(Divert::install_when_free(&named));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    old.close().await.unwrap();
    let new = soon("the rules", waiting).await.unwrap().unwrap();
    assert_eq!(new.table(), "named");
    assert_eq!(new.counters().await.unwrap().len(), 1);
    new.close().await.unwrap();
}

async fn install_when_free_waits_for_a_process_that_is_killed() {
    let mut service = Service::start("table", None, 0);
    service.expect("ready");
    let named = Divert::builder().table("named").rule(udp_in().mark(1, 1).to_queue(0));
    assert_eq!(named.install().unwrap_err().raw_os_error(), Some(rustix::io::Errno::PERM.raw_os_error()));
    let waiting = tokio::spawn(Divert::install_when_free(&named));
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!waiting.is_finished());
    service.kill();
    soon("the rules", waiting).await.unwrap().unwrap();
}

async fn install_when_free_does_not_wait_for_a_table_without_an_owner() {
    crate::divert::make_table("named");
    let named = Divert::builder().table("named").rule(udp_in().to_queue(0));
    let error = soon("the error", Divert::install_when_free(&named)).await.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::EXIST.raw_os_error()), "{error}");
}

async fn install_when_free_waits_in_another_namespace() {
    let namespace = support::Namespace::new();
    let handle = namespace.run(|| NetworkNamespace::current().unwrap());
    let named = Divert::builder().table("named").rule(udp_in().mark(1, 1).to_queue(0));
    // A table of this name here does not matter there.
    let _here = named.install().unwrap();
    let old = handle.run(|| named.install()).unwrap().unwrap();
    let runtime = Handle::current();
    let installing = handle.run(|| {
        let _context = runtime.enter();
        Divert::install_when_free(&named)
    });
    let waiting = tokio::spawn(installing.unwrap());
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    old.close().unwrap();
    let new = soon("the rules", waiting).await.unwrap().unwrap();
    assert_eq!(new.counters().await.unwrap().len(), 1);
    new.close().await.unwrap();
}

async fn a_cancelled_install_leaves_nothing() {
    let before = sockets();
    let named = Divert::builder().table("named").rule(udp_in().mark(1, 1).to_queue(0));
    let old = named.install().unwrap();
    let waiting = tokio::spawn(Divert::install_when_free(&named));
    eventually("it waits", || sockets() == before + 2).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    old.close().unwrap();
    eventually("every socket is closed", || sockets() == before).await;
    named.install().unwrap().close().unwrap();
}
