//! Polling the stream of packets, and waiting for flushes and refusals.

use std::{
    future::Future,
    io,
    os::fd::BorrowedFd,
    pin::pin,
    sync::{Arc, MutexGuard},
    task::{Context, Poll, Waker},
};

use tokio::task::coop;

use super::{
    guard::VerdictGuard,
    raw_packet::RawPacket,
    ready_fd::ReadyFd,
    receiver::{RECEIVE_BATCH, Receiver},
    shared::{Shared, lock},
};
use crate::state::Clock;
use crate::types::{Error, ErrorKind, TryRecvError};

/// A packet for the stream, and the right to decide it.
pub(crate) struct Received {
    pub(crate) packet: RawPacket,
    pub(crate) guard: VerdictGuard,
}

impl Shared {
    pub(crate) fn poll_packet(self: &Arc<Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Received, Error>>> {
        self.look_for_fork();
        let mut looked = false;
        loop {
            if self.hold.is_held() {
                if let Some(end) = self.end_of_stream(Some(cx.waker())) {
                    return Poll::Ready(end.map(Err));
                }
                // If it is released from now on, the waker is woken.
                if self.hold.is_held() {
                    return Poll::Pending;
                }
            }
            if let Some(packet) = self.take_packet(&mut lock(&self.receiver)) {
                return Poll::Ready(Some(Ok(packet)));
            }
            match self.end_of_stream(Some(cx.waker())) {
                None => {}
                Some(end) => return Poll::Ready(end.map(Err)),
            }
            let readable = self.socket.poll_readable(cx);
            let mut receiver = lock(&self.receiver);
            if !receiver.packets.is_empty() {
                // Another task has received packets before the waker was registered.
                continue;
            }
            let ready = match readable {
                // The task has used its budget: Tokio lets other tasks run.
                Poll::Pending if !coop::has_budget_remaining() => return Poll::Pending,
                Poll::Pending => {
                    let polls_again = receiver.busy_poll.empty(|| self.clock.now());
                    // The last round has found the socket empty.
                    if !looked {
                        drop(receiver);
                        self.with(|core| core.machine.stream_empty());
                        receiver = lock(&self.receiver);
                        if !receiver.packets.is_empty() {
                            continue;
                        }
                    }
                    // On a clock that stands still the limit would never be over.
                    if !polls_again || self.clock.stands_still() {
                        return Poll::Pending;
                    }
                    if looked {
                        poll_again(cx);
                        return Poll::Pending;
                    }
                    None
                }
                Poll::Ready(Ok(ready)) => Some(ready),
                Poll::Ready(Err(source)) => {
                    let error = Error::new(ErrorKind::NoRuntime, "receive packet").with_source(source);
                    let error = error.with_detail("the queue's runtime has ended; bind the queue in another one");
                    return Poll::Ready(Some(Err(error.fatal())));
                }
            };
            let received = self.receive(&mut receiver, RECEIVE_BATCH);
            let none = receiver.packets.is_empty();
            drop(receiver);
            match received {
                Ok(true) => {
                    if let Some(mut ready) = ready {
                        ready.clear_ready();
                    }
                    self.with(|core| {
                        if none {
                            core.machine.stream_empty();
                        }
                    });
                    looked = true;
                }
                Ok(false) => self.perform_pending(),
                Err(source) => return Poll::Ready(Some(Err(unusable("receive packet", source)))),
            }
        }
    }

    /// The next received packet that is undecided.
    fn take_packet(self: &Arc<Self>, receiver: &mut MutexGuard<'_, Receiver>) -> Option<Received> {
        if self.hold.is_held() {
            return None;
        }
        self.drop_decided(receiver);
        receiver.packets.pop_front().map(|packet| self.hand_out(packet))
    }

    /// The caller holds the receive lock.
    fn hand_out(self: &Arc<Self>, packet: RawPacket) -> Received {
        self.handed_out.hand_out();
        Received { guard: VerdictGuard::new(Arc::clone(self), &packet), packet }
    }

    /// Takes up to `limit` packets that have been received already.
    pub(crate) fn take_packets(self: &Arc<Self>, limit: usize, mut each: impl FnMut(Received)) {
        let mut receiver = lock(&self.receiver);
        if self.hold.is_held() {
            return;
        }
        self.drop_decided(&mut receiver);
        let count = receiver.packets.len().min(limit);
        receiver.packets.drain(..count).for_each(|packet| each(self.hand_out(packet)));
    }

    /// Removes packets from the front that their deadline has decided.
    fn drop_decided(&self, receiver: &mut Receiver) {
        if self.settings.deadline.is_some() && !receiver.packets.is_empty() {
            let core = self.core();
            while receiver.packets.front().is_some_and(|packet| !core.machine.is_undecided(packet.id)) {
                receiver.packets.pop_front();
            }
        }
    }

    /// Whether the stream has ended, and with which error. If not, the waker is registered.
    fn end_of_stream(&self, waker: Option<&Waker>) -> Option<Option<Error>> {
        let mut core = self.core();
        if let Some(error) = core.machine.take_failure() {
            return Some(Some(error));
        }
        if core.machine.life().has_ended() {
            return Some(None);
        }
        let waker = waker.filter(|waker| !core.wakers.has_stream(waker));
        if let Some(waker) = waker {
            // Cloning and dropping a waker may run users' code.
            drop(core);
            let waker = waker.clone();
            let old = self.core().wakers.set_stream(waker);
            drop(old);
            // Events in between have woken the old waker.
            let core = self.core();
            if core.machine.has_failed() || core.machine.life().has_ended() {
                drop(core);
                return self.end_of_stream(None);
            }
        }
        None
    }

    pub(crate) fn try_packet(self: &Arc<Self>) -> Result<Received, TryRecvError> {
        self.look_for_fork();
        loop {
            let mut receiver = lock(&self.receiver);
            if let Some(packet) = self.take_packet(&mut receiver) {
                if let Some(ready_fd) = self.ready_fd.get().filter(|_| !receiver.packets.is_empty()) {
                    ready_fd.raise();
                }
                return Ok(packet);
            }
            // A thread that receives packets takes the receive lock first, and raises it later.
            if let Some(ready_fd) = self.ready_fd.get() {
                ready_fd.lower();
            }
            match self.end_of_stream(None) {
                None => {}
                Some(None) => return Err(TryRecvError::Closed),
                Some(Some(error)) => return Err(TryRecvError::Failed(error)),
            }
            if self.hold.is_held() {
                return Err(TryRecvError::Empty);
            }
            let received = self.receive(&mut receiver, RECEIVE_BATCH);
            let none = receiver.packets.is_empty();
            drop(receiver);
            match received {
                Ok(true) if none => {
                    self.with(|core| core.machine.flush());
                    return Err(TryRecvError::Empty);
                }
                Ok(_) => self.perform_pending(),
                Err(source) => return Err(TryRecvError::Failed(unusable("receive packet", source))),
            }
        }
    }

    pub(crate) fn readable_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        if self.ready_fd.get().is_none() {
            let ready_fd = ReadyFd::new(self.socket.fd()).map_err(|source| Error::os("create a descriptor", source))?;
            let ready_fd = self.ready_fd.get_or_init(|| ready_fd);
            let ended = {
                let core = self.core();
                core.machine.life().has_ended() || core.machine.has_failed()
            };
            if ended || !lock(&self.receiver).packets.is_empty() {
                ready_fd.raise();
            }
        }
        self.ready_fd.get().map(ReadyFd::fd).ok_or_else(|| self.closed("create a descriptor for queue"))
    }

    /// Sends all gathered verdicts. `round` belongs to the waiting caller, and is `None` at first.
    pub(crate) fn poll_flush(&self, round: &mut Option<u64>, cx: &mut Context<'_>) -> Poll<()> {
        let wanted = match *round {
            Some(wanted) => Some(wanted),
            None => self.with(|core| core.machine.flush()),
        };
        let Some(wanted) = wanted else { return Poll::Ready(()) };
        let waker = cx.waker().clone();
        let mut core = self.core();
        if core.machine.has_ended(wanted) {
            *round = None;
            return Poll::Ready(());
        }
        // The thread that is sending wakes the task afterwards.
        *round = Some(wanted);
        let spare = core.wakers.wait(waker);
        drop(core);
        drop(spare);
        Poll::Pending
    }

    /// Sends the gathered verdicts, or lets the thread that is sending do so.
    pub(crate) fn flush_gathered(&self) {
        self.with(|core| _ = core.machine.flush());
    }

    /// The next unread refusal, if there is one.
    pub(crate) fn next_refusal(&self) -> Option<Error> {
        self.core().machine.next_refusal()
    }

    /// The next unread refusal.
    pub(crate) fn poll_refusal(&self, cx: &mut Context<'_>) -> Poll<Option<Error>> {
        let waker = cx.waker().clone();
        let mut core = self.core();
        if let Some(error) = core.machine.next_refusal() {
            return Poll::Ready(Some(error));
        }
        // A verdict for a packet that is still held will be too late.
        if core.machine.life().is_closed() && !self.handed_out.is_any_held() {
            return Poll::Ready(None);
        }
        let spare = core.wakers.wait_for_refusals(waker);
        drop(core);
        drop(spare);
        Poll::Pending
    }
}

/// The error with which the stream ends because a system call on the socket has failed for a reason
/// that does not pass.
pub(super) fn unusable(operation: &'static str, source: io::Error) -> Error {
    let detail = "the socket cannot be used any more; drop the queue and bind it again";
    Error::os(operation, source).with_detail(detail).fatal()
}

/// Polls the task again after the runtime has run the other ready tasks and checked for I/O. This
/// is in addition to the registered readiness: the runtime may lose such a wake-up (of a task
/// within the root future, when `block_on` returns).
fn poll_again(cx: &mut Context<'_>) {
    let polled = pin!(tokio::task::yield_now()).poll(cx);
    debug_assert!(polled.is_pending(), "it yields once");
}
