//! The receive half of a queue.

use std::{
    fmt,
    ops::RangeInclusive,
    os::fd::BorrowedFd,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use futures::{Stream, stream::FusedStream};
use tokio::task::coop;

use crate::{
    io::{AnyReadyFd, Received, Shared},
    packet::Packet,
    rules::Rules,
    types::{Error, ErrorKind, Stats, TryRecvError},
};

/// The receive half of a queue.
///
/// Its items are packets. An `Err` item is fatal and the last item, so a program may use `?` on
/// every item. The error's text says what to do:
///
/// | kind | reason | what to do |
/// |---|---|---|
/// | `NotPermitted` | the process has lost `CAP_NET_ADMIN` for more than 3 s | start again, and keep it |
/// | `NoRuntime` | the runtime in which the queue was bound has ended | bind in another runtime; [`try_recv`](Self::try_recv) still receives |
/// | `Other` | a system call on the socket fails, with this [errno](Error::raw_os_error) | drop the queue and bind it again |
///
/// Errors that concern one verdict or one message are in
/// [`VerdictSink::refusals`](crate::VerdictSink::refusals). A network
/// namespace does not go away under a queue: its socket keeps the namespace in existence, also when
/// the last process has left it and its name has been removed.
///
/// Overload is not an error: lost packets are counted in
/// [`Lost::packets`](crate::stats::Lost::packets), and the stream continues. `None` follows only
/// when the queue has been closed, or after an error.
///
/// If the queue has several numbers, each gives up to 64 packets in turn, and the stream ends when
/// all of them have ended. [`into_each`](Self::into_each) makes a stream for each number.
///
/// The stream belongs to the runtime in which the queue was bound: the I/O driver of that runtime
/// wakes it. If that runtime is not driven, [`try_recv`](Self::try_recv) still receives.
///
/// Dropping it closes the queue: see [`Queue`](crate::Queue). `let (_, sink) = queue.split()` drops
/// it at once.
pub struct PacketStream {
    sources: Sources,
    rules: Option<Arc<Rules>>,
}

enum Sources {
    One(Source),
    Several(Several),
}

impl PacketStream {
    pub(crate) fn new(queues: &[Arc<Shared>], rules: Option<Arc<Rules>>) -> Self {
        let source = |shared: &Arc<Shared>| Source { shared: Arc::clone(shared), ended: false };
        let sources = match queues {
            [one] => Sources::One(source(one)),
            several => Sources::Several(Several {
                sources: several.iter().map(source).collect(),
                turn: 0,
                given: 0,
                ready: OnceLock::new(),
            }),
        };
        Self { sources, rules }
    }

    /// A stream for each number, in their order, for a task each. [`QueueNumbers`] says how a queue
    /// has several. The queue's own rules are removed when all streams have been dropped.
    ///
    /// [`QueueNumbers`]: crate::QueueNumbers
    pub fn into_each(mut self) -> Vec<Self> {
        let Sources::Several(several) = &mut self.sources else { return vec![self] };
        let sources = std::mem::take(&mut several.sources);
        if let Some(rules) = &self.rules {
            // `self` is dropped, too.
            rules.divided(sources.len());
        }
        sources.into_iter().map(|source| Self { sources: Sources::One(source), rules: self.rules.clone() }).collect()
    }

    /// Receives a packet.
    ///
    /// # Errors
    /// As the stream's items.
    ///
    /// # Cancel safety
    /// Cancel safe: no packet is lost.
    pub async fn recv(&mut self) -> Option<Result<Packet, Error>> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    /// Waits for a packet, then appends what has been received already, up to `limit` packets in
    /// all, to `packets`. Returns their number; 0 means that the stream has ended, or that `limit`
    /// is 0.
    ///
    /// # Errors
    /// As the stream's items; then nothing has been appended.
    ///
    /// # Cancel safety
    /// Cancel safe: no packet is lost.
    pub async fn recv_many(&mut self, packets: &mut Vec<Packet>, limit: usize) -> Result<usize, Error> {
        if limit == 0 {
            return Ok(0);
        }
        match self.recv().await {
            None => Ok(0),
            Some(Err(error)) => Err(error),
            Some(Ok(first)) => {
                packets.push(first);
                let mut count = 1;
                for source in self.sources_mut() {
                    count += source.take_received(packets, limit - count);
                }
                Ok(count)
            }
        }
    }

    /// Takes a packet if there is one: of those received already, or else from the socket. For
    /// event loops without a runtime. If there is no packet, the gathered verdicts are sent.
    ///
    /// # Errors
    /// * `Empty`: there is no packet now.
    /// * `Closed`: the queue is closed.
    /// * `Failed`: as an `Err` item of the stream.
    pub fn try_recv(&mut self) -> Result<Packet, TryRecvError> {
        match &mut self.sources {
            Sources::One(source) => source.try_recv(),
            Sources::Several(several) => several.try_recv(),
        }
    }

    /// As [`try_recv`](Self::try_recv), but appends up to `limit` packets to `packets`, and returns
    /// their number, which is 0 only if `limit` is. [`readable_fd`](Self::readable_fd) has an
    /// example.
    ///
    /// # Errors
    /// As `try_recv`; then nothing has been appended.
    pub fn try_recv_many(&mut self, packets: &mut Vec<Packet>, limit: usize) -> Result<usize, TryRecvError> {
        if limit == 0 {
            return Ok(0);
        }
        packets.push(self.try_recv()?);
        let mut count = 1;
        for source in self.sources_mut() {
            count += source.take_received(packets, limit - count);
        }
        Ok(count)
    }

    /// A descriptor that is readable when [`try_recv`](Self::try_recv) may have a packet or the end
    /// of the stream, for event loops that use `poll(2)` or `epoll(7)`. It stays the same while the
    /// stream exists, and must not be read from.
    ///
    /// The rule: after `try_recv` has returned `Empty`, wait until the descriptor is readable. Then
    /// call `try_recv` until it returns `Empty` again, or until the stream has ended.
    ///
    /// While the queue is [handed over](crate::VerdictSink::hand_over), the descriptor may be
    /// readable although `try_recv` returns `Empty`: wait for the end of the hand-over instead.
    ///
    /// It is created at the first call and covers the socket, the packets that were received for
    /// another reason (a [`confirm`](crate::Verdict::confirm), a deadline), and the end of the
    /// stream, whatever closes the queue or hands it over. It costs two more descriptors for each
    /// number, and one more if there are several.
    ///
    /// The runtime in which the queue was bound need not be driven; `migration` says what it is
    /// needed for.
    ///
    /// # Errors
    /// The process or the system has no free descriptor.
    ///
    /// # Examples
    #[doc = include_str!("poll_loop.md")]
    pub fn readable_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        match &self.sources {
            Sources::One(source) => source.shared.readable_fd(),
            Sources::Several(several) => several.readable_fd(),
        }
    }

    /// The counters: the sum, if there are several numbers.
    pub fn stats(&self) -> Stats {
        self.sources().iter().map(|source| source.shared.stats()).sum()
    }

    /// The number; the first, if there are several.
    pub fn queue_number(&self) -> u16 {
        *self.queue_numbers().start()
    }

    /// The numbers.
    pub fn queue_numbers(&self) -> RangeInclusive<u16> {
        let sources = self.sources();
        sources[0].shared.number()..=sources[sources.len() - 1].shared.number()
    }

    /// Sends the gathered verdicts.
    pub(crate) fn flush(&self) {
        self.sources().iter().for_each(|source| source.shared.flush_gathered());
    }

    /// At least one.
    fn sources(&self) -> &[Source] {
        match &self.sources {
            Sources::One(source) => std::slice::from_ref(source),
            Sources::Several(several) => &several.sources,
        }
    }

    fn sources_mut(&mut self) -> &mut [Source] {
        match &mut self.sources {
            Sources::One(source) => std::slice::from_mut(source),
            Sources::Several(several) => &mut several.sources,
        }
    }
}

impl Stream for PacketStream {
    type Item = Result<Packet, Error>;

    #[inline]
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match &mut self.sources {
            Sources::One(source) => source.poll_next(cx),
            Sources::Several(several) => several.poll_next(cx),
        }
    }
}

impl FusedStream for PacketStream {
    fn is_terminated(&self) -> bool {
        self.sources().iter().all(|source| source.ended)
    }
}

impl fmt::Debug for PacketStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacketStream").field("queues", &self.queue_numbers()).finish_non_exhaustive()
    }
}

impl Drop for PacketStream {
    fn drop(&mut self) {
        // Queues that have rules are closed after these.
        if self.rules.as_ref().is_none_or(|rules| rules.stream_dropped()) {
            self.sources().iter().for_each(|source| source.shared.stream_dropped());
        }
    }
}

/// The packets of one number.
struct Source {
    shared: Arc<Shared>,
    ended: bool,
}

impl Source {
    /// | state | what a poll does |
    /// |---|---|
    /// | a packet has been received | return it |
    /// | the queue has failed | return the error |
    /// | the queue is closing | end |
    /// | the socket may be readable | receive, and start again |
    /// | the socket was found empty | ask the flush policy |
    /// | the socket is not readable | look once more if busy polling is active (see [`busy_poll`](crate::QueueBuilder::busy_poll)), then wait |
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Packet, Error>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let coop = ready!(coop::poll_proceed(cx));
        let result = self.shared.poll_packet(cx).map(|item| item.map(|received| received.map(handed_out)));
        if let Poll::Ready(item) = &result {
            coop.made_progress();
            self.ended = match item {
                None => true,
                Some(Err(error)) => error.is_fatal(),
                Some(Ok(_)) => false,
            };
        }
        result
    }

    fn try_recv(&mut self) -> Result<Packet, TryRecvError> {
        if self.ended {
            return Err(TryRecvError::Closed);
        }
        let result = self.shared.try_packet().map(handed_out);
        self.ended = matches!(result, Err(TryRecvError::Closed | TryRecvError::Failed(_)));
        result
    }

    /// Appends up to `limit` packets that have been received already; returns their number.
    fn take_received(&mut self, packets: &mut Vec<Packet>, limit: usize) -> usize {
        let before = packets.len();
        self.shared.take_packets(limit, |received| packets.push(handed_out(received)));
        packets.len() - before
    }
}

fn handed_out(Received { packet, guard }: Received) -> Packet {
    Packet::new(packet, guard)
}

/// The packets of several numbers.
struct Several {
    sources: Vec<Source>,
    /// Whose turn it is, and how many packets that source has given in this turn.
    turn: usize,
    given: usize,
    /// Made at the first use.
    ready: OnceLock<AnyReadyFd>,
}

/// Packets that a source gives before it is the next one's turn: as many as one round of receiving
/// brings, so that the cost of polling the others is not paid for each packet.
const TURN: usize = 64;

impl Several {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Packet, Error>>> {
        let count = self.sources.len();
        let mut ended = 0;
        for offset in 0..count {
            let index = (self.turn + offset) % count;
            match self.sources[index].poll_next(cx) {
                Poll::Ready(Some(item)) => {
                    self.took(index, offset);
                    return Poll::Ready(Some(item));
                }
                Poll::Ready(None) => ended += 1,
                Poll::Pending => {}
            }
        }
        if ended == count { Poll::Ready(None) } else { Poll::Pending }
    }

    fn try_recv(&mut self) -> Result<Packet, TryRecvError> {
        let count = self.sources.len();
        let mut closed = 0;
        for offset in 0..count {
            let index = (self.turn + offset) % count;
            match self.sources[index].try_recv() {
                Ok(packet) => {
                    self.took(index, offset);
                    return Ok(packet);
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Closed) => closed += 1,
                Err(TryRecvError::Failed(error)) => return Err(TryRecvError::Failed(error)),
            }
        }
        Err(if closed == count { TryRecvError::Closed } else { TryRecvError::Empty })
    }

    fn readable_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        if self.ready.get().is_none() {
            let ready = AnyReadyFd::new().map_err(|source| Error::os("create a descriptor", source))?;
            for source in &self.sources {
                ready.add(source.shared.readable_fd()?).map_err(|error| Error::os("create a descriptor", error))?;
            }
            return Ok(self.ready.get_or_init(|| ready).fd());
        }
        self.ready.get().map(AnyReadyFd::fd).ok_or_else(|| Error::new(ErrorKind::Closed, "create a descriptor"))
    }

    /// The packet came from the source at `index`, which is `offset` behind the one whose turn it
    /// was.
    fn took(&mut self, index: usize, offset: usize) {
        self.given = if offset == 0 { self.given + 1 } else { 1 };
        self.turn = index;
        if self.given == TURN {
            (self.turn, self.given) = ((index + 1) % self.sources.len(), 0);
        }
    }
}
