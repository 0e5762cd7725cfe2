//! Sending: what the ledger settles becomes datagrams.

use std::{io, sync::TryLockError};

use super::shared::{Awaited, Confirmer, Extra, Phase, Shared, lock};
use crate::{
    Error, ErrorKind, PacketId,
    ledger::Settlement,
    wire::{
        Answer,
        config::Config,
        verdict::{self, Attachments},
    },
};

#[derive(Debug)]
pub(super) struct Outbox {
    plan: Vec<Settlement<Box<Extra>>>,
    datagram: Vec<u8>,
    /// The sequence number of the datagram's first message.
    first: u32,
    sequence: u32,
    max_send: usize,
    /// Verdicts in the datagram whose acknowledgement is awaited, by sequence number.
    confirms: Vec<u32>,
}

impl Outbox {
    pub(super) fn new(max_send: usize) -> Self {
        Self { plan: Vec::new(), datagram: Vec::new(), first: 0, sequence: 0, max_send, confirms: Vec::new() }
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        if self.datagram.is_empty() {
            self.first = self.sequence;
        }
        self.sequence
    }
}

impl Shared {
    /// Sends what is gathered. The caller has said so in `flush_wanted`; if another thread is sending, that one will
    /// see it and go round once more. True if all that was gathered before has been sent when this returns.
    pub(super) fn flush(&self) -> bool {
        loop {
            let mut outbox = match self.outbox.try_lock() {
                Ok(outbox) => outbox,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return false,
            };
            let confirms = self.send_gathered(&mut outbox);
            drop(outbox);
            if !confirms.is_empty() {
                self.collect(&confirms);
            }
            let mut core = self.core();
            if core.flush_wanted {
                continue;
            }
            core.wake_waiting();
            let settled = core.ledger.undecided() == 0 && core.all_sent();
            let last = settled && core.drained && matches!(core.phase, Phase::Draining { .. });
            drop(core);
            if last {
                self.unbind();
            }
            return true;
        }
    }

    /// Sends everything gathered by now, and not what comes meanwhile: whether that is to be sent its own policy has said.
    /// Tells the sequence numbers whose answers somebody awaits.
    fn send_gathered(&self, outbox: &mut Outbox) -> Vec<u32> {
        {
            let mut core = self.core();
            core.flush_wanted = false;
            if core.ledger.gathered() == 0 {
                return Vec::new();
            }
            core.oldest = None;
            core.due = None;
            core.sending = true;
            core.ledger.settle(&mut outbox.plan);
            core.counters.flushes += 1;
            core.counters.largest_flush = core.counters.largest_flush.max(outbox.plan.len() as u64);
        }
        if outbox.plan.iter().any(|s| confirm_of(s).is_some()) {
            // An answer finds no room in a full buffer; what is there can be received first.
            let _ = self.receive_all();
        }
        let mut plan = std::mem::take(&mut outbox.plan);
        for settlement in plan.drain(..) {
            self.put(outbox, settlement);
        }
        outbox.plan = plan;
        self.send(outbox);
        self.core().sending = false;
        std::mem::take(&mut outbox.confirms)
    }

    fn put(&self, outbox: &mut Outbox, settlement: Settlement<Box<Extra>>) {
        let queue = self.settings.queue;
        match settlement {
            Settlement::Batch { max, ruling, .. } => {
                self.make_room(outbox, verdict::length(&ruling, &Attachments::default()));
                let sequence = outbox.next_sequence();
                verdict::encode_batch(&mut outbox.datagram, sequence, queue, max, &ruling);
            }
            Settlement::Single { id, decision } => {
                let ruling = &decision.ruling;
                let mut extra = decision.extra;
                let confirm = extra.as_mut().and_then(|extra| extra.confirm.take());
                let attachments = extra.as_ref().map_or_else(Attachments::default, |extra| extra.attachments());
                self.make_room(outbox, verdict::length(ruling, &attachments));
                let tag = (outbox.next_sequence(), confirm.is_some());
                verdict::encode_single(&mut outbox.datagram, tag, queue, id, ruling, &attachments);
                if let Some(confirmer) = confirm {
                    outbox.confirms.push(tag.0);
                    self.core().awaiting.insert(tag.0, Awaited { id, first: outbox.first, confirmer });
                }
            }
        }
    }

    fn make_room(&self, outbox: &mut Outbox, length: usize) {
        if outbox.datagram.len() + length > outbox.max_send {
            self.send(outbox);
        }
    }

    /// Sends the datagram at hand.
    fn send(&self, outbox: &mut Outbox) {
        if outbox.datagram.is_empty() {
            return;
        }
        let result = self.send_insisting(&outbox.datagram);
        let mut core = self.core();
        core.counters.sends += 1;
        core.counters.messages += u64::from(outbox.sequence.wrapping_sub(outbox.first)) + 1;
        if let Err(source) = result {
            // The datagram was not executed: its packets stay in the kernel, where no batch may touch them.
            core.ledger.forbid_batches();
            core.counters.refused += 1;
            let error = Error::os("send verdicts", source);
            let first = outbox.first;
            outbox.confirms.retain(|sequence| {
                // Those of earlier datagrams have been sent.
                if core.awaiting.get(sequence).is_none_or(|awaited| awaited.first != first) {
                    return true;
                }
                if let Some(Awaited { id, confirmer, .. }) = core.awaiting.remove(sequence) {
                    let _ = confirmer.send(Err(Error::new(error.kind(), "send verdict").with_packet(PacketId(id))));
                }
                false
            });
            core.error(error);
        }
        outbox.datagram.clear();
    }

    /// Sends, and once more where the kernel was short of memory for a moment.
    fn send_insisting(&self, datagram: &[u8]) -> io::Result<()> {
        const TRIES: usize = 8;
        let short = |error: &io::Error| {
            matches!(error.raw_os_error(), Some(ENOBUFS | ENOMEM)) || error.kind() == io::ErrorKind::WouldBlock
        };
        for _ in 1..TRIES {
            match self.socket.send(datagram) {
                Err(error) if short(&error) => {
                    // An allocation failed in netlink_sendmsg. Receiving frees memory of the same kind.
                    let _ = self.receive_all();
                    std::thread::yield_now();
                }
                result => return result,
            }
        }
        self.socket.send(datagram)
    }

    /// Receives the answers to messages already sent. The kernel has put each into the receive buffer before the send
    /// returned, so an answer that is not there when the buffer has been read empty will not come.
    fn collect(&self, confirms: &[u32]) {
        let _ = self.receive_all();
        let mut core = self.core();
        for sequence in confirms {
            if let Some(Awaited { id, confirmer, .. }) = core.awaiting.remove(sequence) {
                let lost = Error::new(ErrorKind::Unconfirmed, "confirm verdict").with_packet(PacketId(id));
                let _ = confirmer.send(Err(lost));
            }
        }
    }

    /// Sends a configuration message and receives its answer. No other lock may be held.
    ///
    /// # Errors
    /// The kernel's refusal, or `Unconfirmed` where its answer was lost.
    pub(super) fn configure(&self, operation: &'static str, config: &Config) -> Result<(), Error> {
        self.configured(operation, self.exchange(config, None))
    }

    /// As [`configure`](Self::configure), but only in this phase of the queue's life.
    pub(super) fn configure_if(&self, phase: Phase, operation: &'static str, config: &Config) -> Result<(), Error> {
        self.configured(operation, self.exchange(config, Some(phase)))
    }

    fn configured(&self, operation: &'static str, answer: io::Result<Exchange>) -> Result<(), Error> {
        // Whoever wanted a flush meanwhile may have found the outbox taken.
        if self.core().flush_wanted {
            self.flush();
        }
        let operation = format!("{operation} {}", self.settings.queue);
        match answer {
            Ok(Exchange::Answered(Answer { errno: 0, .. })) => Ok(()),
            Ok(Exchange::Answered(Answer { errno, text, .. })) => {
                let error = Error::os(operation, io::Error::from_raw_os_error(errno));
                Err(match text {
                    Some(text) => error.with_detail(text.into_string()),
                    None => error,
                })
            }
            Ok(Exchange::Lost) => Err(Error::new(ErrorKind::Unconfirmed, operation)),
            Ok(Exchange::OutOfPhase) => Err(Error::new(ErrorKind::Closed, operation)),
            Err(source) => Err(Error::os(operation, source)),
        }
    }

    fn exchange(&self, config: &Config, only_in: Option<Phase>) -> io::Result<Exchange> {
        let _one_at_a_time = lock(&self.configuring);
        if only_in.is_some_and(|phase| phase != self.core().phase) {
            return Ok(Exchange::OutOfPhase);
        }
        // Room for the answer.
        self.receive_all()?;
        {
            let mut outbox = lock(&self.outbox);
            debug_assert!(outbox.datagram.is_empty(), "a holder sends all it has put");
            let sequence = outbox.next_sequence();
            config.encode(&mut outbox.datagram, sequence, self.settings.queue);
            self.core().configuring = Some((sequence, None));
            let result = self.send_insisting(&outbox.datagram);
            outbox.datagram.clear();
            result?;
        }
        self.receive_all()?;
        let answer = self.core().configuring.take().and_then(|(_, answer)| answer);
        Ok(answer.map_or(Exchange::Lost, Exchange::Answered))
    }
}

/// What came of a configuration message.
enum Exchange {
    Answered(Answer),
    /// It was sent, and the answer found no room in the receive buffer.
    Lost,
    /// It was not sent.
    OutOfPhase,
}

const ENOBUFS: i32 = rustix::io::Errno::NOBUFS.raw_os_error();
const ENOMEM: i32 = rustix::io::Errno::NOMEM.raw_os_error();

fn confirm_of(settlement: &Settlement<Box<Extra>>) -> Option<&Confirmer> {
    match settlement {
        Settlement::Single { decision, .. } => decision.extra.as_ref()?.confirm.as_ref(),
        Settlement::Batch { .. } => None,
    }
}
