//! Binding a queue with the settings of a builder, with its rules, or taking it over.

use std::{future::Future, ops::RangeInclusive, sync::Arc};

use tokio::runtime::Handle;

use super::QueueBuilder;
#[cfg(feature = "handover")]
use crate::handover::Takeover;
use crate::{
    io::{Opened, Shared},
    queue::Queue,
    rules::PreparedRules,
    types::{Error, ErrorKind},
    wire::config::Config,
};

impl QueueBuilder {
    /// Opens a socket in the calling thread's network namespace (or in [another](Self::namespace))
    /// and binds the queue, with every setting in one message that the kernel applies or refuses as
    /// a whole. If there are several numbers, that is done for each; if one cannot be bound, none
    /// stays bound.
    ///
    /// The queue is bound by this call, which waits only for these system calls. Without rules of
    /// its own, the future is ready at once; otherwise it resolves when they are installed, which
    /// takes the kernel some tens of milliseconds. Outside of a runtime, as in
    /// `runtime.block_on(builder.bind())`, the queue is bound when the future is polled first.
    ///
    /// The runtime drives the stream. A program with an event loop of its own need not drive it:
    /// see [`PacketStream::readable_fd`](crate::PacketStream::readable_fd).
    ///
    /// Packets that arrive before the acknowledgement are kept. Bind before a rule sends packets to
    /// the queue: until the queue is bound, the rule drops them, or accepts them with `bypass`.
    ///
    /// # Errors
    /// * `InvalidInput`: a value that the kernel would refuse or silently change, or no number.
    /// * `AlreadyBound`: another socket owns the queue; of [`Queue::ANY`] and [`Queue::any`], there
    ///   are not so many free numbers in a row.
    /// * `NotPermitted`: the thread has no `CAP_NET_ADMIN` in the user namespace that owns the
    ///   network namespace, or not the capability that [`namespace`](Self::namespace) needs.
    /// * `Unsupported`: this kernel lacks nfnetlink_queue or does not support a setting. The error
    ///   names nfnetlink_queue, `conntrack` or `security_context` if that is the reason.
    /// * `NoRuntime`: not polled within a Tokio runtime, or in a runtime without an I/O driver. In
    ///   the latter case Tokio's panic message is printed, because Tokio has no other way to find
    ///   out.
    /// * `Other`: another error of the operating system, for example no free descriptor, or
    ///   [`namespace`](Self::namespace) is not a network namespace.
    /// * Those of installing the rules.
    ///
    /// # Cancel safety
    /// A future that is dropped unbinds the queue again, and removes the rules.
    pub fn bind(self) -> impl Future<Output = Result<Queue, Error>> + Send + use<> {
        let begun = in_a_runtime(self, Self::begin);
        async move {
            let (queues, rules) = begun.unwrap_or_else(|builder| builder.begin())?;
            let rules = rules.install(&queues.0).await?;
            Ok(Queue::new(queues.kept(), rules))
        }
    }

    /// As `bind`, in a simulated kernel, where no rules are installed.
    #[cfg(feature = "test-util")]
    pub(crate) fn bind_in_memory(self) -> Result<Queue, Error> {
        self.begin().map(|(queues, _)| Queue::new(queues.kept(), None))
    }

    /// Binds the queue, and opens the socket for the rules.
    fn begin(self) -> Result<(Bound, PreparedRules), Error> {
        let builder = self.checked()?;
        let queues = builder.bind_queues()?;
        let rules = builder.prepare_rules(queues.0[0].number()..=queues.0[queues.0.len() - 1].number())?;
        Ok((queues, rules))
    }

    fn bind_queues(&self) -> Result<Bound, Error> {
        let config = self.config();
        let mut candidates = self.numbers.candidates();
        loop {
            match self.bind_each(candidates.numbers(), &config) {
                Ok(queues) => return Ok(queues),
                Err((taken, error)) if self.numbers.is_any() && error.kind() == ErrorKind::AlreadyBound => {
                    candidates.skip(taken).ok_or_else(|| {
                        Error::new(ErrorKind::AlreadyBound, format!("bind {}", self.numbers))
                            .with_detail("there is none")
                    })?;
                }
                Err((_, error)) => return Err(error),
            }
        }
    }

    /// Opens the socket for the rules.
    fn prepare_rules(&self, numbers: RangeInclusive<u16>) -> Result<PreparedRules, Error> {
        let (rules, marks) = (&self.rules, self.flow_marks);
        let prepare = || rules.prepare(numbers, marks);
        match &self.namespace {
            None => prepare(),
            #[cfg(feature = "test-util")]
            Some(namespace) if namespace.memory().is_some() => self.rules.validate().map(|()| PreparedRules::none()),
            Some(namespace) => namespace.run(prepare)?,
        }
    }

    /// If one cannot be bound, it is returned with the error, and none stays bound.
    fn bind_each(&self, numbers: impl Iterator<Item = u16>, config: &Config) -> Result<Bound, (u16, Error)> {
        let bind = |number| {
            let opened = self.open(number, config)?;
            Shared::bind(self.settings(number), config, self.policy.clone(), opened)
        };
        let mut queues = Bound(Vec::new());
        for number in numbers {
            queues.0.push(bind(number).map_err(|error| (number, error))?);
        }
        Ok(queues)
    }

    /// Binds the queue as soon as no other socket owns it: for a restart in which the old process
    /// ends without handing over. If the number is free, it does what [`bind`](Self::bind) does. Of
    /// several numbers it waits for each in turn; [`Queue::ANY`] and [`Queue::any`] do not wait.
    ///
    /// The sockets are opened by this call (outside of a runtime, when the future is polled first),
    /// in the calling thread's network namespace. The kernel does not report that a queue has been
    /// unbound, so it is asked again while another socket owns the queue: after 1 ms, and then in
    /// growing intervals of up to 20 ms. Until the queue is bound, the rule drops packets, or
    /// accepts them with `bypass`.
    ///
    /// It waits without a limit. A queue that was closed gracefully is free as soon as `close` has
    /// returned; that of a killed process when the last copy of its socket is closed.
    ///
    /// # Errors
    /// As [`bind`](Self::bind), except that it waits instead of returning `AlreadyBound`. (A thread
    /// that does not know whether it has the capability gets `NotPermitted` in both cases: see
    /// there.)
    ///
    /// # Cancel safety
    /// Cancel safe: a future that is dropped leaves nothing behind.
    pub fn bind_when_free(self) -> impl Future<Output = Result<Queue, Error>> + Send + use<> {
        let begun = in_a_runtime(self, Self::begin_when_free);
        async move {
            let (queues, rules) = match begun.unwrap_or_else(|builder| builder.begin_when_free())? {
                Begun::Bound(queues, rules) => (queues, rules),
                Begun::Waiting(waiting, rules) => {
                    let mut queues = Bound(Vec::new());
                    for queue in waiting {
                        queues.0.push(queue.await?);
                    }
                    (queues, rules)
                }
            };
            let rules = rules.install_when_free(&queues.0).await?;
            Ok(Queue::new(queues.kept(), rules))
        }
    }

    fn begin_when_free(self) -> Result<Begun<impl Future<Output = Result<Arc<Shared>, Error>> + Send + use<>>, Error> {
        if self.numbers.is_any() {
            return self.begin().map(|(queues, rules)| Begun::Bound(queues, rules));
        }
        let builder = self.checked()?;
        let config = builder.config();
        let begin = |number| {
            let opened = builder.open(number, &config)?;
            Shared::bind_when_free(builder.settings(number), config, builder.policy.clone(), opened)
        };
        let candidates = builder.numbers.candidates();
        let waiting = candidates.numbers().map(begin).collect::<Result<_, _>>()?;
        let rules = builder.prepare_rules(candidates.range())?;
        Ok(Begun::Waiting(waiting, rules))
    }

    /// Opens the socket.
    fn open(&self, number: u16, config: &Config) -> Result<Opened, Error> {
        self.check_found(number)?;
        Shared::check_runtime(number)?;
        let settings = self.settings(number);
        let open = || Opened::new(&settings, config);
        match &self.namespace {
            None => Ok(open()),
            Some(namespace) => {
                #[cfg(feature = "test-util")]
                let in_memory = namespace.memory().map(|kernel| Opened::in_memory(kernel, &settings, config));
                #[cfg(not(feature = "test-util"))]
                let in_memory = None;
                in_memory.map_or_else(|| namespace.run(open), Ok)
            }
        }
    }

    /// Takes over the queue with this builder's numbers from another process. It returns packets
    /// when the [`Takeover`] has been [accepted](Takeover::accept).
    ///
    /// [`Queue::ANY`] is the first number that the predecessor hands over, and [`Queue::any`] the
    /// first of so many in a row.
    ///
    /// The settings of this crate are those of this builder: default action, deadline, flush policy
    /// and times. What the predecessor has set in the kernel stays: the copy range, `max_len`, the
    /// flags and the receive buffer. To change these, call
    /// [`reconfigure`](crate::VerdictSink::reconfigure) afterwards.
    ///
    /// With [`divert`](Self::divert), the queue also takes the first table that the predecessor
    /// hands over, with the rules, the sets and the counters that it has. To change the rules, call
    /// [`Divert::replace_rules`](crate::Divert::replace_rules) when everything is accepted.
    /// [Flow marks](Self::flow_marks) must be those of the predecessor if its table goes along.
    ///
    /// The socket stays in its network namespace, so [`namespace`](Self::namespace) has no effect.
    /// A deadline begins anew for packets that the predecessor had received.
    ///
    /// # Errors
    /// The predecessor keeps the queue, if the `Takeover` is dropped:
    /// * `InvalidInput`: the predecessor does not hand over this queue, or with `divert` no table,
    ///   or a setting is invalid.
    /// * `NotPermitted`: the thread has no `CAP_NET_ADMIN` in the user namespace that owns the
    ///   socket's network namespace.
    /// * `NoRuntime`: as [`bind`](Self::bind).
    /// * `Malformed`: what the predecessor has sent is damaged.
    /// * `Other`: another error of the operating system.
    #[cfg(feature = "handover")]
    pub fn take_over(self, takeover: &mut Takeover) -> Result<Queue, Error> {
        let operation = format!("take over {}", self.numbers);
        let operation = || operation.clone();
        let builder = self.checked().map_err(|error| error.with_operation(operation()))?;
        let invalid = |what| Error::new(ErrorKind::InvalidInput, operation()).with_detail(what);
        let numbers = takeover.find(&builder.numbers);
        let numbers = numbers.ok_or_else(|| invalid("the predecessor does not hand it over"))?;
        Shared::check_runtime(*numbers.start()).map_err(|error| error.with_operation(operation()))?;
        let take = |number| {
            builder.check_found(number).map_err(|error| error.with_operation(operation()))?;
            Shared::take_over(builder.settings(number), builder.policy.clone(), takeover.queue(number))
        };
        let queues: Vec<_> = numbers.map(take).collect::<Result<_, _>>()?;
        queues.iter().for_each(|queue| takeover.taken(queue));
        let rules = builder.rules.take_over(takeover, &queues, builder.flow_marks)?;
        Ok(Queue::new(queues, rules))
    }
}

/// Queues that are bound. If a later step fails, they are closed as a dropped [`Queue`] is:
/// packets may have arrived.
struct Bound(Vec<Arc<Shared>>);

impl Bound {
    fn kept(mut self) -> Vec<Arc<Shared>> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.0.iter().for_each(|queue| queue.stream_dropped());
    }
}

/// What `bind_when_free` has begun.
enum Begun<F> {
    Bound(Bound, PreparedRules),
    Waiting(Vec<F>, PreparedRules),
}

/// Calls `begin` within a runtime. Otherwise it is for the future to do so: `block_on` enters the
/// runtime after its argument has been made.
fn in_a_runtime<T>(builder: QueueBuilder, begin: impl FnOnce(QueueBuilder) -> T) -> Result<T, Box<QueueBuilder>> {
    if Handle::try_current().is_ok() { Ok(begin(builder)) } else { Err(builder.into()) }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn bind_outside_a_runtime_is_an_error() {
        assert_eq!(
            Queue::builder(3).bind().now_or_never().expect("at once").expect_err("no runtime").kind(),
            ErrorKind::NoRuntime
        );
    }
}
