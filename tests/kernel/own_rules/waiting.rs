//! No call blocks the worker: other tasks of a runtime with one thread run meanwhile.

use std::{cell::Cell, net::Ipv4Addr, rc::Rc, time::Duration};

use tokio::task::{LocalSet, spawn_local, yield_now};
use tokio_nfqueue::{
    Divert, Queue,
    divert::{FlowTuple, Match, NamedSet, PacketField, SetField},
};

use super::{TABLE, queue, rules, table_exists};
use crate::common::{Traffic, eventually, next, udp_in};

tests![
    one other_tasks_run_while_a_call_waits_for_the_kernel,
    one other_tasks_run_while_a_table_is_dropped,
];

/// Counts how often it runs.
struct Watcher(Rc<Cell<u64>>);

impl Watcher {
    fn start() -> Self {
        let ticks = Rc::new(Cell::new(0));
        let watched = Rc::clone(&ticks);
        spawn_local(async move {
            loop {
                watched.set(watched.get() + 1);
                yield_now().await;
            }
        });
        Self(ticks)
    }

    /// How often it has run. During a call that does all in its first poll, it does not run.
    async fn count<T>(&self, call: impl Future<Output = T>) -> (T, u64) {
        yield_now().await;
        let before = self.0.get();
        let result = call.await;
        (result, self.0.get() - before)
    }

    /// For a call that takes the kernel some milliseconds.
    async fn during<T>(&self, what: &str, call: impl Future<Output = T>) -> T {
        let (result, ticks) = self.count(call).await;
        assert!(ticks > 2, "{what}: other tasks have run {ticks} times");
        result
    }

    /// For a call that may have been done by another thread before it is polled.
    async fn during_one_of<T, F: Future<Output = T>>(&self, what: &str, mut call: impl FnMut() -> F) -> T {
        for _ in 0..100 {
            let (result, ticks) = self.count(call()).await;
            if ticks > 0 {
                return result;
            }
        }
        panic!("{what}: other tasks have not run in any of 100 calls");
    }
}

async fn other_tasks_run_while_a_call_waits_for_the_kernel() {
    LocalSet::new().run_until(calls()).await;
}

async fn calls() {
    let watcher = Watcher::start();
    let blocked = NamedSet::new("blocked", [SetField::Ipv4Address]).timeout(Duration::from_secs(1000));
    let rules = rules().set(blocked).rule(udp_in().when(Match::in_set("blocked", [PacketField::SourceAddress])).drop());
    let mut queue = watcher.during("bind", queue(rules).bind()).await.unwrap();
    let traffic = Traffic::new(2);
    traffic.send([0]);
    next(&mut queue).await.accept().for_flow().submit().unwrap();
    traffic.expect([0]).await;

    let divert = queue.divert().unwrap();
    watcher.during_one_of("counters", || divert.counters()).await.unwrap();
    watcher.during_one_of("to_nft", || divert.to_nft()).await.unwrap();
    let source = traffic.sender.local_addr().unwrap();
    let flow = FlowTuple::udp(source, traffic.to(0));
    watcher.during_one_of("forget_flow", || divert.forget_flow(flow)).await.unwrap();
    watcher.during_one_of("forget_flows", || divert.forget_flows()).await.unwrap();
    let set = divert.set("blocked");
    let addresses = [1, 2, 3].map(|last| Ipv4Addr::new(10, 0, 0, last));
    watcher.during_one_of("insert", || set.insert(addresses[0], None)).await.unwrap();
    watcher.during_one_of("insert_all", || set.insert_all(addresses, None)).await.unwrap();
    assert_eq!(watcher.during_one_of("len", || set.len()).await.unwrap(), 3);
    assert!(!watcher.during_one_of("is_empty", || set.is_empty()).await.unwrap());
    assert_eq!(watcher.during_one_of("elements", || set.elements()).await.unwrap().len(), 3);
    watcher.during_one_of("remove", || set.remove(addresses[0])).await.unwrap();
    watcher.during_one_of("remove_all", || set.remove_all(addresses)).await.unwrap();
    watcher.during_one_of("clear", || set.clear()).await.unwrap();
    watcher.during_one_of("replace_rules", || divert.replace_rules([udp_in()])).await.unwrap();
    watcher.during("close", queue.close()).await.unwrap();
    assert!(!table_exists());

    let other = Divert::builder().table(TABLE).rule(udp_in().to_queue(0));
    let divert = watcher.during("install", Divert::install(&other)).await.unwrap();
    watcher.during("remove_rules", divert.remove_rules()).await.unwrap();
    watcher.during("close of a table", divert.close()).await.unwrap();
    let divert = watcher.during("install_when_free", Divert::install_when_free(&other)).await.unwrap();
    watcher.during("close of a table", divert.close()).await.unwrap();
    let queue = watcher.during("bind_when_free", super::queue(super::rules()).bind_when_free()).await.unwrap();
    let handover = watcher.during_one_of("hand_over", || queue.hand_over(Duration::from_secs(5))).await.unwrap();
    drop(handover);
    watcher.during("close", queue.close()).await.unwrap();
}

async fn other_tasks_run_while_a_table_is_dropped() {
    let rules = Divert::builder().table(TABLE).rule(udp_in().to_queue(0));
    let mut seen = 0;
    for round in 0..20 {
        if round % 2 == 0 {
            drop(Divert::install(&rules).await.unwrap());
        } else {
            let queue = Queue::builder(0).divert(super::rules()).bind().await.unwrap();
            drop(queue);
        }
        // The kernel has not removed it by then.
        seen += u32::from(table_exists());
        eventually("the table is gone", || !table_exists()).await;
    }
    assert!(seen > 0, "each drop has waited until the table was removed");
}
