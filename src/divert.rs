//! Rules that send traffic to queues, without blocking the runtime.

use std::{ops::Deref, sync::Arc, time::Duration};

use nfqueue_divert::{Divert as Blocking, Installation};
use tokio::{runtime::Handle, task::JoinError};

pub use nfqueue_divert::{
    ConnectionState, Direction, DivertBuilder, FlowTuple, Match, NamedSet, PacketField, PortRange, Priority, Protocol,
    Rate, Rule, RuleCounter, SetElement, SetField, SetValue, TableFamily, TcpFlags,
};

use crate::{
    io::{Pauses, clock::QueueClock},
    types::{Error, ErrorKind},
};

const INSTALL: &str = "install rules";

/// nf_tables rules that send packets to queues. The rules exist until the last clone is dropped.
///
/// Most programs give their rules to the queue ([`QueueBuilder::divert`]), which installs them when
/// it is bound, and ends them in the order that loses no packet of it; [`Queue::divert`] returns
/// them. [`install`](Self::install) is for rules that do not belong to one queue.
///
/// It is [`nfqueue_divert::Divert`], whose documentation says what the kernel does, and when rules
/// fail open or closed. Its methods wait until no CPU uses the old rules (some tens of
/// milliseconds); here they do so in a blocking thread of the runtime, or in a thread of their own
/// if there is none.
///
/// [`QueueBuilder::divert`]: crate::QueueBuilder::divert
/// [`Queue::divert`]: crate::Queue::divert
#[derive(Debug, Clone)]
pub struct Divert(Arc<Owned>);

/// Closing the socket of a table takes as long as removing the table, so that is done in a thread
/// of its own: unlike the runtime's, it is refused by an error and not by a panic, and need not
/// wait for other blocking work.
#[derive(Debug)]
struct Owned(Option<Blocking>);

impl Deref for Owned {
    type Target = Blocking;

    fn deref(&self) -> &Blocking {
        self.0.as_ref().expect("it is there until the drop")
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let divert = self.0.take();
        if Handle::try_current().is_ok() {
            // If there is no thread, the error drops it here.
            let _ = std::thread::Builder::new().name("nfqueue-divert".to_owned()).spawn(move || drop(divert));
        }
    }
}

/// Runs what takes long in another thread. Once polled, it ends even if the future is dropped.
async fn elsewhere<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let no_thread = |source| Error::new(ErrorKind::NoRuntime, operation).with_source(source);
    if let Ok(runtime) = Handle::try_current() {
        return runtime.spawn_blocking(work).await.map_err(|source: JoinError| no_thread(source.into()));
    }
    let (send, receive) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("nfqueue-divert".to_owned());
    thread.spawn(move || drop(send.send(work()))).map_err(no_thread)?;
    receive.await.map_err(|_| Error::new(ErrorKind::Other, operation).with_detail("the thread has panicked"))
}

impl Divert {
    /// Rules and settings, of the queue's own rules ([`QueueBuilder::divert`]) or for
    /// [`install`](Self::install).
    ///
    /// [`QueueBuilder::divert`]: crate::QueueBuilder::divert
    pub fn builder() -> DivertBuilder {
        Blocking::builder()
    }

    /// Creates the table, its chains and rules: see
    /// [`nfqueue_divert::Divert::install`](nfqueue_divert::DivertBuilder::install).
    ///
    /// The socket is opened by this call, in the network namespace of the calling thread. For
    /// another namespace, call it in [`NetworkNamespace::run`](crate::NetworkNamespace::run).
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// If the future is dropped, the table is removed again, which drops queued packets.
    pub fn install(builder: &DivertBuilder) -> impl Future<Output = Result<Self, Error>> + Send + use<> {
        let prepared = builder.prepare();
        async move { Self::install_prepared(prepared?).await }
    }

    /// As [`install`](Self::install), but waits while another socket owns a table of this name: for
    /// a restart in which the old process ends without handing over. It is of use only with a
    /// [table name](DivertBuilder::table) that the program has chosen.
    ///
    /// When the table of the old process is removed, the kernel drops [all packets queued in the
    /// network namespace](nfqueue_divert::Divert#removing-a-table-drops-queued-packets). To avoid
    /// that, let the new process take the table over.
    ///
    /// The kernel does not report that a table has been removed, so the transaction is tried again
    /// in growing intervals of up to 20 ms.
    ///
    /// # Errors
    /// As `install`, except that it waits instead of returning that another socket owns the table.
    /// (A table of this name without an owner is an error.)
    ///
    /// # Cancel safety
    /// A future that is dropped while it waits leaves nothing behind. If it is dropped while the
    /// kernel installs the rules, the table is removed again, which drops queued packets.
    pub fn install_when_free(builder: &DivertBuilder) -> impl Future<Output = Result<Self, Error>> + Send + use<> {
        let prepared = builder.prepare();
        async move { Self::install_prepared_when_free(prepared?).await }
    }

    pub(crate) async fn install_prepared_when_free(mut prepared: Installation) -> Result<Self, Error> {
        let mut pauses = Pauses::new(INSTALL, QueueClock::System)?;
        loop {
            let installing = elsewhere(INSTALL, move || (prepared.try_install().map(|it| it.map(Self::new)), prepared));
            let (installed, back) = installing.await?;
            if let Some(divert) = installed? {
                return Ok(divert);
            }
            prepared = back;
            pauses.pause().await;
        }
    }

    pub(crate) async fn install_prepared(prepared: Installation) -> Result<Self, Error> {
        elsewhere(INSTALL, move || prepared.install().map(Self::new)).await?
    }

    pub(crate) fn new(divert: Blocking) -> Self {
        Self(Arc::new(Owned(Some(divert))))
    }

    /// Its blocking form.
    pub(crate) fn blocking(&self) -> &Blocking {
        &self.0
    }

    pub(crate) async fn run<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Blocking) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let divert = Arc::clone(&self.0);
        elsewhere(operation, move || work(&divert)).await?
    }

    /// The name of the table. `nft list table inet NAME` lists the table.
    pub fn table(&self) -> &str {
        self.0.table()
    }

    /// Whether the table stays when the process ends without closing it:
    /// [`DivertBuilder::fail_closed`].
    pub fn fails_closed(&self) -> bool {
        self.0.fails_closed()
    }

    /// Replaces all rules in one step: see [`nfqueue_divert::Divert::replace_rules`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// Once polled, it is done even if the future is dropped.
    pub async fn replace_rules(&self, rules: impl IntoIterator<Item = Rule>) -> Result<(), Error> {
        let rules: Vec<Rule> = rules.into_iter().collect();
        self.run("replace rules", move |divert| divert.replace_rules(rules)).await
    }

    /// Removes the rules, but not the table: see [`nfqueue_divert::Divert::remove_rules`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// Once polled, it is done even if the future is dropped.
    pub async fn remove_rules(&self) -> Result<(), Error> {
        self.run("remove rules", Blocking::remove_rules).await
    }

    /// How many packets each rule has matched: see [`nfqueue_divert::Divert::counters`].
    ///
    /// # Errors
    /// As there.
    pub async fn counters(&self) -> Result<Vec<RuleCounter>, Error> {
        self.run("read counters", Blocking::counters).await
    }

    /// The named set with this name. Its operations return an error if the
    /// [`DivertBuilder::set`] has not declared it.
    pub fn set(&self, name: impl Into<String>) -> DivertSet {
        DivertSet { divert: self.clone(), name: name.into() }
    }

    /// Forgets all verdicts for connections: see [`nfqueue_divert::Divert::forget_flows`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// Once polled, it is done even if the future is dropped.
    pub async fn forget_flows(&self) -> Result<(), Error> {
        self.run("forget flows", Blocking::forget_flows).await
    }

    /// Forgets the verdict for one connection, and returns whether there was one: see
    /// [`nfqueue_divert::Divert::forget_flow`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// Once polled, it is done even if the future is dropped.
    pub async fn forget_flow(&self, flow: FlowTuple) -> Result<bool, Error> {
        self.run("forget a flow", move |divert| divert.forget_flow(flow)).await
    }

    /// The table with its present rules, as a script for `nft -f`: see
    /// [`nfqueue_divert::Divert::to_nft`].
    ///
    /// # Errors
    /// As there.
    pub async fn to_nft(&self) -> Result<String, Error> {
        self.run("print rules", Blocking::to_nft).await
    }

    /// Removes the rules, and then the table, although there may be other clones: see
    /// [`nfqueue_divert::Divert::close`]. The rules of a queue are closed with it.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// Once polled, it is done even if the future is dropped.
    pub async fn close(&self) -> Result<(), Error> {
        self.run("remove a table", Blocking::close).await
    }
}

/// A named set of a [`Divert`], whose elements rules match: from [`Divert::set`].
///
/// It is [`nfqueue_divert::DivertSet`], and as there each call is one transaction.
#[derive(Debug, Clone)]
pub struct DivertSet {
    divert: Divert,
    name: String,
}

impl DivertSet {
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(nfqueue_divert::DivertSet<'_>) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let name = self.name.clone();
        self.divert.run("change a set", move |divert| work(divert.set(name))).await
    }

    /// Inserts an element: see [`nfqueue_divert::DivertSet::insert`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// Once polled, it is done even if the future is dropped.
    pub async fn insert(
        &self,
        element: impl Into<SetElement>,
        timeout: impl Into<Option<Duration>>,
    ) -> Result<(), Error> {
        let (element, timeout) = (element.into(), timeout.into());
        self.run(move |set| set.insert(element, timeout)).await
    }

    /// Inserts several elements in one step: see [`nfqueue_divert::DivertSet::insert_all`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// Once polled, it is done even if the future is dropped.
    pub async fn insert_all<E: Into<SetElement>>(
        &self,
        elements: impl IntoIterator<Item = E>,
        timeout: impl Into<Option<Duration>>,
    ) -> Result<(), Error> {
        let elements: Vec<SetElement> = elements.into_iter().map(Into::into).collect();
        let timeout = timeout.into();
        self.run(move |set| set.insert_all(elements, timeout)).await
    }

    /// Removes an element, and returns whether it was there: see
    /// [`nfqueue_divert::DivertSet::remove`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// Once polled, it is done even if the future is dropped.
    pub async fn remove(&self, element: impl Into<SetElement>) -> Result<bool, Error> {
        let element = element.into();
        self.run(move |set| set.remove(element)).await
    }

    /// Removes several elements in one step: see [`nfqueue_divert::DivertSet::remove_all`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// Once polled, it is done even if the future is dropped.
    pub async fn remove_all<E: Into<SetElement>>(&self, elements: impl IntoIterator<Item = E>) -> Result<(), Error> {
        let elements: Vec<SetElement> = elements.into_iter().map(Into::into).collect();
        self.run(move |set| set.remove_all(elements)).await
    }

    /// Removes all elements: see [`nfqueue_divert::DivertSet::clear`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Cancel safety
    /// Once polled, it is done even if the future is dropped.
    pub async fn clear(&self) -> Result<(), Error> {
        self.run(|set| set.clear()).await
    }

    /// The number of elements: see [`nfqueue_divert::DivertSet::len`].
    ///
    /// # Errors
    /// As there.
    pub async fn len(&self) -> Result<usize, Error> {
        self.run(|set| set.len()).await
    }

    /// Whether there is no element: see [`nfqueue_divert::DivertSet::is_empty`].
    ///
    /// # Errors
    /// As there.
    pub async fn is_empty(&self) -> Result<bool, Error> {
        self.run(|set| set.is_empty()).await
    }

    /// The elements, with the time that is left: see [`nfqueue_divert::DivertSet::elements`].
    ///
    /// # Errors
    /// As there.
    pub async fn elements(&self) -> Result<Vec<(SetElement, Option<Duration>)>, Error> {
        self.run(|set| set.elements()).await
    }
}
