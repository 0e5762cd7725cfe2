//! What is refused, and how the errors call it.

use std::time::Duration;

use futures::StreamExt;
use nfqueue_divert::Divert;
use tokio_nfqueue::{
    Action, ErrorKind, FlowMarks, Hook, Packet, Queue, Rule, Verdict,
    divert::{DivertBuilder, Match, NamedSet, SetField, TableFamily},
};

use super::{LOOPBACKS, Talk, bind, confirm, table, to_port};
use crate::common::{next, soon};

tests![
    one verdict_without_flow_marks_of_the_queue,
    one verdict_for_a_packet_of_a_rule_without_flow_marks,
    one what_depends_on_the_packet_ends_no_program,
    one verdicts_that_no_rule_carries_out,
    sync tables_that_cannot_have_flow_marks,
];

#[track_caller]
pub(super) fn refused(result: Result<(), tokio_nfqueue::Error>, what: &str) {
    let error = result.expect_err(what);
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(error.to_string().contains(what), "{error}");
    assert!(error.packet_id().is_some(), "{error}");
}

async fn verdict_without_flow_marks_of_the_queue() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = Queue::builder(0).on_unanswered(Action::Accept).bind().await.unwrap();
    let _divert = table([to_port(Hook::Output, talk.port()).to_queue(0)]).install().unwrap();
    for number in 0..2 {
        talk.ask(number);
        let packet = next(&mut queue).await;
        let verdict = if number == 0 { packet.reject() } else { packet.accept().for_flow() };
        refused(verdict.submit(), "the queue was bound without flow_marks");
        // The default action.
        talk.asked(number);
    }
}

async fn verdict_for_a_packet_of_a_rule_without_flow_marks() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let _other = table([to_port(Hook::Input, 1).to_queue(0)]).install().unwrap();
    let _divert = crate::common::divert([to_port(Hook::Output, talk.port()).to_queue(0)]);
    for number in 0..2 {
        talk.ask(number);
        let packet = next(&mut queue).await;
        let verdict = if number == 0 { packet.reject() } else { packet.drop().for_flow() };
        refused(confirm(verdict).await, "not queued by a rule with these flow marks");
        talk.silent();
    }
}

async fn verdicts_that_no_rule_carries_out() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let _divert = table([to_port(Hook::Postrouting, talk.port()).to_queue(0)]).install().unwrap();
    type Decide = fn(Packet) -> Verdict;
    let cases: [(&str, Decide); 5] = [
        ("the action must be", |packet| packet.repeat().for_flow()),
        ("the action must be", |packet| packet.requeue(7).for_flow()),
        ("priority: it is one of the codes", |packet| packet.accept().priority(0xaa00_0000)),
        ("the new priority must be less", |packet| packet.accept().priority(0x0100_0000).for_flow()),
        ("without conntrack(true)", |packet| packet.accept().connection_mark(0x1012, 0x1012)),
    ];
    for (what, decide) in cases {
        talk.ask(1);
        refused(decide(next(&mut queue).await).submit(), what);
        talk.silent();
    }
}

/// `submit` succeeds, the packet alone gets the verdict, and `refusals` says why.
async fn what_depends_on_the_packet_ends_no_program() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let mut queue = bind();
    let sink = queue.sink();
    let mut refusals = sink.refusals();
    let rule = |hook| to_port(hook, talk.port()).to_queue(0);
    type Decide = fn(Packet) -> Verdict;
    let cases: [(&str, Hook, bool, Decide, bool); 6] = [
        ("cannot reject packets at Postrouting", Hook::Postrouting, true, |packet| packet.reject(), false),
        ("cannot reject packets at Postrouting", Hook::Postrouting, true, |packet| packet.reject().for_flow(), false),
        ("not queued by a rule with", Hook::Input, false, |packet| packet.reject(), false),
        ("not queued by a rule with", Hook::Input, false, |packet| packet.reject().for_flow(), false),
        ("not queued by a rule with", Hook::Input, false, |packet| packet.drop().for_flow(), false),
        ("not queued by a rule with", Hook::Input, false, |packet| packet.accept().for_flow(), true),
    ];
    for (number, (what, hook, with_marks, decide, passes)) in cases.into_iter().enumerate() {
        let number = number as u8;
        let divert =
            if with_marks { table([rule(hook)]).install().unwrap() } else { crate::common::divert([rule(hook)]) };
        talk.ask(number);
        let packet = next(&mut queue).await;
        let id = packet.id();
        decide(packet).submit().unwrap();
        let error = soon("the report", refusals.next()).await.unwrap();
        assert_eq!((error.kind(), error.packet_id()), (ErrorKind::InvalidInput, Some(id)), "{error}");
        assert!(error.to_string().contains(what), "{error}");
        sink.flush().await;
        if passes {
            talk.asked(number);
        }
        talk.silent();
        divert.close().unwrap();
    }
}

fn tables_that_cannot_have_flow_marks() {
    let rule = || Rule::new(Hook::Output).to_queue(0);
    let marks = FlowMarks::default();
    let with = || Divert::builder().flow_marks(marks);
    let mask = marks.mask() | 1;
    let cases: Vec<(&str, DivertBuilder)> = vec![
        (
            "flow marks: the mask has fewer than three bits",
            Divert::builder().flow_marks(FlowMarks::new(5)).rule(rule()),
        ),
        ("flow marks: they do not work in the family bridge", with().family(TableFamily::Bridge).rule(rule())),
        ("rule 0: set connection mark: the mask overlaps", with().rule(rule().set_connection_mark(1, mask))),
        ("rule 0: priority: -200 is not above", with().rule(rule().priority(-200))),
        ("chain: priority: -300 is not above", with().rule(rule()).chain(Hook::Prerouting, Some((-300).into()))),
        ("denied flows: the capacity is 0", with().rule(rule()).denied_flows(0, Duration::from_secs(1))),
        ("denied flows: time-out", with().rule(rule()).denied_flows(1, Duration::ZERO)),
        ("flow_dropped_ip", with().rule(rule()).set(NamedSet::new("flow_dropped_ip", [SetField::Port]))),
        ("flow_denied_ports", with().rule(rule()).set(NamedSet::new("flow_denied_ports", [SetField::Port]))),
    ];
    for (what, builder) in cases {
        for error in [builder.install().map(drop).unwrap_err(), builder.to_nft().unwrap_err()] {
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
            assert!(error.to_string().contains(what), "{error}");
        }
    }
    // The marks of packets are not used.
    assert!(with().rule(rule().set_mark(1, mask).when(Match::mark(1, mask))).to_nft().is_ok());
    // At the forward hook, connection tracking has come before.
    assert!(with().rule(Rule::new(Hook::Forward).priority(-300).to_queue(0)).install().is_ok());
}
