//! Rules go along with their queues.

use std::{ops::RangeInclusive, os::fd::AsFd};

use nfqueue_divert::Divert as Blocking;

use super::{Handover, Part, Takeover};
use crate::{divert::Divert, io::PassedPart, record::PartRecord, types::Error};

impl Handover {
    /// Hands a table over together with the queues. Its rules and hooks stay installed all the
    /// time. The rules of a queue go along with it without this.
    ///
    /// From now on `divert` cannot be used: its methods return [`Other`](crate::ErrorKind::Other).
    /// If this process keeps the queues, `divert` can be used again. If they are handed over, drop
    /// it: that does not affect the table any more.
    ///
    /// # Errors
    /// This process keeps the queues: [`InvalidInput`](crate::ErrorKind::InvalidInput) if the table
    /// is being handed over already, or an error of the operating system.
    ///
    /// # Cancel safety
    /// If the future is dropped, this process keeps the queues. The table may be lent then, until
    /// the process ends: do not drop it.
    pub async fn with_divert(mut self, divert: &Divert) -> Result<Self, Error> {
        let part = divert.run("hand over a table", lend).await?;
        self.push(part);
        Ok(self)
    }
}

fn lend(divert: &Blocking) -> Result<Part, Error> {
    let lent = divert.lend()?;
    let loan = lent.loan();
    let socket = lent.socket().try_clone_to_owned().map_err(|source| {
        loan.end();
        Error::os("hand over a table", source)
    })?;
    let record = PartRecord { cookie: lent.cookie(), body: lent.description().to_vec() };
    Ok(Part { socket, record, use_again: Box::new(move || loan.end()) })
}

impl Takeover {
    /// Takes over the first table that the predecessor hands over; `None` if there is none (any
    /// more). It can be changed when everything has been [accepted](Self::accept). A queue that is
    /// taken over with [`QueueBuilder::divert`](crate::QueueBuilder::divert) takes its own rules.
    ///
    /// The rules, the sets with their elements, and the counters stay as they are. If this process
    /// wants other rules, it calls [`Divert::replace_rules`] afterwards, which drops no queued
    /// packet either. (Chains that only the new rules need are added then: see
    /// [there](nfqueue_divert::Divert#installing-a-table-can-queue-packets-again).)
    ///
    /// # Errors
    /// [`Malformed`](crate::ErrorKind::Malformed) if what the predecessor has sent is damaged, or
    /// an error of the operating system. The predecessor keeps the table if this value is dropped.
    pub fn take_divert(&mut self) -> Result<Option<Divert>, Error> {
        if self.parts_left().is_empty() { Ok(None) } else { self.take_part(0).map(Some) }
    }

    /// The table whose rules send to these queues, or else one that is of no queue.
    pub(crate) fn take_divert_of(&mut self, queues: &RangeInclusive<u16>) -> Result<Option<Divert>, Error> {
        let of = |part: &PassedPart| Blocking::described_queues(&part.record.body);
        let parts = self.parts_left();
        let own = parts.iter().position(|part| of(part).as_ref() == Some(queues));
        let index = own.or_else(|| parts.iter().position(|part| of(part).is_none()));
        index.map(|index| self.take_part(index)).transpose()
    }

    fn take_part(&mut self, index: usize) -> Result<Divert, Error> {
        let passed = &self.parts_left()[index];
        let socket = passed.socket.as_fd().try_clone_to_owned();
        let socket = socket.map_err(|source| Error::os("take over a table", source))?;
        let (divert, loan) = Blocking::adopt(socket, &passed.record.body)?;
        self.part_taken(index, Box::new(move || loan.end()));
        Ok(Divert::new(divert))
    }
}
