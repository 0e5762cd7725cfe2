//! Rules go along when their queue is handed over.

use tokio::net::UnixStream;
use tokio_nfqueue::{
    Action, Divert, ErrorKind, FlowMarks, Queue, QueueBuilder,
    handover::{Handover, Takeover},
};

use super::{TABLE, queue, rules, table_exists};
use crate::common::{PATIENCE, PORT, Traffic, account, eventually, next, soon, udp_in};

tests![
    both rules_go_along_with_their_queue_several_times,
    both rules_stay_after_a_failed_hand_over,
    both a_close_during_a_hand_over_waits_for_its_end,
    both each_queue_takes_its_own_rules,
    one rules_that_are_not_wanted_must_be_taken_as_before,
    one a_queue_without_rules_has_none_to_take,
    one flow_marks_of_the_predecessor_must_be_the_same,
];

async fn hand_over(queue: &Queue) -> Handover {
    soon("the hand-over", queue.hand_over(PATIENCE)).await.unwrap()
}

/// Hands over, and takes over with each of these builders.
async fn pass_on(handover: Handover, builders: impl IntoIterator<Item = QueueBuilder>) -> Vec<Queue> {
    let (here, there) = UnixStream::pair().unwrap();
    let receive = async {
        let mut takeover = Takeover::receive(there).await.unwrap();
        let queues = builders.into_iter().map(|builder| builder.take_over(&mut takeover).unwrap()).collect();
        takeover.accept().await.unwrap();
        queues
    };
    let both = async { tokio::join!(handover.send(here, PATIENCE), receive) };
    let (sent, queues) = soon("the hand-over", both).await;
    sent.unwrap();
    queues
}

async fn rules_go_along_with_their_queue_several_times() {
    for rules in [rules(), rules().fail_closed()] {
        let builder = || Queue::builder(0..=1).on_unanswered(Action::Accept).divert(rules.clone());
        let mut queue = builder().bind().await.unwrap();
        let traffic = Traffic::new(100);
        for round in 0..4 {
            let numbers = round * 10..round * 10 + 10;
            traffic.send(numbers.clone());
            let successor = pass_on(hand_over(&queue).await, [builder()]).await.pop().unwrap();
            // Its drop ends nothing.
            drop(std::mem::replace(&mut queue, successor));
            for _ in numbers.clone() {
                next(&mut queue).await.accept().submit().unwrap();
            }
            traffic.expect(numbers).await;
            let divert = queue.divert().unwrap();
            assert_eq!(divert.table(), TABLE);
            assert_eq!(divert.counters().await.unwrap()[0].packets, u64::from(round + 1) * 10);
        }
        let divert = queue.divert().unwrap();
        divert.replace_rules([udp_in().destination_port(PORT)]).await.unwrap();
        traffic.send([50]);
        next(&mut queue).await.accept().submit().unwrap();
        traffic.expect([50]).await;
        soon("the shutdown", queue.close()).await.unwrap();
        assert!(!table_exists() && account(0).is_none() && account(1).is_none());
    }
}

async fn rules_stay_after_a_failed_hand_over() {
    let mut queue = queue(rules()).bind().await.unwrap();
    let traffic = Traffic::new(20);
    for round in 0..3 {
        let handover = hand_over(&queue).await;
        assert!(queue.divert().unwrap().counters().await.is_err(), "it is not ours now");
        match round {
            0 => drop(handover),
            _ => {
                let (here, there) = UnixStream::pair().unwrap();
                let fail = async {
                    let mut takeover = Takeover::receive(there).await.unwrap();
                    let taken = (round == 2).then(|| super::queue(rules()).take_over(&mut takeover).unwrap());
                    drop(takeover);
                    drop(taken);
                };
                let (sent, ()) = tokio::join!(handover.send(here, PATIENCE), fail);
                assert_eq!(sent.unwrap_err().kind(), ErrorKind::Disconnected);
            }
        }
        traffic.send([round]);
        next(&mut queue).await.accept().submit().unwrap();
        traffic.expect([round]).await;
        assert_eq!(queue.divert().unwrap().counters().await.unwrap()[0].packets, u64::from(round) + 1);
    }
    soon("the shutdown", queue.close()).await.unwrap();
    assert_eq!((account(0), table_exists()), (None, false));
}

async fn a_close_during_a_hand_over_waits_for_its_end() {
    for ends_here in [true, false] {
        let queue = queue(rules()).bind().await.unwrap();
        let traffic = Traffic::new(30);
        let handover = hand_over(&queue).await;
        let sink = queue.sink();
        let closing = tokio::spawn(async move { sink.close().await });
        traffic.send(0..10);
        tokio::time::sleep(std::time::Duration::from_millis(30)).await;
        assert!(table_exists() && account(0).is_some() && !closing.is_finished());
        if ends_here {
            drop(handover);
            soon("the shutdown", closing).await.unwrap().unwrap();
            assert_eq!((account(0), table_exists()), (None, false));
            traffic.send(10..20);
            traffic.expect(0..20).await;
        } else {
            let mut successor = pass_on(handover, [super::queue(rules())]).await.pop().unwrap();
            soon("the shutdown", closing).await.unwrap().unwrap();
            drop(queue);
            traffic.send(10..20);
            for _ in 0..20 {
                next(&mut successor).await.accept().submit().unwrap();
            }
            traffic.expect(0..20).await;
            soon("the shutdown", successor.close()).await.unwrap();
        }
    }
}

async fn each_queue_takes_its_own_rules() {
    let builder = |number: u16| {
        let rule = udp_in().destination_port(PORT + number);
        Queue::builder(number).divert(Divert::builder().table(format!("of_{number}")).rule(rule))
    };
    let first = builder(0).bind().await.unwrap();
    let second = builder(1).bind().await.unwrap();
    // A table of no queue goes along, too.
    let other = Divert::install(&Divert::builder().table("other").rule(udp_in().mark(1, 1).drop())).await.unwrap();
    let both = hand_over(&first).await.with_divert(&other).await.unwrap().with(hand_over(&second).await);
    let (here, there) = UnixStream::pair().unwrap();
    let receive = async {
        let mut takeover = Takeover::receive(there).await.unwrap();
        let queues = [1, 0].map(|number| builder(number).take_over(&mut takeover).unwrap());
        let other = takeover.take_divert().unwrap().unwrap();
        takeover.accept().await.unwrap();
        (queues, other)
    };
    let (sent, (queues, new)) = soon("the hand-over", async { tokio::join!(both.send(here, PATIENCE), receive) }).await;
    sent.unwrap();
    drop((first, second, other));
    assert_eq!(new.table(), "other");
    for queue in queues {
        assert_eq!(queue.divert().unwrap().table(), format!("of_{}", queue.queue_number()));
        soon("the shutdown", queue.close()).await.unwrap();
    }
}

async fn rules_that_are_not_wanted_must_be_taken_as_before() {
    let queue = queue(rules()).bind().await.unwrap();
    let handover = hand_over(&queue).await;
    let (here, there) = UnixStream::pair().unwrap();
    let receive = async {
        let mut takeover = Takeover::receive(there).await.unwrap();
        let mut queue = Queue::builder(0).flow_marks(FlowMarks::default()).take_over(&mut takeover).unwrap();
        let divert = takeover.take_divert().unwrap().unwrap();
        takeover.accept().await.unwrap();
        let traffic = Traffic::new(1);
        traffic.send([0]);
        next(&mut queue).await.accept().submit().unwrap();
        traffic.expect([0]).await;
        divert.remove_rules().await.unwrap();
        soon("the shutdown", queue.close()).await.unwrap();
        assert!(table_exists());
        divert.close().await.unwrap();
        assert!(!table_exists());
    };
    tokio::join!(handover.send(here, PATIENCE), receive).0.unwrap();
}

/// What a successor with this builder gets; the predecessor keeps the queue.
async fn refused(old: &mut Queue, builder: QueueBuilder) -> tokio_nfqueue::Error {
    let handover = hand_over(old).await;
    let (here, there) = UnixStream::pair().unwrap();
    let receive = async {
        let mut takeover = Takeover::receive(there).await.unwrap();
        builder.take_over(&mut takeover).unwrap_err()
    };
    let (sent, error) = tokio::join!(handover.send(here, PATIENCE), receive);
    assert_eq!(sent.unwrap_err().kind(), ErrorKind::Disconnected);
    let traffic = Traffic::new(1);
    traffic.send([0]);
    next(old).await.accept().submit().unwrap();
    traffic.expect([0]).await;
    error
}

async fn a_queue_without_rules_has_none_to_take() {
    let (mut old, _divert) = crate::common::start(Queue::builder(0));
    let error = refused(&mut old, queue(rules())).await;
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("no rules"), "{error}");
}

async fn flow_marks_of_the_predecessor_must_be_the_same() {
    let mut old = queue(rules().flow_marks(FlowMarks::new(0x70))).bind().await.unwrap();
    let error = refused(&mut old, queue(rules())).await;
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("flow marks"), "{error}");
    soon("the shutdown", old.close()).await.unwrap();
    eventually("the table is gone", || !table_exists()).await;
}
