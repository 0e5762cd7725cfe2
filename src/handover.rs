//! Handing queues over to another process.

#[cfg(feature = "divert")]
mod table;

use std::{
    fmt,
    ops::RangeInclusive,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::net::UnixStream;

#[cfg(feature = "divert")]
use crate::io::PassedPart;
use crate::{
    io::{
        Frozen, Passed, PassedQueue, Shared, acknowledge, await_acknowledgement, packed, receive_descriptors,
        send_descriptors, take_back, unpacked,
    },
    numbers::QueueNumbers,
    record::{PartRecord, Record},
    types::{Error, ErrorKind},
};

/// Queues that are about to be handed over to another process, from
/// [`VerdictSink::hand_over`](crate::VerdictSink::hand_over).
///
/// While it exists, no process receives the queues' packets: they wait in the kernel, up to
/// [`max_len`](crate::QueueBuilder::max_len) and the receive buffer. If it is dropped, or if
/// [`send`](Self::send) fails, the queues continue in this process as if nothing had happened. So
/// there is no time at which a failure of the successor costs a packet.
///
/// What is handed over are the netlink sockets themselves, with all that is unread in them, and the
/// position of this process: which packet ids have been seen, which packets were received but not
/// handed out, and the settings that the kernel has. The sockets stay in their network namespaces,
/// whichever namespace the successor is in.
///
/// There are two ways to the successor:
///
/// * [`send`](Self::send): a Unix socket, with a successor that runs already. It acknowledges.
/// * [`descriptors`](Self::descriptors), then [`release`](Self::release): for a service manager
///   that keeps descriptors while the service restarts.
///
/// The page [`guide::restarting`](crate::guide::restarting) shows both.
#[must_use = "the queues continue in this process when it is dropped"]
pub struct Handover {
    queues: Vec<Frozen>,
    parts: Vec<Part>,
}

/// What goes along with queues: a netlink socket, and bytes that say what it is to this process.
pub(crate) struct Part {
    pub(crate) socket: OwnedFd,
    pub(crate) record: PartRecord,
    /// This process does not use the socket until this is called.
    pub(crate) use_again: UseAgain,
}

pub(crate) type UseAgain = Box<dyn Fn() + Send + Sync>;

impl Handover {
    pub(crate) fn new(queues: Vec<Frozen>) -> Self {
        Self { queues, parts: Vec::new() }
    }

    #[cfg(feature = "divert")]
    pub(crate) fn push(&mut self, part: Part) {
        self.parts.push(part);
    }

    /// Hands over the queues of both together: the successor takes all of them or none.
    pub fn with(mut self, mut other: Self) -> Self {
        self.queues.append(&mut other.queues);
        self.parts.append(&mut other.parts);
        self
    }

    /// How many packets were still undecided when the time of
    /// [`hand_over`](crate::VerdictSink::hand_over) was over. They have got the
    /// [default action](crate::QueueBuilder::on_unanswered).
    pub fn unanswered(&self) -> usize {
        self.queues.iter().map(Frozen::unanswered).sum()
    }

    /// Hands the queues over to the process at the other end of a connection, and waits for
    /// `within` at most until it has [accepted](Takeover::accept) them.
    ///
    /// If it returns `Ok`, the queues belong to the successor, and their streams end here. If it
    /// returns an error, they continue in this process, and the successor's `accept` returns an
    /// error: there is never a time at which both or none of them have the queues.
    ///
    /// The connection is used for nothing else, neither before nor after. The process at the other
    /// end can take the packets: let only your own service connect, by the permissions of the
    /// socket's directory, or check [`peer_cred`](UnixStream::peer_cred).
    ///
    /// # Errors
    /// * `TimedOut`: the successor has not accepted in time.
    /// * `Disconnected`: it has ended or closed the connection.
    /// * `Malformed`: its reply is not one of this crate.
    /// * `InvalidInput`: more than 252 descriptors; each queue takes two of them, each table one.
    /// * `Other`: another error of the operating system; also if packets that have been received
    ///   and not handed out take more than 256 MiB, the most that a successor reads.
    ///
    /// # Cancel safety
    /// If the future is dropped, the queues continue here, unless the successor has accepted them
    /// by then.
    pub async fn send(self, stream: UnixStream, within: Duration) -> Result<(), Error> {
        let limit = Instant::now().checked_add(within);
        let memory = packed(&self.record())?;
        let mut offered = Offered { stream, handover: Some(self) };
        let result = offered.converse(&memory, limit).await;
        // Whatever the result, it is decided here who has the queues.
        match (offered.end()?, result) {
            (true, _) => Ok(()),
            (false, Err(error)) => Err(error),
            (false, Ok(())) => Err(Error::new(ErrorKind::Disconnected, "hand over")),
        }
    }

    /// Descriptors with which a successor can continue: copies of the sockets, and a file in memory
    /// with the position. They may be kept in any order, for example by the file descriptor store
    /// of systemd (`FDSTORE=1`), and are for [`Takeover::from_descriptors`].
    ///
    /// When they are kept, call [`release`](Self::release). If a successor may have begun with
    /// them, this value must not be dropped without that: both processes would then receive.
    ///
    /// # Errors
    /// The process or the system has no free descriptor, or no memory.
    pub fn descriptors(&self) -> Result<Vec<OwnedFd>, Error> {
        let memory = packed(&self.record())?;
        let copies = self.borrowed().into_iter().map(|fd| fd.try_clone_to_owned());
        let copies = copies.collect::<Result<Vec<_>, _>>().map_err(|source| Error::os("hand over", source))?;
        Ok([memory].into_iter().chain(copies).collect())
    }

    /// Gives the queues up: their streams end, and nothing is unbound. The queues exist as long as
    /// their [`descriptors`](Self::descriptors) do; without a copy of these, the kernel drops what
    /// is queued when the last handle of a queue is dropped.
    pub fn release(mut self) {
        self.queues.drain(..).for_each(Frozen::release);
        // The parts are not used here any more.
        self.parts.clear();
    }

    fn record(&self) -> Record {
        Record {
            queues: self.queues.iter().map(|queue| queue.record().clone()).collect(),
            parts: self.parts.iter().map(|part| part.record.clone()).collect(),
        }
    }

    fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        let queues = self.queues.iter().flat_map(Frozen::descriptors);
        queues.chain(self.parts.iter().map(|part| part.socket.as_fd())).collect()
    }
}

impl Drop for Handover {
    fn drop(&mut self) {
        // The queues continue in this process.
        for part in &self.parts {
            (part.use_again)();
        }
    }
}

impl fmt::Debug for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queues: Vec<u16> = self.queues.iter().map(|queue| queue.record().queue).collect();
        f.debug_struct("Handover").field("queues", &queues).field("parts", &self.parts.len()).finish_non_exhaustive()
    }
}

/// A handover that may be with the successor already.
struct Offered {
    stream: UnixStream,
    handover: Option<Handover>,
}

impl Offered {
    async fn converse(&self, memory: &OwnedFd, limit: Option<Instant>) -> Result<(), Error> {
        let Some(handover) = &self.handover else { return Ok(()) };
        let descriptors: Vec<BorrowedFd<'_>> = [memory.as_fd()].into_iter().chain(handover.borrowed()).collect();
        send_descriptors(&self.stream, &descriptors).await?;
        await_acknowledgement(&self.stream, limit).await
    }

    /// Finds out which process has the queues from now on. Returns whether it is the successor.
    fn end(&mut self) -> Result<bool, Error> {
        let Some(handover) = self.handover.take() else { return Ok(false) };
        let taken = take_back(&self.stream)?;
        if taken {
            handover.release();
        }
        Ok(taken)
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// Queues that another process hands over to this one.
///
/// ```no_run
/// use tokio::net::UnixStream;
/// use tokio_nfqueue::{Action, Queue, handover::Takeover};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let stream = UnixStream::connect("/run/filter/handover").await?;
/// let mut takeover = Takeover::receive(stream).await?;
/// let queue = Queue::builder(0).on_unanswered(Action::Accept).take_over(&mut takeover)?;
/// // All that can fail in this process should be done by now: from here on the queue is ours.
/// takeover.accept().await?;
/// # let _ = queue;
/// # Ok(())
/// # }
/// ```
///
/// Until [`accept`](Self::accept), nothing has happened to the queues: if this value is dropped,
/// the predecessor continues. Until then the streams of the queues return no packets.
#[must_use = "the predecessor continues unless it is accepted"]
pub struct Takeover {
    passed: Passed,
    stream: Option<UnixStream>,
    queues: Vec<Arc<Shared>>,
    /// See [`Part`].
    parts: Vec<UseAgain>,
}

impl Takeover {
    /// Waits for what the predecessor [sends](Handover::send).
    ///
    /// # Errors
    /// * `Disconnected`: the predecessor has ended or closed the connection before it had sent
    ///   everything.
    /// * `Incompatible`: it uses a version of this crate with another format. Both are named. It
    ///   continues.
    /// * `Malformed`: what arrived is not a hand-over of this crate.
    /// * `Other`: another error of the operating system, for example too few free descriptors.
    ///
    /// # Cancel safety
    /// If the future is dropped, the connection is closed, and the predecessor continues.
    pub async fn receive(stream: UnixStream) -> Result<Self, Error> {
        let descriptors = receive_descriptors(&stream).await?;
        Ok(Self::new(unpacked(descriptors)?, Some(stream)))
    }

    /// From [`Handover::descriptors`], in any order, also those of several hand-overs. If a store
    /// of descriptors still has an older description of the same queue, the newer one holds. The
    /// process that has made them must have [released](Handover::release) the queues.
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    pub fn from_descriptors(descriptors: impl IntoIterator<Item = OwnedFd>) -> Result<Self, Error> {
        Ok(Self::new(unpacked(descriptors.into_iter().collect())?, None))
    }

    fn new(passed: Passed, stream: Option<UnixStream>) -> Self {
        Self { passed, stream, queues: Vec::new(), parts: Vec::new() }
    }

    /// The numbers of the queues that have not been
    /// [taken over](crate::QueueBuilder::take_over) yet.
    pub fn queues(&self) -> Vec<u16> {
        self.passed.queues.iter().map(|queue| queue.record.queue).collect()
    }

    /// The numbers of queues that have not been taken over yet, or the first of so many in a row.
    pub(crate) fn find(&self, numbers: &QueueNumbers) -> Option<RangeInclusive<u16>> {
        let offered = |number| self.position(number).is_some();
        let mut candidates = numbers.candidates();
        while let Some(missing) = candidates.numbers().find(|number| !offered(*number)) {
            candidates.skip(missing)?;
        }
        Some(candidates.range())
    }

    /// One that [`find`](Self::find) has returned.
    pub(crate) fn queue(&self, number: u16) -> &PassedQueue {
        &self.passed.queues[self.position(number).expect("a queue that was found")]
    }

    pub(crate) fn taken(&mut self, queue: &Arc<Shared>) {
        self.passed.queues.retain(|passed| passed.record.queue != queue.number());
        self.queues.push(Arc::clone(queue));
    }

    fn position(&self, number: u16) -> Option<usize> {
        self.passed.queues.iter().position(|passed| passed.record.queue == number)
    }

    #[cfg(feature = "divert")]
    pub(crate) fn parts_left(&self) -> &[PassedPart] {
        &self.passed.parts
    }

    /// A part has been taken over. It may be used when everything has been accepted.
    #[cfg(feature = "divert")]
    pub(crate) fn part_taken(&mut self, index: usize, use_it: UseAgain) {
        self.passed.parts.remove(index);
        self.parts.push(use_it);
    }

    /// Takes everything over: from here on the queues belong to this process, and their streams
    /// return packets, beginning with those that the predecessor had received and not handed out.
    ///
    /// If the predecessor ends after it has sent the queues, this succeeds: no other process has
    /// them.
    ///
    /// # Errors
    /// In each case the queues of this process are closed, and the predecessor continues:
    /// * `InvalidInput`: a queue or a table has not been taken over.
    /// * `TimedOut`: the predecessor has not waited any longer.
    /// * `Other`: another error of the operating system.
    ///
    /// # Cancel safety
    /// Not cancel safe in one case: if the future is dropped after the first poll, it is unknown
    /// who has the queues; if it is this process, they are lost. The first poll returns `Ready`
    /// except if the predecessor has just taken the queues back.
    pub async fn accept(mut self) -> Result<(), Error> {
        let left = match (self.passed.queues.first(), self.passed.parts.len()) {
            (Some(queue), _) => Some(format!("queue {} has not been taken over", queue.record.queue)),
            (None, 1..) => Some("a table has not been taken over; see `take_divert`".to_owned()),
            (None, 0) => None,
        };
        if let Some(detail) = left {
            return Err(Error::new(ErrorKind::InvalidInput, "take over").with_detail(detail));
        }
        if let Some(stream) = &self.stream {
            acknowledge(stream).await?;
        }
        for use_it in self.parts.drain(..) {
            use_it();
        }
        for queue in self.queues.drain(..) {
            queue.resume();
        }
        Ok(())
    }
}

impl Drop for Takeover {
    fn drop(&mut self) {
        for queue in self.queues.drain(..) {
            queue.release();
        }
    }
}

impl fmt::Debug for Takeover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Takeover").field("queues", &self.queues()).finish_non_exhaustive()
    }
}
