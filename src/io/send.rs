//! Sending: verdict messages and configuration.

use std::{
    sync::TryLockError,
    task::{Context, Poll},
};

use futures::{FutureExt, channel::oneshot};
use rustix::io::Errno;

use super::{
    extras::VerdictExtras,
    limits::change_of,
    shared::{Shared, lock},
    stream::unusable,
};
use crate::{
    state::{Outbox, Outcome, Proof, Transmit},
    types::{Error, ErrorKind},
    wire::config::{Command, Config},
};

impl Shared {
    /// Sends all gathered verdicts. If another thread is sending, that thread sends these as well,
    /// in another round.
    pub(super) fn flush(&self) {
        loop {
            let mut outbox = match self.outbox.try_lock() {
                Ok(outbox) => outbox,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // The holder looks whether a flush is wanted after it has released the lock.
                Err(TryLockError::WouldBlock) => return,
            };
            self.send_round(&mut outbox);
            let spent = outbox.take_spent();
            drop(outbox);
            drop(spent);
            self.socket.sent();
            if !self.send_lock_released() {
                return;
            }
        }
    }

    /// Sends what is gathered now. The policy decides separately about what is gathered meanwhile.
    fn send_round(&self, outbox: &mut Outbox<Box<VerdictExtras>>) {
        let mut core = self.core();
        // If the capability is unknown, `probe` asks the kernel soon, and without this lock.
        while let Some(transmit) = core.machine.poll_transmit(outbox, || self.socket.is_capable() == Some(true)) {
            drop(core);
            match transmit {
                Transmit::Receive => {
                    let _ = self.receive_all();
                    core = self.core();
                }
                Transmit::Datagram { proof, acknowledged } => {
                    if acknowledged {
                        let _ = self.receive_round();
                    }
                    let outcome = self.send_datagram(outbox.encode(), proof);
                    core = self.core();
                    let last = core.machine.transmitted(outbox, outcome);
                    self.last_sent.store(last);
                }
            }
        }
    }

    /// Sends a datagram, and finds out whether the kernel executed it, unless that is proven later.
    fn send_datagram(&self, datagram: &[u8], proof: Proof) -> Outcome {
        match self.send_with_retry(datagram) {
            Ok(()) => {}
            Err(error) => {
                return match error {
                    Errno::MSGSIZE if datagram.len() > ALWAYS_FITS => Outcome::TooLong(error),
                    Errno::PERM => Outcome::Refused,
                    _ if is_short(error) || error == Errno::MSGSIZE => Outcome::Failed,
                    _ => Outcome::Broken(unusable("send verdicts", error.into())),
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
        receive_buffer: Option<usize>,
    ) -> Result<oneshot::Receiver<Result<(), Error>>, Error> {
        let (waiter, reply) = oneshot::channel();
        let outbox = lock(&self.outbox);
        // Checked under the lock under which the queue is stopped: nothing is configured after
        // that.
        let life = self.core().machine.life();
        if only_while_open && !life.is_open() || life.is_handing_over() {
            drop(outbox);
            self.flush_for_others();
            let error = self.closed(operation);
            return Err(if life.is_handing_over() { error.with_detail("it is being handed over") } else { error });
        }
        // Makes room for the reply.
        let _ = self.receive_round();
        let sequence = self.core().machine.await_config(operation, change_of(config), waiter);
        let mut message = Vec::new();
        config.encode(&mut message, sequence, self.settings.queue);
        // Memory first: longer messages may arrive before the reply.
        let room = self.make_room(receive_buffer);
        let result = if room.is_ok() { self.send_with_retry(&message) } else { Ok(()) };
        if room.is_err() || result.is_err() {
            self.core().machine.take_config(sequence);
        }
        self.last_sent.store(sequence);
        drop(outbox);
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
        let mut reply = self.begin_configure(operation, config, false, None)?;
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
    pub(super) fn configure_acknowledged(&self, operation: &'static str, config: &Config) -> Result<(), Error> {
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
        let spare = if later { core.wakers.wait(waker) } else { Some(waker) };
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
