//! What `bind` installs, and what stays when it fails.

use std::{collections::BTreeSet, net::Ipv4Addr, task::Poll};

use futures::FutureExt;
use tokio_nfqueue::{
    Action, Divert, ErrorKind, FlowMarks, NetworkNamespace, Queue,
    simulated::{Kernel, TestPacket},
};

use super::{TABLE, queue, rules, table_exists};
use crate::{
    common::{PORT, Traffic, account, eventually, freed, next, soon, udp_in},
    support,
};

tests![
    both rules_without_a_target_go_to_all_numbers_of_the_queue,
    both rules_with_a_target_keep_it,
    one any_free_number_can_have_rules,
    one a_queue_without_rules_is_bound_at_once,
    both without_marks_in_sight_connections_are_decided_and_packets_rejected,
    one without_flow_marks_no_verdict_is_for_a_connection,
    one flow_marks_are_given_once,
    one flow_marks_that_differ_are_refused,
    both if_the_queue_cannot_be_bound_no_rules_are_installed,
    both if_the_rules_cannot_be_installed_the_queue_is_unbound,
    both a_cancelled_bind_leaves_nothing,
    one rules_are_installed_in_the_namespace_of_the_queue,
    one a_simulated_kernel_checks_the_rules_and_installs_none,
];

async fn rules_without_a_target_go_to_all_numbers_of_the_queue() {
    let mut queue = Queue::builder(0..4).divert(rules()).bind().await.unwrap();
    let traffic = Traffic::new(100);
    traffic.send_from_many(0..100);
    let mut seen = BTreeSet::new();
    for _ in 0..100 {
        let packet = next(&mut queue).await;
        seen.insert(packet.queue_number());
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..100).await;
    assert!(seen.len() > 1 && seen.iter().all(|queue| *queue < 4), "{seen:?}");
    let divert = queue.divert().unwrap();
    assert_eq!((divert.table(), divert.counters().await.unwrap()[0].packets), (TABLE, 100));
    // New rules have the same target.
    divert.replace_rules([udp_in().destination_port(PORT)]).await.unwrap();
    traffic.send([0]);
    next(&mut queue).await.accept().submit().unwrap();
    traffic.expect([0]).await;
    soon("the shutdown", queue.close()).await.unwrap();
    assert!(!table_exists() && (0..4).all(|queue| account(queue).is_none()));
}

async fn rules_with_a_target_keep_it() {
    let mut other = Queue::builder(5).bind().await.unwrap();
    let rules = Divert::builder().table("first").rule(udp_in().mark(7, 7).to_queue(5)).rule(udp_in());
    let mut queue = queue(rules).bind().await.unwrap();
    let traffic = Traffic::new(10);
    let marked = support::udp_marked((Ipv4Addr::LOCALHOST, 0), 7);
    traffic.send_from(&marked, [0]);
    traffic.send([1]);
    assert_eq!(crate::common::number(&next(&mut other).await), 0);
    next(&mut queue).await.accept().submit().unwrap();
    traffic.expect([1]).await;
}

async fn any_free_number_can_have_rules() {
    let _taken = support::RawQueue::bind(0).unwrap();
    let mut queue = Queue::builder(Queue::ANY).divert(rules()).bind().await.unwrap();
    assert_eq!(queue.queue_number(), 1);
    let traffic = Traffic::new(1);
    traffic.send([0]);
    next(&mut queue).await.accept().submit().unwrap();
    traffic.expect([0]).await;
}

async fn a_queue_without_rules_is_bound_at_once() {
    let bind = Queue::builder(0).bind();
    assert!(account(0).is_some(), "it is bound by the call");
    let queue = bind.now_or_never().expect("ready at once").unwrap();
    assert!(queue.divert().is_none());
}

async fn without_marks_in_sight_connections_are_decided_and_packets_rejected() {
    let mut queue = queue(rules()).bind().await.unwrap();
    let traffic = Traffic::new(10);
    traffic.send([0]);
    next(&mut queue).await.accept().for_flow().submit().unwrap();
    traffic.expect([0]).await;
    traffic.send([1, 2]);
    traffic.expect([1, 2]).await;
    assert_eq!(account(0).unwrap().last_id, 1, "the kernel knows the connection");
    let sender = support::udp((Ipv4Addr::LOCALHOST, 0));
    sender.connect((Ipv4Addr::LOCALHOST, PORT)).unwrap();
    sender.send(&[0; 4]).unwrap();
    next(&mut queue).await.reject().submit().unwrap();
    let refused = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
    eventually("the refusal", || sender.take_error().unwrap().is_some_and(refused)).await;
    traffic.expect_nothing();
    assert!(queue.divert().unwrap().forget_flows().await.is_ok());
    traffic.send([3]);
    next(&mut queue).await.accept().submit().unwrap();
    traffic.expect([3]).await;
}

async fn without_flow_marks_no_verdict_is_for_a_connection() {
    let mut queue = queue(rules().flow_marks(None)).bind().await.unwrap();
    let traffic = Traffic::new(2);
    traffic.send([0]);
    let error = next(&mut queue).await.accept().for_flow().submit().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    traffic.send([1]);
    next(&mut queue).await.accept().submit().unwrap();
    // The first one has got the default action.
    traffic.expect([0, 1]).await;
    assert!(!queue.divert().unwrap().to_nft().await.unwrap().contains("ct "));
}

async fn flow_marks_are_given_once() {
    let marks = FlowMarks::new(0x70);
    for builder in [queue(rules()).flow_marks(marks), queue(rules().flow_marks(marks))] {
        let mut queue = builder.bind().await.unwrap();
        let traffic = Traffic::new(2);
        traffic.send([0]);
        next(&mut queue).await.accept().for_flow().submit().unwrap();
        traffic.expect([0]).await;
        traffic.send([1]);
        traffic.expect([1]).await;
        soon("the shutdown", queue.close()).await.unwrap();
    }
}

async fn flow_marks_that_differ_are_refused() {
    let marks = FlowMarks::new(0x70);
    for of_rules in [Some(FlowMarks::default()), None] {
        let error = queue(rules().flow_marks(of_rules)).flow_marks(marks).bind().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("flow marks"), "{error}");
        assert_eq!((account(0), table_exists()), (None, false));
    }
    queue(rules().flow_marks(marks)).flow_marks(marks).bind().await.unwrap();
}

async fn if_the_queue_cannot_be_bound_no_rules_are_installed() {
    let _taken = support::RawQueue::bind(0).unwrap();
    let error = queue(rules()).bind().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyBound);
    assert!(!table_exists());
}

async fn if_the_rules_cannot_be_installed_the_queue_is_unbound() {
    // Rules of the user, which send packets to the queue as soon as it is bound.
    let _others = crate::common::divert([udp_in().to_queue(0).bypass(true)]);
    crate::divert::make_table(TABLE);
    let traffic = Traffic::new(1000);
    let sending = tokio::spawn(async move {
        for number in 0..1000 {
            traffic.send([number]);
            tokio::task::yield_now().await;
        }
        traffic
    });
    let error = soon("the error", queue(rules()).bind()).await.unwrap_err();
    assert_eq!((error.kind(), account(0)), (ErrorKind::AlreadyExists, None), "{error}");
    // What was queued meanwhile has got the default action.
    soon("the traffic", sending).await.unwrap().expect(0..1000).await;
    let error = soon("the error", queue(Divert::builder()).bind()).await.unwrap_err();
    assert_eq!((error.kind(), account(0)), (ErrorKind::InvalidInput, None), "{error}");
}

async fn a_cancelled_bind_leaves_nothing() {
    drop(queue(rules()).bind());
    assert_eq!((account(0), table_exists()), (None, false));
    let mut bind = Box::pin(queue(rules()).bind());
    // Seldom it is ready at once.
    if let Poll::Ready(bound) = futures::poll!(&mut bind) {
        drop(bound.unwrap());
    }
    drop(bind);
    // Whether the kernel had the table by then or not.
    let queue = soon("the queue", queue(rules()).bind_when_free()).await.unwrap();
    soon("the shutdown", queue.close()).await.unwrap();
    eventually("the table is gone", || !table_exists()).await;
    freed(0).await;
}

async fn rules_are_installed_in_the_namespace_of_the_queue() {
    let namespace = support::Namespace::new();
    let handle = namespace.run(|| NetworkNamespace::current().unwrap());
    let mut queue = queue(rules()).namespace(handle).bind().await.unwrap();
    assert!(!table_exists() && namespace.run(table_exists));
    let runtime = tokio::runtime::Handle::current();
    let traffic = namespace.run(|| {
        let _entered = runtime.enter();
        Traffic::new(1)
    });
    traffic.send([0]);
    next(&mut queue).await.accept().submit().unwrap();
    traffic.expect([0]).await;
    soon("the shutdown", queue.close()).await.unwrap();
    assert!(namespace.run(|| !table_exists() && account(0).is_none()));
}

async fn a_simulated_kernel_checks_the_rules_and_installs_none() {
    let kernel = Kernel::new();
    let error = kernel.bind(queue(Divert::builder())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let mut queue = kernel.bind(queue(rules())).unwrap();
    assert!(queue.divert().is_none() && !table_exists());
    let addresses = ("10.0.0.1:1".parse().unwrap(), "10.0.0.2:2".parse().unwrap());
    let sent = kernel.send(TestPacket::udp(addresses.0, addresses.1, b"x"));
    // The marks of the rules are those of the queue.
    next(&mut queue).await.accept().for_flow().submit().unwrap();
    assert!(soon("the outcome", sent.outcome()).await.accepted);
    soon("the shutdown", queue.close_with(Action::Accept)).await.unwrap();
}
