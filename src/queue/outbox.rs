//! Sending: what the ledger settles becomes datagrams; settings become messages.

use std::{
    io,
    sync::{TryLockError, atomic::Ordering},
    task::Poll,
};

use futures::{FutureExt, channel::oneshot};

use super::shared::{Answer, Extra, Shared, lock};
use crate::{
    Error, ErrorKind,
    state::{Change, Life, Settlement},
    sys,
    wire::{
        config::{Config, CopyMode},
        verdict::{self, Attachments},
    },
};

#[derive(Debug)]
pub(super) struct Outbox {
    plan: Vec<Settlement<Box<Extra>>>,
    datagram: Vec<u8>,
    /// The number of the last message.
    sequence: u32,
    /// The longest datagram, in bytes.
    max_send: usize,
}

/// Messages that were sent, and carried something.
type Spent = Vec<Settlement<Box<Extra>>>;

/// What became of a datagram.
enum Outcome {
    Sent,
    /// The kernel discarded it: the capability is missing.
    Refused,
    TooLong(io::Error),
    /// The kernel was short of memory, repeatedly.
    Failed,
    /// The socket is of no further use.
    Broken(io::Error),
}

impl Outbox {
    pub(super) fn new(max_send: usize) -> Self {
        Self { plan: Vec::new(), datagram: Vec::new(), sequence: 0, max_send }
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Fills the datagram with messages, as many as it takes and one at least. Tells how many.
    fn fill(&mut self, messages: &[Settlement<Box<Extra>>], queue: u16) -> usize {
        self.datagram.clear();
        for (index, message) in messages.iter().enumerate() {
            let extra = match message {
                Settlement::Single { decision, .. } => decision.extra.as_ref(),
                Settlement::Batch { .. } => None,
            };
            let attachments = extra.map_or_else(Attachments::default, |extra| extra.attachments());
            let ruling = message.ruling();
            let length = verdict::length(ruling, &attachments);
            if index > 0 && self.datagram.len() + length > self.max_send {
                return index;
            }
            let sequence = self.next_sequence();
            match message {
                Settlement::Batch { max, .. } => {
                    verdict::encode_batch(&mut self.datagram, sequence, queue, *max, ruling);
                }
                Settlement::Single { id, .. } => {
                    let acknowledge = extra.is_some_and(|extra| extra.confirm.is_some());
                    let tag = (sequence, acknowledge);
                    verdict::encode_single(&mut self.datagram, tag, queue, *id, ruling, &attachments);
                }
            }
        }
        messages.len()
    }
}

impl Shared {
    /// Sends what is gathered. If another thread is sending, that one sees that it is wanted and goes round once more.
    pub(super) fn flush(&self) {
        loop {
            let mut outbox = match self.outbox.try_lock() {
                Ok(outbox) => outbox,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // The holder looks for wishes after it has released the lock, so none is lost.
                Err(TryLockError::WouldBlock) => return,
            };
            let spent = self.send_round(&mut outbox);
            self.core().machine.end_round();
            drop(outbox);
            drop(spent);
            if !self.send_lock_released() {
                return;
            }
        }
    }

    /// Sends everything gathered by now, and not what comes meanwhile: whether that is to be sent its own policy has said.
    /// What verdicts carried comes back, to be dropped without a lock.
    fn send_round(&self, outbox: &mut Outbox) -> Spent {
        let mut plan = std::mem::take(&mut outbox.plan);
        {
            let mut core = self.core();
            if core.machine.is_permission_missing() {
                if sys::has_net_admin() {
                    core.machine.permitted();
                } else {
                    core.machine.refuse_gathered();
                    return Vec::new();
                }
            }
            core.machine.begin_round(&mut plan);
        }
        if plan.iter().any(is_confirmed) {
            // An answer finds no room in a full buffer; what is received makes room.
            let _ = self.receive_round();
        }
        let mut begin = 0;
        while begin < plan.len() {
            begin = self.send_some(outbox, &mut plan, begin);
        }
        let spent = plan.drain(..).filter(|message| match message {
            Settlement::Single { decision, .. } => decision.extra.is_some(),
            Settlement::Batch { .. } => false,
        });
        let spent = spent.collect();
        outbox.plan = plan;
        spent
    }

    /// Sends a datagram of the messages from `begin` on; tells where the rest begins. What was not sent leaves the plan.
    fn send_some(&self, outbox: &mut Outbox, plan: &mut Vec<Settlement<Box<Extra>>>, begin: usize) -> usize {
        let first = outbox.sequence.wrapping_add(1);
        let end = begin + outbox.fill(&plan[begin..], self.settings.queue);
        let in_doubt = self.core().machine.begin_send(first, &mut plan[begin..end]);
        let outcome = self.transmit(&outbox.datagram, in_doubt);
        let mut core = self.core();
        let machine = &mut core.machine;
        match outcome {
            Outcome::Sent if !machine.is_refused() => machine.sent(&plan[begin..end]),
            Outcome::Sent | Outcome::Refused => {
                let rest = plan.split_off(end);
                machine.refused(plan.split_off(begin), first);
                machine.unsent(rest, outbox.sequence.wrapping_add(1));
                machine.flush();
            }
            Outcome::TooLong(source) if end == begin + 1 => {
                let error = Error::new(ErrorKind::InvalidInput, "send verdict");
                let detail = format!("its message of {} bytes is longer than the socket sends", outbox.datagram.len());
                machine.impossible(plan.remove(begin), first, error.with_detail(detail).with_source(source));
                self.last_sent.store(outbox.sequence, Ordering::Release);
                return begin;
            }
            Outcome::TooLong(_) => {
                // Somebody has made the send buffer smaller.
                outbox.max_send = outbox.datagram.len() / 2;
                machine.unsent(plan.split_off(begin), first);
                machine.flush();
            }
            Outcome::Failed => {
                machine.unsent(plan.split_off(begin), first);
                machine.send_failed();
            }
            Outcome::Broken(source) => {
                machine.unsent(plan.split_off(begin), first);
                machine.fail(Error::os("send verdicts", source));
            }
        }
        self.last_sent.store(outbox.sequence, Ordering::Release);
        end
    }

    /// Sends a datagram, and finds out whether it was executed.
    fn transmit(&self, datagram: &[u8], in_doubt: bool) -> Outcome {
        match self.send_with_retry(datagram) {
            Ok(()) => {}
            Err(error) => {
                return match error.raw_os_error() {
                    Some(EMSGSIZE) => Outcome::TooLong(error),
                    Some(EPERM) => Outcome::Refused,
                    _ if is_short(&error) => Outcome::Failed,
                    _ => Outcome::Broken(error),
                };
            }
        }
        if in_doubt {
            // The answer, if there is one, is in the receive buffer by now.
            let _ = self.receive_all();
        }
        // The kernel discards a datagram whose sender has no CAP_NET_ADMIN, and its answer may be lost to a full buffer
        // (nfnetlink_rcv, netlink_ack). A capability is not given back to a thread while it sends: what is there
        // now was there then.
        if sys::has_net_admin() { Outcome::Sent } else { Outcome::Refused }
    }

    /// Sends, and once more where the kernel was short of memory for a moment.
    fn send_with_retry(&self, datagram: &[u8]) -> io::Result<()> {
        const TRIES: usize = 8;
        for _ in 1..TRIES {
            match self.socket.send(datagram) {
                Err(error) if is_short(&error) => {
                    // An allocation failed in netlink_sendmsg. Receiving frees memory of the same kind.
                    let _ = self.receive_round();
                    std::thread::yield_now();
                }
                result => return result,
            }
        }
        self.socket.send(datagram)
    }

    /// Sends a configuration message; the answer goes to the receiver. No lock may be held.
    ///
    /// # Errors
    /// It was not sent.
    pub(super) fn begin_configure(
        &self,
        operation: &'static str,
        config: &Config,
        only_while_open: bool,
    ) -> Result<Answer, Error> {
        let (confirmer, answer) = oneshot::channel();
        let mut outbox = lock(&self.outbox);
        // Checked under the lock under which the queue is told to stop: nothing is set behind that.
        if only_while_open && self.core().machine.life() != Life::Open {
            drop(outbox);
            self.flush_for_others();
            return Err(self.closed(operation));
        }
        // Room for the answer.
        let _ = self.receive_round();
        let sequence = outbox.next_sequence();
        outbox.datagram.clear();
        config.encode(&mut outbox.datagram, sequence, self.settings.queue);
        self.core().machine.await_config(sequence, operation, change_of(config), confirmer);
        let result = self.send_with_retry(&outbox.datagram);
        if result.is_err() {
            self.core().machine.take_config(sequence);
        }
        self.last_sent.store(sequence, Ordering::Release);
        drop(outbox);
        self.flush_for_others();
        match result {
            Ok(()) => Ok(answer),
            Err(source) => Err(Error::os(format!("{operation} {}", self.settings.queue), source)),
        }
    }

    /// After the send lock was held for something else: whoever wanted a flush meanwhile has found it taken.
    fn flush_for_others(&self) {
        self.with(|core| core.machine.flush_if_wanted());
    }

    /// Sends a configuration message and receives until the answer has come. No lock may be held.
    ///
    /// # Errors
    /// The kernel's refusal, or `Unconfirmed` where its answer was lost.
    pub(super) fn configure(&self, operation: &'static str, config: &Config) -> Result<(), Error> {
        let mut answer = self.begin_configure(operation, config, false)?;
        let named = |error: Error| error.with_operation(format!("{operation} {}", self.settings.queue));
        loop {
            if let Some(result) = (&mut answer).now_or_never() {
                return result.unwrap_or_else(|_| Err(Error::new(ErrorKind::Unconfirmed, operation))).map_err(named);
            }
            // Bounded: the answer is in the buffer, behind what was there before it.
            let received = self.receive_round();
            self.attend();
            if let Err(source) = received {
                return Err(named(Error::os(operation, source)));
            }
        }
    }

    /// As [`configure`](Self::configure), and again if the answer was lost: to set the same twice does no harm.
    pub(super) fn configure_surely(&self, operation: &'static str, config: &Config) -> Result<(), Error> {
        let mut result = self.configure(operation, config);
        for _ in 0..TRIES_OF_A_SETTING {
            match &result {
                Err(error) if error.kind() == ErrorKind::Unconfirmed => result = self.configure(operation, config),
                _ => break,
            }
        }
        result
    }

    /// Receives until an answer has come, a few datagrams at a time, so that the task's thread is free in between.
    pub(crate) fn poll_answer(
        &self,
        answer: &mut Answer,
        cx: &mut std::task::Context<'_>,
    ) -> Poll<Option<Result<(), Error>>> {
        for _ in 0..ROUNDS_OF_A_POLL {
            if let Poll::Ready(result) = answer.poll_unpin(cx) {
                return Poll::Ready(result.ok());
            }
            let received = self.receive_round();
            self.attend();
            match received {
                Ok(false) => {}
                // It has come, or been given up; or another thread is still sending.
                Ok(true) => break,
                Err(source) => return Poll::Ready(Some(Err(Error::os("receive an answer", source)))),
            }
        }
        if let Poll::Ready(result) = answer.poll_unpin(cx) {
            return Poll::Ready(result.ok());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Datagrams that one poll for an answer receives at most: so many times a round of receiving, some 100 µs.
const ROUNDS_OF_A_POLL: usize = 2;

/// So many times a setting is sent again when the answer to it was lost.
pub(super) const TRIES_OF_A_SETTING: usize = 3;

const EMSGSIZE: i32 = rustix::io::Errno::MSGSIZE.raw_os_error();
const EPERM: i32 = rustix::io::Errno::PERM.raw_os_error();
const ENOBUFS: i32 = rustix::io::Errno::NOBUFS.raw_os_error();
const ENOMEM: i32 = rustix::io::Errno::NOMEM.raw_os_error();

/// Whether the kernel was short of memory.
fn is_short(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(ENOBUFS | ENOMEM)) || error.kind() == io::ErrorKind::WouldBlock
}

fn is_confirmed(message: &Settlement<Box<Extra>>) -> bool {
    match message {
        Settlement::Single { decision, .. } => decision.extra.as_ref().is_some_and(|extra| extra.confirm.is_some()),
        Settlement::Batch { .. } => false,
    }
}

/// What limits a message changes.
fn change_of(config: &Config) -> Change {
    let payload = config.copy.map(|copy| match copy {
        CopyMode::Metadata => 0,
        CopyMode::Packet(range) => range as usize,
    });
    Change { max_len: config.max_len, payload }
}
