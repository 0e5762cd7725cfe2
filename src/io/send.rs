//! Sending: verdict messages and configuration.

use std::{
    sync::{TryLockError, atomic::Ordering},
    task::{Context, Poll},
};

use futures::{FutureExt, channel::oneshot};
use rustix::io::Errno;

use super::{
    extras::VerdictExtras,
    sender::Sender,
    shared::{Shared, lock},
    stream::unusable,
};
use crate::{
    state::{Change, Proof, VerdictMessage},
    types::{Error, ErrorKind},
    wire::config::{Command, Config, CopyMode},
};

/// The result of sending a datagram.
enum Outcome {
    Sent,
    /// The kernel discarded it because the capability is missing.
    Refused,
    TooLong(Errno),
    /// The kernel was out of memory repeatedly, or refused the length of a datagram that every
    /// socket can send.
    Failed,
    /// The socket cannot be used any more.
    Broken(Errno),
}

impl Shared {
    /// Sends all gathered verdicts. If another thread is sending, that thread sends these as well,
    /// in another round.
    pub(super) fn flush(&self) {
        loop {
            let mut sender = match self.sender.try_lock() {
                Ok(sender) => sender,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // The holder looks whether a flush is wanted after it has released the lock.
                Err(TryLockError::WouldBlock) => return,
            };
            let spent = self.send_round(&mut sender);
            self.core().machine.end_round();
            drop(sender);
            drop(spent);
            self.socket.sent();
            if !self.send_lock_released() {
                return;
            }
        }
    }

    /// Sends what is gathered now. The policy decides separately about what is gathered meanwhile.
    /// Returns messages with extras, to be dropped without a lock.
    fn send_round(&self, sender: &mut Sender) -> Vec<VerdictMessage<Box<VerdictExtras>>> {
        let mut plan = std::mem::take(&mut sender.messages);
        if self.core().machine.must_prove() {
            let _ = self.receive_all();
        }
        {
            let mut core = self.core();
            if core.machine.is_permission_missing() {
                // If it is unknown, `probe` asks the kernel soon, and without this lock.
                if self.socket.is_capable() == Some(true) {
                    core.machine.permitted();
                } else {
                    core.machine.refuse_gathered();
                    return Vec::new();
                }
            }
            core.machine.begin_round(&mut plan);
        }
        if plan.iter().any(is_confirmed) {
            // A reply does not fit into a full buffer; receiving makes room.
            let _ = self.receive_round();
        }
        let mut begin = 0;
        while begin < plan.len() {
            begin = self.send_datagram(sender, &mut plan, begin);
        }
        let spent = plan.drain(..).filter(|message| match message {
            VerdictMessage::Single { decision, .. } => decision.extras.is_some(),
            VerdictMessage::Batch { .. } => false,
        });
        let spent = spent.collect();
        sender.messages = plan;
        spent
    }

    /// Sends one datagram of messages from `begin` on. Returns the index of the first message that
    /// is left. Messages that were not sent are removed from `plan`.
    fn send_datagram(
        &self,
        sender: &mut Sender,
        plan: &mut Vec<VerdictMessage<Box<VerdictExtras>>>,
        begin: usize,
    ) -> usize {
        let first = sender.sequence.wrapping_add(1);
        let end = begin + sender.encode(&plan[begin..], self.settings.queue);
        let proof = self.core().machine.begin_send(first, &mut plan[begin..end]);
        let outcome = self.transmit(&sender.datagram, proof);
        let mut core = self.core();
        let machine = &mut core.machine;
        match outcome {
            Outcome::Sent if !machine.is_refused() => machine.sent(&plan[begin..end]),
            Outcome::Sent | Outcome::Refused => {
                let rest = plan.split_off(end);
                machine.refused(plan.split_off(begin), first);
                machine.unsent(rest, sender.sequence.wrapping_add(1));
                machine.flush();
            }
            Outcome::TooLong(source) if end == begin + 1 => {
                let error = Error::new(ErrorKind::InvalidInput, "send verdict");
                let bytes = sender.datagram.len();
                let detail = format!("the message of {bytes} bytes is longer than the socket's send buffer allows");
                // A batch behind it would decide its packet as well.
                let rest = plan.split_off(end);
                machine.impossible(plan.remove(begin), first, error.with_detail(detail).with_source(source.into()));
                machine.unsent(rest, sender.sequence.wrapping_add(1));
                machine.flush();
                self.last_sent.store(sender.sequence, Ordering::Release);
                return begin;
            }
            Outcome::TooLong(_) => {
                // Somebody has reduced the send buffer.
                sender.max_send = sender.datagram.len() / 2;
                machine.unsent(plan.split_off(begin), first);
                machine.flush();
            }
            Outcome::Failed => {
                machine.unsent(plan.split_off(begin), first);
                machine.send_failed();
            }
            Outcome::Broken(source) => {
                machine.unsent(plan.split_off(begin), first);
                machine.broken(unusable("send verdicts", source.into()));
            }
        }
        self.last_sent.store(sender.sequence, Ordering::Release);
        end
    }

    /// Sends the datagram, and finds out whether the kernel executed it, unless that is proven
    /// later.
    fn transmit(&self, datagram: &[u8], proof: Proof) -> Outcome {
        match self.send_with_retry(datagram) {
            Ok(()) => {}
            Err(error) => {
                return match error {
                    Errno::MSGSIZE if datagram.len() > ALWAYS_FITS => Outcome::TooLong(error),
                    Errno::PERM => Outcome::Refused,
                    _ if is_short(error) || error == Errno::MSGSIZE => Outcome::Failed,
                    _ => Outcome::Broken(error),
                };
            }
        }
        if proof == Proof::Later {
            return Outcome::Sent;
        }
        // The kernel discards a datagram whose sender has no CAP_NET_ADMIN, and its reply may be
        // lost to a full buffer (nfnetlink_rcv, netlink_ack).
        let capable = self.socket.was_capable();
        if proof == Proof::Replies || capable.is_none() {
            // The reply, if there is one, is in the receive buffer now.
            let _ = self.receive_all();
        }
        if capable == Some(false) { Outcome::Refused } else { Outcome::Sent }
    }

    /// Whether the kernel lets the calling thread send. The caller must hold no lock.
    pub(super) fn is_capable(&self) -> bool {
        self.socket.is_capable().unwrap_or_else(|| {
            let config = Config { command: Some(Command::Nothing), ..Config::default() };
            self.configure("check the capability for queue", &config).is_ok()
        })
    }

    /// Sends, and tries again while the kernel is out of memory.
    fn send_with_retry(&self, datagram: &[u8]) -> Result<(), Errno> {
        const TRIES: usize = 8;
        for _ in 1..TRIES {
            match self.socket.send(datagram) {
                Err(error) if is_short(error) => {
                    // An allocation failed in netlink_sendmsg. Receiving frees memory of the same
                    // kind.
                    let _ = self.receive_round();
                    std::thread::yield_now();
                }
                result => return result,
            }
        }
        self.socket.send(datagram)
    }

    /// Sends a configuration message. The returned receiver gets the reply. The caller must hold no
    /// lock.
    ///
    /// # Errors
    /// It was not sent.
    pub(super) fn begin_configure(
        &self,
        operation: &'static str,
        config: &Config,
        only_while_open: bool,
    ) -> Result<oneshot::Receiver<Result<(), Error>>, Error> {
        let (waiter, reply) = oneshot::channel();
        let mut sender = lock(&self.sender);
        // Checked under the lock under which the queue is stopped: nothing is configured after
        // that.
        let life = self.core().machine.life();
        if only_while_open && !life.is_open() || life.is_handing_over() {
            drop(sender);
            self.flush_for_others();
            let error = self.closed(operation);
            return Err(if life.is_handing_over() { error.with_detail("it is being handed over") } else { error });
        }
        // Makes room for the reply.
        let _ = self.receive_round();
        let sequence = sender.next_sequence();
        sender.datagram.clear();
        config.encode(&mut sender.datagram, sequence, self.settings.queue);
        self.core().machine.await_config(sequence, operation, change_of(config), waiter);
        // Memory first: longer messages may arrive before the reply.
        let room = self.make_room();
        let result = if room.is_ok() { self.send_with_retry(&sender.datagram) } else { Ok(()) };
        if room.is_err() || result.is_err() {
            self.core().machine.take_config(sequence);
        }
        self.last_sent.store(sequence, Ordering::Release);
        drop(sender);
        self.socket.sent();
        self.flush_for_others();
        room?;
        match result {
            Ok(()) => Ok(reply),
            Err(source) => Err(Error::os(format!("{operation} {}", self.settings.queue), source.into())),
        }
    }

    /// Called after the send lock was held for another purpose: a thread that wanted to flush
    /// meanwhile has found it taken.
    fn flush_for_others(&self) {
        self.with(|core| core.machine.flush_if_wanted());
    }

    /// Sends a configuration message and receives until the reply has come. The caller must hold no
    /// lock.
    ///
    /// # Errors
    /// The kernel's error, or `Unconfirmed` if its reply was lost.
    pub(super) fn configure(&self, operation: &'static str, config: &Config) -> Result<(), Error> {
        let mut reply = self.begin_configure(operation, config, false)?;
        let named = |error: Error| error.with_operation(format!("{operation} {}", self.settings.queue));
        loop {
            if let Some(result) = (&mut reply).now_or_never() {
                return result.unwrap_or_else(|_| Err(Error::new(ErrorKind::Unconfirmed, operation))).map_err(named);
            }
            // Bounded: the reply is in the buffer, behind what was there before it.
            let received = self.receive_round();
            self.perform_pending();
            if let Err(source) = received {
                return Err(named(Error::os(operation, source)));
            }
        }
    }

    /// As [`configure`](Self::configure), but repeated if the reply was lost. Setting the same
    /// values twice does no harm.
    pub(super) fn configure_surely(&self, operation: &'static str, config: &Config) -> Result<(), Error> {
        let mut result = self.configure(operation, config);
        for _ in 0..SETTING_RETRIES {
            match &result {
                Err(error) if error.kind() == ErrorKind::Unconfirmed => result = self.configure(operation, config),
                _ => break,
            }
        }
        result
    }

    /// Receives until a reply has come. Each poll receives a few datagrams, so that other tasks can
    /// run in between.
    pub(crate) fn poll_reply(
        &self,
        reply: &mut oneshot::Receiver<Result<(), Error>>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<(), Error>>> {
        for _ in 0..ROUNDS_OF_A_POLL {
            if let Poll::Ready(result) = reply.poll_unpin(cx) {
                return Poll::Ready(result.ok());
            }
            let received = self.receive_round();
            self.perform_pending();
            match received {
                Ok(false) => {}
                // It has come or is lost; or another thread is still sending.
                Ok(true) => break,
                Err(source) => return Poll::Ready(Some(Err(Error::os("receive a reply", source)))),
            }
        }
        let waker = cx.waker().clone();
        let mut core = self.core();
        let broken = core.machine.is_broken();
        let later = core.machine.sends_later();
        // The end of the next round of sending wakes the task. Polling until then would take a CPU.
        let spare = if later { core.wait(waker) } else { Some(waker) };
        drop(core);
        drop(spare);
        if let Poll::Ready(result) = reply.poll_unpin(cx) {
            return Poll::Ready(result.ok());
        }
        if broken {
            return Poll::Ready(None);
        }
        if !later {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

/// Rounds of receiving in one poll for a reply, about 100 µs.
const ROUNDS_OF_A_POLL: usize = 2;

/// A datagram of this length fits into the smallest send buffer (`SOCK_MIN_SNDBUF`, 4608 bytes),
/// and so does every message without a payload.
const ALWAYS_FITS: usize = 4096;

/// How often a setting is sent again if the reply was lost.
pub(super) const SETTING_RETRIES: usize = 3;

/// Whether the kernel was out of memory.
fn is_short(error: Errno) -> bool {
    matches!(error, Errno::NOBUFS | Errno::NOMEM | Errno::AGAIN)
}

fn is_confirmed(message: &VerdictMessage<Box<VerdictExtras>>) -> bool {
    match message {
        VerdictMessage::Single { decision, .. } => {
            decision.extras.as_ref().is_some_and(|extras| extras.confirm.is_some())
        }
        VerdictMessage::Batch { .. } => false,
    }
}

/// The limits that a message changes.
fn change_of(config: &Config) -> Change {
    let payload = config.copy.map(|copy| match copy {
        CopyMode::Metadata => 0,
        CopyMode::Packet(range) => range as usize,
    });
    Change { max_len: config.max_len, payload }
}
