//! Verdicts, in every order.

use std::time::Instant;

use tokio_nfqueue::{Error, ErrorKind, Hook, Packet, Verdict};

use super::{
    Adversary, Waiting,
    connection::{Kind, Path},
    model::{ACCEPTED_LOST, Answer, REFUSED, Violation},
};
use crate::common::PATIENCE;

impl Adversary {
    /// Which of the waiting packets are decided next.
    pub(super) fn some_waiting(&mut self) -> Vec<usize> {
        let mut all: Vec<usize> = (0..self.waiting.len()).collect();
        if self.random.one_in(2) {
            let id = self.waiting[self.random.below(all.len())].connection;
            all.retain(|index| self.waiting[*index].connection == id);
        }
        self.random.shuffle(&mut all);
        all.truncate(1 + self.random.below(6));
        all
    }

    pub(super) fn answer(&mut self, kind: Kind, hook: Hook) -> Answer {
        let opening = matches!(kind, Kind::Syn | Kind::SynAck | Kind::Ack);
        let answer = match self.random.below(100) {
            0..65 if opening => Answer::Accept,
            0..35 => Answer::Accept,
            35..65 => Answer::AcceptFlow,
            65..72 => Answer::Drop,
            72..84 => Answer::DropFlow,
            84..90 => Answer::Reject,
            _ => Answer::RejectFlow,
        };
        match answer {
            Answer::Reject if hook == Hook::Postrouting => Answer::Drop,
            Answer::RejectFlow if hook == Hook::Postrouting => Answer::DropFlow,
            answer => answer,
        }
    }

    /// Decides the waiting packets with these indices, in random order: one by one, or in one
    /// flush.
    pub(super) async fn decide(&mut self, mut picks: Vec<usize>) {
        picks.sort_unstable_by(|a, b| b.cmp(a));
        let mut picked: Vec<Waiting> = picks.into_iter().map(|index| self.waiting.remove(index)).collect();
        if picked.is_empty() {
            return;
        }
        self.random.shuffle(&mut picked);
        let together = self.random.one_in(2);
        self.totals.together += usize::from(together && picked.len() > 1);
        let mut paths: Vec<Path> = Vec::new();
        let mut submitted = Vec::new();
        let mut left = picked.len();
        // A chain that has come or gone may have dropped them.
        let still = picked.iter().filter(|waiting| waiting.churn == self.churn);
        let mut due: Vec<u32> = still.map(|waiting| waiting.number).collect();
        let ids: Vec<usize> = picked.iter().map(|waiting| waiting.connection).collect();
        for waiting in picked {
            let Waiting { number, connection, hook, packet, .. } = waiting;
            let sent = &self.model.sent[&number];
            let (kind, at) = (sent.kind, self.tick());
            let answer = self.answer(kind, hook);
            left -= 1;
            let how = if together { format!("in a flush with {} more", ids.len() - 1) } else { "alone".to_owned() };
            self.log_of(connection, at, format!("packet {number}: {answer:?}, {how}"));
            *self.totals.verdicts.entry(name(answer)).or_default() += 1;
            paths.extend(self.path_of(connection));
            self.model.answered(number, answer, at);
            submitted.push((number, answer, verdict(packet, answer).confirm()));
            if !together || left == 0 {
                self.queue.as_ref().expect("a queue").sink().flush().await;
                for (number, answer, confirmation) in std::mem::take(&mut submitted) {
                    let result = confirmation.await;
                    self.confirmed(number, answer, result);
                }
            }
        }
        paths.sort_unstable_by_key(|path| *path as u8);
        paths.dedup();
        self.settle(&paths).await;
        due.retain(|number| self.is_due(*number));
        self.due.extend(due);
    }

    pub(super) fn confirmed(&mut self, number: u32, answer: Answer, result: Result<(), Error>) {
        let at = self.tick();
        let (kind, connection) = (self.model.sent[&number].kind, self.model.sent[&number].connection);
        match result {
            Ok(()) => self.model.confirmed(number, answer, at),
            // A chain has gone, with the packets that waited.
            Err(error) if error.kind() == ErrorKind::PacketGone => self.model.of(connection).uncertain = true,
            // "The packet belongs to no connection", whatever it seemed to be when it was sent.
            Err(error) if error.to_string().contains("is of no connection") => self.model.of_no_connection(number),
            Err(error) if kind == Kind::Error && error.kind() == ErrorKind::InvalidInput => {}
            Err(error) => self.check(Err(error), Some(connection)),
        }
    }

    pub(super) fn check(&mut self, result: Result<(), Error>, connection: Option<usize>) {
        if let Err(error) = result {
            let connection = connection.unwrap_or_default();
            self.report(Some(Violation { promise: REFUSED, connection, detail: error.to_string() }));
        }
    }

    /// Accepted packets arrive. Once one is lost, no other is waited for.
    pub(super) async fn await_due(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let model = &self.model;
            self.due.retain(|number| !model.has_arrived(*number));
            let Some(number) = self.due.first().copied() else { return };
            if self.broken.contains_key(ACCEPTED_LOST) {
                return self.due.clear();
            }
            if Instant::now() > deadline {
                let lost = self.model.lost(number);
                self.report(Some(lost));
            }
            self.drain().await;
            self.receive();
        }
    }

    /// Whether an accepted packet must arrive. Another hook may ask about it first.
    pub(super) fn is_due(&self, number: u32) -> bool {
        let connection = self.model.sent[&number].connection;
        let waits = self.waiting.iter().any(|waiting| waiting.number == number);
        self.model.must_arrive(number) && !waits && !self.is_translated(connection)
    }
}

fn verdict(packet: Packet, answer: Answer) -> Verdict {
    match answer {
        Answer::Accept => packet.accept(),
        Answer::AcceptFlow => packet.accept().for_flow(),
        Answer::Drop => packet.drop(),
        Answer::DropFlow => packet.drop().for_flow(),
        Answer::Reject => packet.reject(),
        Answer::RejectFlow => packet.reject().for_flow(),
    }
}

fn name(answer: Answer) -> &'static str {
    match answer {
        Answer::Accept => "accept",
        Answer::AcceptFlow => "accept for flow",
        Answer::Drop => "drop",
        Answer::DropFlow => "drop for flow",
        Answer::Reject => "reject",
        Answer::RejectFlow => "reject for flow",
    }
}
