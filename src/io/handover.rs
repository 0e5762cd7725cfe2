//! Handing a queue over to another process, and taking it over.
//!
//! The netlink socket itself is passed: verdicts must come from the socket that bound the queue
//! (`verdict_instance_lookup` compares port ids), and what lies unread in it stays there. What only
//! this process knows goes along in a record. The steps of the predecessor:
//!
//! 1. Nothing is handed out any more (`Hold::is_held`). What is read from the socket meanwhile,
//!    for the sake of a reply, is kept.
//! 2. Verdicts that are owed are awaited; at the limit the rest gets the default action.
//! 3. When everything is sent, the socket is not touched any more (`Hold::is_frozen`), and the
//!    record is made.
//! 4. Either the queue continues here, or it is released: closed, but not unbound.
//!
//! The successor begins at step 4.

use std::{
    collections::HashSet,
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use rustix::net::sockopt;

use super::{
    busy_poll::BusyPoll,
    driver,
    exchange::{HAND_OVER, TAKE_OVER, unreadable},
    kernel::KernelTable,
    passed::PassedQueue,
    raw_packet::RawPacket,
    receiver::Receiver,
    shared::{Settings, Shared, lock},
    socket::{Socket, Unregistered, own_port},
    sys::{self, Owner},
};
use crate::{
    record::{QueueRecord, Unreadable},
    state::{Arrival, Clock, Limits, Machine, Position, Storage, WaitLimit, flush::FlushPolicy},
    types::{Error, ErrorKind},
    wire::{Message, Messages},
};

/// A queue that is not touched any more. It continues if this is dropped.
#[derive(Debug)]
pub(crate) struct Frozen {
    shared: Arc<Shared>,
    record: QueueRecord,
    unanswered: usize,
    released: bool,
}

impl Frozen {
    pub(crate) fn record(&self) -> &QueueRecord {
        &self.record
    }

    /// How many packets got the default action at the limit.
    pub(crate) fn unanswered(&self) -> usize {
        self.unanswered
    }

    /// The socket, and the kernel's table of queues if it could be opened.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let table = self.shared.table.file().map(File::as_fd);
        [self.shared.socket.fd()].into_iter().chain(table).collect()
    }

    /// The successor has the queue.
    pub(crate) fn release(mut self) {
        self.released = true;
        self.shared.release();
        self.shared.trace.handed_over(self.record.unread.len());
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if !self.released {
            self.shared.resume();
        }
    }
}

/// Lets the queue continue when it is dropped.
struct Resume<'a>(Option<&'a Shared>);

impl Drop for Resume<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.0 {
            shared.resume();
        }
    }
}

/// What the steps before the freezing remember.
#[derive(Default)]
struct Settling {
    unanswered: usize,
    /// Replies have been looked for.
    looked: bool,
}

impl Shared {
    /// Steps 1 to 3. If the future is dropped, the queue continues.
    pub(crate) async fn hand_over(self: &Arc<Self>, within: Duration) -> Result<Frozen, Error> {
        if self.socket.is_in_memory() {
            let error = Error::new(ErrorKind::Unsupported, self.operation());
            return Err(error.with_detail("the queue of a simulated kernel stays in its process"));
        }
        let limit = self.clock.now().checked_add(within).map_or(WaitLimit::Never, WaitLimit::At);
        self.prove_sent();
        self.with(|core| {
            if core.machine.begin_hand_over(limit) {
                return Ok(());
            }
            let error = self.closed("hand over queue");
            Err(match core.machine.life().is_handing_over() {
                true => error.with_kind(ErrorKind::InvalidInput).with_detail("it is being handed over already"),
                false => error,
            })
        })?;
        let mut resume = Resume(Some(self));
        let mut settling = Settling::default();
        let record = std::future::poll_fn(|cx| self.poll_freeze(&mut settling, cx)).await?;
        resume.0 = None;
        Ok(Frozen { shared: Arc::clone(self), record, unanswered: settling.unanswered, released: false })
    }

    fn poll_freeze(&self, settling: &mut Settling, cx: &mut Context<'_>) -> Poll<Result<QueueRecord, Error>> {
        let waker = cx.waker().clone();
        let spare = self.core().wakers.wait(waker);
        drop(spare);
        loop {
            let outbox = lock(&self.outbox);
            let receiver = lock(&self.receiver);
            let mut core = self.core();
            let machine = &mut core.machine;
            if let Some(error) = machine.failure() {
                let error = Error::new(error.kind(), self.operation()).with_detail(format!("it has failed: {error}"));
                return Poll::Ready(Err(error));
            }
            let due = machine.is_hand_over_due();
            let owed = machine.owed(receiver.packets.iter().map(|packet| packet.id));
            if owed > 0 && due {
                let unread: HashSet<u32> = receiver.packets.iter().map(|packet| packet.id).collect();
                settling.unanswered += machine.give_up_owed(&unread);
            }
            let sent = machine.is_all_sent();
            if owed == 0 && sent && (settling.looked || !machine.awaits_replies()) {
                let position = machine.freeze();
                let undecided = receiver.packets.iter().filter(|packet| machine.is_undecided(packet.id));
                let unread = undecided.map(|packet| (packet.id, packet.datagram())).collect();
                let limits = machine.limits();
                let longest = receiver.payload();
                drop((core, receiver, outbox));
                self.perform_pending();
                return Poll::Ready(self.record(position, limits, longest, unread));
            }
            drop((core, receiver, outbox));
            if owed > 0 && !due {
                // A flush that found the send lock taken.
                self.with(|core| core.machine.flush_if_wanted());
                return Poll::Pending;
            }
            if sent && owed == 0 {
                // The replies are in the socket, behind packets.
                settling.looked = true;
                if let Err(source) = self.receive_all() {
                    return Poll::Ready(Err(Error::os(self.operation(), source)));
                }
                self.perform_pending();
                continue;
            }
            self.with(|core| core.machine.flush());
            let (sent, sends_later) = {
                let core = self.core();
                (core.machine.is_all_sent(), core.machine.sends_later())
            };
            if !sent {
                if due && sends_later {
                    let error = Error::new(ErrorKind::TimedOut, self.operation());
                    return Poll::Ready(Err(error.with_detail("verdicts cannot be sent")));
                }
                // Woken after the next send.
                return Poll::Pending;
            }
        }
    }

    fn record(
        &self,
        position: Position,
        limits: Limits,
        longest: usize,
        unread: Vec<(u32, Bytes)>,
    ) -> Result<QueueRecord, Error> {
        let cookie =
            sockopt::socket_cookie(self.socket.fd()).map_err(|errno| Error::os(self.operation(), errno.into()))?;
        Ok(QueueRecord {
            cookie,
            port_id: self.socket.port_id(),
            queue: self.settings.queue,
            max_len: limits.max_len,
            payload: limits.payload as u32,
            longest: longest as u32,
            conntrack: self.settings.conntrack,
            attributes: self.settings.attributes as u32,
            next: position.next,
            sequence: position.sequence,
            batches: position.batches,
            unknown: position.unknown,
            unread: unread.into_iter().map(|(id, datagram)| (id, datagram.to_vec())).collect(),
        })
    }

    fn operation(&self) -> String {
        format!("{HAND_OVER} queue {}", self.settings.queue)
    }

    /// The queue continues here.
    pub(crate) fn resume(&self) {
        self.with(|core| core.machine.resume());
    }

    /// The queue continues elsewhere, or not at all: it is closed here, without being unbound.
    pub(crate) fn release(&self) {
        if let Some(timer) = self.timer.get() {
            timer.unwatch(self.socket.fd());
        }
        let unread = std::mem::take(&mut lock(&self.receiver).packets);
        self.with(|core| core.machine.release());
        drop(unread);
    }

    /// A queue that continues where its predecessor has stopped, frozen. [`resume`](Self::resume)
    /// is called when the predecessor has given it up, and [`release`](Self::release) if it does
    /// not.
    pub(crate) fn take_over(settings: Settings, policy: FlushPolicy, passed: &PassedQueue) -> Result<Arc<Self>, Error> {
        let operation = || format!("{TAKE_OVER} queue {}", settings.queue);
        let os = |source| Error::os(operation(), source);
        let PassedQueue { record, socket, table } = passed;
        let network_owner = owner_of(socket.as_fd()).map_err(|error| error.with_operation(operation()))?;
        let settings = Settings { conntrack: record.conntrack, attributes: record.attributes as usize, ..settings };
        let table = table.as_ref().map(File::try_clone).transpose().map_err(os)?;
        let table = match table {
            Some(file) => KernelTable::of(file),
            None if is_in_namespace_of(socket.as_fd()) => KernelTable::open(),
            None => KernelTable::out_of_reach(),
        };
        let socket = Unregistered::adopt(socket.try_clone().map_err(os)?)?;
        let socket = Socket::new(socket).map_err(|error| error.with_operation(operation()))?;

        let limits = Limits { max_len: record.max_len, payload: record.payload as usize };
        let mut receiver = Receiver::new(record.longest as usize, BusyPoll::new(settings.busy_poll));
        for (id, datagram) in &record.unread {
            let packet = Messages::new(datagram).find_map(|message| match message {
                Message::Packet(packet) if packet.id == *id => Some(packet),
                _ => None,
            });
            let packet = packet.ok_or_else(|| unreadable(Unreadable::Malformed).with_operation(operation()))?;
            let storage = Storage::Own { bytes: datagram.len() as u32 };
            receiver.packets.push_back(RawPacket::new(Bytes::copy_from_slice(datagram), &packet, storage));
        }
        let fixed = settings.fixed();
        let first = record.unread.first().map_or(record.next, |(id, _)| *id);
        let mut machine = Machine::new(fixed, policy, limits, first, socket.clock());
        let position =
            Position { next: record.next, batches: record.batches, unknown: record.unknown, sequence: record.sequence };
        let arrivals = receiver.packets.iter().map(|packet| Arrival { id: packet.id, storage: packet.storage });
        machine.inherit(position, arrivals);

        let shared = Arc::new(Self::new(settings, socket, table, machine, receiver, network_owner));
        own_port(shared.socket.port_id());
        shared.last_sent.store(record.sequence);
        driver::start(&shared).map_err(os)?;
        shared.trace.taken_over(record.unread.len());
        Ok(shared)
    }
}

/// Whether the calling thread is in the socket's network namespace.
fn is_in_namespace_of(socket: BorrowedFd<'_>) -> bool {
    let of_socket = sys::network_namespace_of(socket).and_then(rustix::fs::fstat);
    let of_thread = rustix::fs::stat("/proc/thread-self/ns/net");
    let file = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    matches!((of_socket.map(file), of_thread.map(file)), (Ok(one), Ok(another)) if one == another)
}

/// The owner of a socket's network namespace. This is also the kernel's check of the capability
/// that sending needs: SIOCGSKNS requires `CAP_NET_ADMIN` in that user namespace (`sock_ioctl`).
fn owner_of(socket: BorrowedFd<'_>) -> Result<Owner, Error> {
    sys::network_namespace_of(socket).map(sys::network_owner_of).map_err(|errno| {
        let error = Error::os(TAKE_OVER, errno.into());
        match error.kind() {
            ErrorKind::NotPermitted => error
                .with_detail("CAP_NET_ADMIN is needed in the user namespace that owns the socket's network namespace"),
            _ => error,
        }
    })
}
