//! No call blocks the worker: other tasks of a runtime with one thread run meanwhile.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    net::Ipv4Addr,
    rc::Rc,
    time::Duration,
};

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
struct Watcher {
    ticks: Rc<Cell<u64>>,
    /// How often it has run during each call, at most.
    most: RefCell<BTreeMap<&'static str, u64>>,
}

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
        Self { ticks, most: RefCell::default() }
    }

    /// During a call that does all in its first poll, it does not run.
    async fn during<T>(&self, what: &'static str, call: impl Future<Output = T>) -> T {
        yield_now().await;
        let before = self.ticks.get();
        let result = call.await;
        let mut most = self.most.borrow_mut();
        let most = most.entry(what).or_default();
        *most = (*most).max(self.ticks.get() - before);
        result
    }

    /// The calls during which it has hardly run.
    fn missing(&self) -> Vec<&'static str> {
        let least = |what: &str| if LONG.contains(&what) { 3 } else { 1 };
        let most = self.most.borrow();
        most.iter().filter(|(what, ticks)| **ticks < least(what)).map(|(what, _)| *what).collect()
    }
}

/// Calls that take the kernel some milliseconds.
const LONG: &[&str] = &["bind", "bind_when_free", "close", "install", "install_when_free", "close of a table"];

async fn other_tasks_run_while_a_call_waits_for_the_kernel() {
    let all = async {
        let watcher = Watcher::start();
        // While the system is busy, another thread may have done all before a call is polled.
        for _ in 0..20 {
            calls(&watcher).await;
            if watcher.missing().is_empty() {
                return;
            }
        }
        panic!("other tasks have not run during: {:?}", watcher.missing());
    };
    LocalSet::new().run_until(all).await;
}

async fn calls(watcher: &Watcher) {
    let blocked = NamedSet::new("blocked", [SetField::Ipv4Address]).timeout(Duration::from_secs(1000));
    let rules = rules().set(blocked).rule(udp_in().when(Match::in_set("blocked", [PacketField::SourceAddress])).drop());
    let mut queue = watcher.during("bind", queue(rules).bind()).await.unwrap();
    let traffic = Traffic::new(2);
    traffic.send([0]);
    next(&mut queue).await.accept().for_flow().submit().unwrap();
    traffic.expect([0]).await;

    let divert = queue.divert().unwrap();
    watcher.during("counters", divert.counters()).await.unwrap();
    watcher.during("to_nft", divert.to_nft()).await.unwrap();
    let source = traffic.sender.local_addr().unwrap();
    let flow = FlowTuple::udp(source, traffic.to(0));
    assert!(watcher.during("forget_flow", divert.forget_flow(flow)).await.unwrap());
    watcher.during("forget_flows", divert.forget_flows()).await.unwrap();
    let set = divert.set("blocked");
    let addresses = [1, 2, 3].map(|last| Ipv4Addr::new(10, 0, 0, last));
    watcher.during("insert", set.insert(addresses[0], None)).await.unwrap();
    watcher.during("insert_all", set.insert_all(addresses, None)).await.unwrap();
    assert_eq!(watcher.during("len", set.len()).await.unwrap(), 3);
    assert!(!watcher.during("is_empty", set.is_empty()).await.unwrap());
    assert_eq!(watcher.during("elements", set.elements()).await.unwrap().len(), 3);
    assert!(watcher.during("remove", set.remove(addresses[0])).await.unwrap());
    watcher.during("remove_all", set.remove_all(addresses)).await.unwrap();
    watcher.during("clear", set.clear()).await.unwrap();
    watcher.during("replace_rules", divert.replace_rules([udp_in()])).await.unwrap();
    watcher.during("close", queue.close()).await.unwrap();
    assert!(!table_exists());

    let other = Divert::builder().table(TABLE).rule(udp_in().to_queue(0));
    let divert = watcher.during("install", Divert::install(&other)).await.unwrap();
    watcher.during("remove_rules", divert.remove_rules()).await.unwrap();
    watcher.during("close of a table", divert.close()).await.unwrap();
    let divert = watcher.during("install_when_free", Divert::install_when_free(&other)).await.unwrap();
    watcher.during("close of a table", divert.close()).await.unwrap();
    let queue = watcher.during("bind_when_free", super::queue(super::rules()).bind_when_free()).await.unwrap();
    let handover = watcher.during("hand_over", queue.hand_over(Duration::from_secs(5))).await.unwrap();
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
