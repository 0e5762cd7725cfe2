//! A table goes along with its queue: its hooks stay registered all the time.

use std::{net::Ipv4Addr, time::Duration};

use tokio_nfqueue::{
    Action, Divert, ErrorKind, FlowMarks, Protocol, Queue, QueueBuilder, Rule,
    divert::{Match, NamedSet, PacketField, SetField},
    handover::Takeover,
};

use super::{ENOUGH, connection, start_with_rules};
use crate::common::{PORT, Traffic, account, divert, hold, next, number, queued, soon, udp_in};

tests![
    both the_table_goes_along_with_its_rules_counters_and_sets,
    both decisions_about_connections_go_along,
    both no_queue_loses_a_packet_when_a_table_goes_along,
    both a_table_that_is_handed_over_cannot_be_changed,
    both a_table_of_a_failed_hand_over_stays,
    both a_table_goes_along_several_times,
];

async fn pass_on(queue: &Queue, divert: &Divert) -> (Queue, Divert) {
    pass_on_to(Queue::builder(0), queue, divert).await
}

async fn pass_on_to(builder: QueueBuilder, queue: &Queue, divert: &Divert) -> (Queue, Divert) {
    let (here, there) = connection();
    let send = async {
        let handover = queue.hand_over(ENOUGH).await.unwrap().with_divert(divert).await.unwrap();
        handover.send(here, ENOUGH).await.unwrap();
    };
    let receive = async {
        let mut takeover = Takeover::receive(there).await.unwrap();
        let queue = builder.take_over(&mut takeover).unwrap();
        let divert = takeover.take_divert().unwrap().unwrap();
        assert!(takeover.take_divert().unwrap().is_none());
        assert!(divert.remove_rules().await.is_err(), "it is not ours yet");
        takeover.accept().await.unwrap();
        (queue, divert)
    };
    soon("the hand-over", async { tokio::join!(send, receive).1 }).await
}

fn blocked() -> NamedSet {
    NamedSet::new("blocked", [SetField::Ipv4Address, SetField::Port]).timeout(Duration::from_secs(1000)).capacity(50)
}

fn rules() -> [Rule; 2] {
    let blocked = Match::in_set("blocked", [PacketField::SourceAddress, PacketField::DestinationPort]);
    [udp_in().when(blocked).drop(), udp_in().to_queue(0)]
}

async fn the_table_goes_along_with_its_rules_counters_and_sets() {
    let queue = Queue::builder(0).bind().await.unwrap();
    let old = Divert::install(&Divert::builder().table("mine").set(blocked()).rules(rules())).await.unwrap();
    let traffic = Traffic::new(400);
    old.set("blocked").insert((Ipv4Addr::LOCALHOST, PORT + 1), None).await.unwrap();
    // The numbers from 200 on go to the second port.
    traffic.send(0..10);
    queued(0, 10);
    traffic.send(200..205);
    let (text, counters) = (old.to_nft().await.unwrap(), old.counters().await.unwrap());
    assert_eq!([counters[0].packets, counters[1].packets], [5, 10]);
    let (mut queue, new) = pass_on(&queue, &old).await;
    drop(old);
    for _ in 0..10 {
        next(&mut queue).await.accept().submit().unwrap();
    }
    assert_eq!((new.table(), new.to_nft().await.unwrap(), new.counters().await.unwrap()), ("mine", text, counters));
    assert_eq!(new.set("blocked").elements().await.unwrap().len(), 1);
    assert!(new.set("other").is_empty().await.is_err());
    new.set("blocked").insert((Ipv4Addr::LOCALHOST, PORT), None).await.unwrap();
    traffic.send(10..15);
    assert_eq!(new.counters().await.unwrap()[0].packets, 10);
    new.set("blocked").clear().await.unwrap();
    // A new version of the program has other rules.
    new.replace_rules([udp_in().destination_port(PORT + 1).to_queue(0), udp_in().drop(), udp_in().drop()])
        .await
        .unwrap();
    assert_eq!(new.counters().await.unwrap().len(), 3);
    assert_ne!(new.to_nft().await.unwrap(), Divert::builder().set(blocked()).rules(rules()).to_nft().unwrap());
    traffic.send(200..210);
    for _ in 200..210 {
        next(&mut queue).await.accept().submit().unwrap();
    }
    traffic.expect((0..10).chain(200..210)).await;
    new.remove_rules().await.unwrap();
    assert_eq!(new.counters().await.unwrap(), []);
    soon("the shutdown", queue.close()).await.unwrap();
    new.close().await.unwrap();
}

async fn decisions_about_connections_go_along() {
    let marks = FlowMarks::default();
    let builder = || Queue::builder(0).flow_marks(marks);
    let mut queue = builder().bind().await.unwrap();
    let old = Divert::install(&Divert::builder().flow_marks(marks).rule(udp_in().to_queue(0))).await.unwrap();
    let traffic = Traffic::new(10);
    traffic.send([0]);
    next(&mut queue).await.accept().for_flow().submit().unwrap();
    traffic.expect([0]).await;
    let (mut queue, new) = pass_on_to(builder(), &queue, &old).await;
    drop(old);
    // The kernel knows the connection.
    traffic.send([1]);
    traffic.expect([1]).await;
    new.forget_flows().await.unwrap();
    traffic.send([2]);
    let packet = next(&mut queue).await;
    assert_eq!(number(&packet), 2);
    packet.drop().for_flow().submit().unwrap();
    soon("a flush", queue.sink().flush()).await;
    new.replace_rules([udp_in().to_queue(0), udp_in().drop()]).await.unwrap();
    assert_eq!(new.counters().await.unwrap().len(), 2);
    // The kernel may drop it where it is sent, and then says so.
    let _ = traffic.sender.send_to(&3_u32.to_be_bytes(), traffic.to(3));
    traffic.expect_nothing();
    assert_eq!(account(0).unwrap().last_id, 2, "it did not come to the queue");
    new.forget_flows().await.unwrap();
    traffic.send([4]);
    next(&mut queue).await.accept().submit().unwrap();
    traffic.expect([4]).await;
    new.remove_rules().await.unwrap();
}

async fn no_queue_loses_a_packet_when_a_table_goes_along() {
    let (queue, old) = start_with_rules(Queue::builder(0)).await;
    // Another program's queue, which would lose its packets with any hook.
    let mut other = Queue::builder(5).bind().await.unwrap();
    let _rule = divert([Rule::new(tokio_nfqueue::Hook::Output).protocol(Protocol::Udp).mark(7, 7).to_queue(5)]);
    let traffic = Traffic::new(100);
    let marked = crate::support::udp_marked((Ipv4Addr::LOCALHOST, 0), 7);
    traffic.send_from(&marked, 50..60);
    let mut held = Vec::new();
    for _ in 50..60 {
        held.push(next(&mut other).await);
    }
    traffic.send(0..10);
    let (mut queue, new) = pass_on(&queue, &old).await;
    drop(old);
    assert_eq!(account(5).unwrap().waiting, 10);
    assert_eq!(account(0).unwrap().waiting, 10);
    held.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    for _ in 0..20 {
        next(&mut queue).await.accept().submit().unwrap();
    }
    traffic.expect((0..10).chain(50..60)).await;
    assert_eq!((queue.stats().sent.gone_at_least, other.stats().sent.gone_at_least), (0, 0));
    new.remove_rules().await.unwrap();
}

async fn a_table_that_is_handed_over_cannot_be_changed() {
    let (queue, old) = start_with_rules(Queue::builder(0)).await;
    let _new = pass_on(&queue, &old).await;
    let error = old.replace_rules([udp_in().drop()]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Other);
    assert!(format!("{error:#}").contains("the table is handed over"), "{error:#}");
    assert!(old.counters().await.is_err() && old.remove_rules().await.is_err());
    assert!(old.close().await.is_err());
    let traffic = Traffic::new(1);
    traffic.send([0]);
    // The rules are still there.
    queued(0, 1);
}

async fn a_table_of_a_failed_hand_over_stays() {
    let (mut queue, divert) = start_with_rules(Queue::builder(0).on_unanswered(Action::Accept)).await;
    let traffic = Traffic::new(40);
    let held = hold(&mut queue, &traffic, 0..5).await;
    held.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    let handover = queue.hand_over(ENOUGH).await.unwrap().with_divert(&divert).await.unwrap();
    assert!(divert.remove_rules().await.is_err());
    let error = handover.with_divert(&divert).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    // The error has dropped the handover: both continue.
    let (here, there) = connection();
    let handover = queue.hand_over(ENOUGH).await.unwrap().with_divert(&divert).await.unwrap();
    let (sent, ()) = tokio::join!(handover.send(here, ENOUGH), async {
        let mut takeover = Takeover::receive(there).await.unwrap();
        drop(takeover.take_divert().unwrap());
    });
    assert_eq!(sent.unwrap_err().kind(), ErrorKind::Disconnected);
    traffic.send(5..10);
    for _ in 5..10 {
        next(&mut queue).await.accept().submit().unwrap();
    }
    assert_eq!(divert.counters().await.unwrap()[0].packets, 10);
    divert.remove_rules().await.unwrap();
    traffic.send(10..20);
    traffic.expect(0..20).await;
}

async fn a_table_goes_along_several_times() {
    let (mut queue, mut divert) = start_with_rules(Queue::builder(0)).await;
    let traffic = Traffic::new(100);
    for round in 0..5 {
        let numbers = round * 10..round * 10 + 10;
        traffic.send(numbers.clone());
        (queue, divert) = pass_on(&queue, &divert).await;
        for _ in numbers.clone() {
            next(&mut queue).await.accept().submit().unwrap();
        }
        traffic.expect(numbers).await;
        assert_eq!(divert.counters().await.unwrap()[0].packets, u64::from(round + 1) * 10);
    }
}
