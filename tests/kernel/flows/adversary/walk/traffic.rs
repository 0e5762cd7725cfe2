//! What is under way: packets that come to the queue, arrive, or are lost.

use std::{collections::BTreeSet, time::Instant};

use tokio_nfqueue::TryRecvError;

use super::{
    Adversary, Waiting,
    connection::{Kind, Path},
    segment,
};
use crate::common::PATIENCE;

impl Adversary {
    /// Waits until all that was sent has been queued, has arrived, or is lost.
    ///
    /// The kernel handles packets of one CPU, to which this thread is bound, in their order. So
    /// what has not come before a packet that is never queued does not come.
    pub(super) async fn settle(&mut self, paths: &[Path]) {
        let mut missing = BTreeSet::new();
        for path in paths {
            let [a, b] = path.hosts();
            for (from, to) in [(a, b), (b, a)] {
                for v6 in [false, true] {
                    self.numbers += 1;
                    let packet = segment::sentinel(
                        self.world.address(from, to, v6),
                        self.world.address(to, from, v6),
                        self.numbers,
                    );
                    self.world.send(from, &packet);
                    missing.insert(self.numbers);
                }
            }
        }
        let deadline = Instant::now() + PATIENCE;
        while !missing.is_empty() {
            self.drain().await;
            for number in self.receive() {
                missing.remove(&number);
            }
            assert!(Instant::now() < deadline, "{} sentinels are lost on {paths:?}", missing.len());
        }
        self.drain().await;
        self.receive();
    }

    /// Takes what is in the queue.
    pub(super) async fn drain(&mut self) {
        let mut others = false;
        loop {
            let packet = match self.queue.as_mut().expect("a queue").try_recv() {
                Ok(packet) => packet,
                Err(TryRecvError::Empty) if others => {
                    others = false;
                    continue;
                }
                Err(TryRecvError::Empty) => return,
                Err(error) => panic!("{error:?}"),
            };
            let at = self.tick();
            let label =
                segment::label(packet.payload()).and_then(|label| Some((label, self.model.sent.get(&label.number)?)));
            let Some((label, sent)) = label else {
                // A reset or an error of the kernel.
                others = true;
                let result = packet.accept().submit();
                self.check(result, None);
                continue;
            };
            let (number, hook, connection) = (label.number, packet.hook(), sent.connection);
            self.totals.queued += 1;
            self.log_of(connection, at, format!("packet {number} is queued at {hook:?}"));
            let strict = !self.accepts_lost;
            let violation = self.model.queued(number, at, strict);
            self.report(violation);
            self.waiting.push(Waiting { number, connection, hook, packet, churn: self.churn });
        }
    }

    /// Takes what has arrived; returns the numbers.
    pub(super) fn receive(&mut self) -> Vec<u32> {
        let labels = self.world.arrived();
        for label in &labels {
            let Some(sent) = self.model.sent.get(&label.number) else { continue };
            let (id, side, unqueued) = (sent.connection, sent.side, sent.questions.is_empty());
            let error = sent.kind == Kind::Error;
            let at = self.tick();
            self.totals.arrived += 1;
            self.totals.passed_unqueued += usize::from(unqueued);
            let how = if unqueued { ", unqueued" } else { "" };
            self.log_of(id, at, format!("packet {} arrives{how}", label.number));
            if let Some(connection) = self.connections.iter_mut().find(|connection| connection.id == id)
                && !error
            {
                connection.passed = true;
                if connection.translated && side == 0 {
                    connection.seen[1] = label.from;
                }
            }
            let violation = self.model.arrived(label.number, at);
            self.report(violation);
        }
        labels.into_iter().map(|label| label.number).collect()
    }
}
