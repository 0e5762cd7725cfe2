//! Rules, with the feature `divert`.

use std::{
    ops::RangeInclusive,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use nfqueue_divert::{DivertBuilder, Installation};
use tokio::sync::watch;

#[cfg(feature = "handover")]
use crate::handover::{Handover, Takeover};
use crate::{
    divert::Divert,
    io::Shared,
    rules::How,
    types::{Error, ErrorKind, FlowMarks},
};

/// The rules that a queue is to have.
#[derive(Debug, Clone)]
pub(crate) struct Wanted(Option<Box<DivertBuilder>>);

impl Wanted {
    pub(crate) fn none() -> Self {
        Self(None)
    }

    pub(crate) fn new(rules: DivertBuilder) -> Self {
        Self(Some(Box::new(rules)))
    }

    /// Whether there are rules that fail closed.
    pub(crate) fn fail_closed(&self) -> bool {
        self.0.as_ref().is_some_and(|rules| rules.fails_closed())
    }

    /// The flow marks of the queue, if it has been given these.
    pub(crate) fn flow_marks(&self, of_queue: Option<FlowMarks>) -> Result<Option<FlowMarks>, &'static str> {
        let Some(rules) = &self.0 else { return Ok(of_queue) };
        match (of_queue, rules.chosen_flow_marks()) {
            (Some(of_queue), Some(of_rules)) if of_rules != Some(of_queue) => {
                Err("flow marks: those of the rules are others than those of the queue")
            }
            (Some(marks), _) => Ok(Some(marks)),
            (None, Some(of_rules)) => Ok(of_rules),
            (None, None) => Ok(rules.can_have_flow_marks().then(FlowMarks::default)),
        }
    }

    #[cfg(feature = "test-util")]
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let rules = self.0.as_ref().map(|rules| rules.as_ref().clone().default_queues(0..=0));
        rules.map_or(Ok(()), |rules| rules.validate())
    }

    /// Checks the rules, and opens their socket in the calling thread's network namespace.
    pub(crate) fn prepare(
        &self,
        queues: RangeInclusive<u16>,
        marks: Option<FlowMarks>,
    ) -> Result<PreparedRules, Error> {
        let rules = self.0.as_ref().map(|rules| rules.as_ref().clone().default_queues(queues).flow_marks(marks));
        rules.map(|rules| rules.prepare()).transpose().map(PreparedRules)
    }

    /// The rules that the predecessor hands over, if some are wanted.
    #[cfg(feature = "handover")]
    pub(crate) fn take_over(
        &self,
        takeover: &mut Takeover,
        queues: &[Arc<Shared>],
        marks: Option<FlowMarks>,
    ) -> Result<Option<Arc<Rules>>, Error> {
        if self.0.is_none() {
            return Ok(None);
        }
        let (first, last) = (queues[0].number(), queues[queues.len() - 1].number());
        let invalid = |what| Error::new(ErrorKind::InvalidInput, format!("take over queue {first}")).with_detail(what);
        let divert = takeover.take_divert_of(&(first..=last))?;
        let divert = divert.ok_or_else(|| invalid("the predecessor hands over no rules of it"))?;
        if divert.blocking().flow_marks() != marks {
            return Err(invalid("flow marks: those of the predecessor's rules are others"));
        }
        Ok(Some(Rules::new(divert, queues.to_vec())))
    }
}

/// Rules that can be installed.
pub(crate) struct PreparedRules(Option<Installation>);

impl PreparedRules {
    #[cfg(feature = "test-util")]
    pub(crate) fn none() -> Self {
        Self(None)
    }

    pub(crate) async fn install(self, queues: &[Arc<Shared>]) -> Result<Option<Arc<Rules>>, Error> {
        let Some(prepared) = self.0 else { return Ok(None) };
        Divert::install_prepared(prepared).await.map(|divert| Some(Rules::new(divert, queues.to_vec())))
    }

    /// Waits while another socket owns the table.
    pub(crate) async fn install_when_free(self, queues: &[Arc<Shared>]) -> Result<Option<Arc<Rules>>, Error> {
        let Some(prepared) = self.0 else { return Ok(None) };
        Divert::install_prepared_when_free(prepared).await.map(|divert| Some(Rules::new(divert, queues.to_vec())))
    }
}

/// How often it is looked whether a hand-over that is under way has ended.
const HAND_OVER_INTERVAL: Duration = Duration::from_millis(5);

/// The rules of a queue, and what they need to end in order.
pub(crate) struct Rules {
    divert: Divert,
    queues: Vec<Arc<Shared>>,
    /// How many streams there are.
    streams: AtomicUsize,
    ending: AtomicBool,
    phase: watch::Sender<Phase>,
    /// Why something has not ended as it should. It is for one of the callers of `close`, as the
    /// error of a queue is.
    failure: Mutex<Option<Error>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Installed,
    /// Nothing is sent to the queue any more.
    Removed,
    /// All has ended.
    Ended,
}

impl Rules {
    pub(crate) fn new(divert: Divert, queues: Vec<Arc<Shared>>) -> Arc<Self> {
        let (streams, ending) = (AtomicUsize::new(1), AtomicBool::new(false));
        Arc::new(Self {
            divert,
            queues,
            streams,
            ending,
            phase: watch::Sender::new(Phase::Installed),
            failure: Mutex::new(None),
        })
    }

    pub(crate) fn divert(&self) -> Divert {
        self.divert.clone()
    }

    /// Whether they stay when they are not closed.
    pub(crate) fn fail_closed(&self) -> bool {
        self.divert.fails_closed()
    }

    /// One stream has become several.
    pub(crate) fn divided(&self, streams: usize) {
        self.streams.fetch_add(streams, Ordering::Relaxed);
    }

    /// A stream has been dropped. Returns whether its queues must be closed by the caller. If not,
    /// they are closed in order.
    pub(crate) fn stream_dropped(self: &Arc<Self>) -> bool {
        let last = self.streams.fetch_sub(1, Ordering::AcqRel) == 1;
        // The rules that fail closed stay.
        !last || self.divert.fails_closed() || !self.end(|queue| (queue.on_unanswered(), Duration::MAX))
    }

    /// Ends all in order. It continues if the future is dropped.
    pub(crate) async fn close(self: &Arc<Self>, how: impl Fn(&Shared) -> How + Send + 'static) -> Result<(), Error> {
        let begun = Instant::now();
        let limits: Vec<How> = self.queues.iter().map(|queue| how(queue)).collect();
        if !self.end(how) {
            return Err(Error::new(ErrorKind::Other, "close queue").with_detail("no thread can be started"));
        }
        self.reaches(Phase::Removed).await;
        let closing = self
            .queues
            .iter()
            .zip(limits)
            .map(|(queue, (action, timeout))| queue.close(action, timeout.saturating_sub(begun.elapsed())));
        let closed = join_all(closing).await;
        self.reaches(Phase::Ended).await;
        // The thread may have been faster to take a queue's error.
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        closed.into_iter().collect::<Result<(), _>>().and(failure.map_or(Ok(()), Err))
    }

    async fn reaches(&self, phase: Phase) {
        // The sender is in `self`.
        let _ = self.phase.subscribe().wait_for(|now| *now >= phase).await;
    }

    /// Begins to end all, unless that has begun. Returns whether it has begun.
    fn end(self: &Arc<Self>, how: impl Fn(&Shared) -> How + Send + 'static) -> bool {
        if self.ending.swap(true, Ordering::AcqRel) {
            return true;
        }
        let rules = Arc::clone(self);
        let thread = std::thread::Builder::new().name("nfqueue-close".to_owned());
        let begun = thread.spawn(move || rules.end_here(how)).is_ok();
        if !begun {
            self.ending.store(false, Ordering::Release);
        }
        begun
    }

    fn end_here(&self, how: impl Fn(&Shared) -> How) {
        let divert = self.divert.blocking();
        // Until it is known who has the rules, nothing can be removed.
        while divert.is_lent() && !self.queues.iter().all(|queue| queue.is_closed()) {
            std::thread::sleep(HAND_OVER_INTERVAL);
        }
        let removed = if divert.is_lent() || divert.is_closed() { Ok(()) } else { divert.remove_rules() };
        self.phase.send_replace(Phase::Removed);
        let closing = self.queues.iter().map(|queue| {
            let (action, timeout) = how(queue);
            queue.close(action, timeout)
        });
        let closed: Result<(), Error> = match tokio::runtime::Builder::new_current_thread().build() {
            Ok(runtime) => runtime.block_on(join_all(closing)).into_iter().collect(),
            Err(source) => {
                self.queues.iter().for_each(|queue| queue.stream_dropped());
                Err(Error::os("close queue", source))
            }
        };
        // If it cannot be removed, it ends with its socket.
        let ended = if divert.is_lent() { Ok(()) } else { divert.close() };
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = closed.and(removed).and(ended).err();
        self.phase.send_replace(Phase::Ended);
    }

    /// The rules go along with the queues.
    #[cfg(feature = "handover")]
    pub(crate) async fn go_with(&self, handover: Handover) -> Result<Handover, Error> {
        handover.with_divert(&self.divert).await
    }
}
