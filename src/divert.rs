//! What rules have to do with queues: they are handed over together, and a successor waits for the
//! table.

use std::os::fd::AsFd;

use nfqueue_divert::{Divert, DivertBuilder};
use tokio::{runtime::Handle, task::JoinError};

use crate::{
    handover::{Handover, Part, Takeover},
    io::{Pauses, clock::QueueClock},
    record::PartRecord,
    types::{Error, ErrorKind},
};

const INSTALL: &str = "install rules";

/// As [`DivertBuilder::install`], but waits while another socket owns a table of this name, and
/// does not block the thread: for a restart in which the old process ends without handing over. It
/// is of use only with a [table name](DivertBuilder::table) that the program has chosen.
///
/// When the table of the old process is removed, the kernel drops [all packets queued in the
/// network namespace](Divert#removing-a-table-drops-queued-packets). To avoid that, let the new
/// process take the table over: [`Handover::with_divert`].
///
/// The socket is opened by this call, in the network namespace of the calling thread. For another
/// namespace, call it in [`NetworkNamespace::run`](crate::NetworkNamespace::run), within the
/// runtime's context:
///
/// ```no_run
/// # async fn example(rules: tokio_nfqueue::DivertBuilder) -> Result<(), tokio_nfqueue::Error> {
/// use tokio::runtime::Handle;
/// use tokio_nfqueue::{NetworkNamespace, install_when_free};
///
/// let runtime = Handle::current();
/// let installing = NetworkNamespace::named("lab")?.run(|| {
///     let _context = runtime.enter();
///     install_when_free(&rules)
/// })?;
/// let divert = installing.await?;
/// # drop(divert);
/// # Ok(())
/// # }
/// ```
///
/// The kernel does not report that a table has been removed, so
/// the transaction is tried again in growing intervals of up to 20 ms.
///
/// # Errors
///
/// As `install`, except that it waits instead of returning that another socket owns the table. (A
/// table of this name without an owner is an error.) [`NoRuntime`](ErrorKind::NoRuntime): not
/// called within a Tokio runtime.
///
/// # Cancel safety
///
/// A future that is dropped while it waits leaves nothing behind. If it is dropped while the kernel
/// installs the rules, the table is removed again, which drops queued packets.
pub fn install_when_free(builder: &DivertBuilder) -> impl Future<Output = Result<Divert, Error>> + Send + use<> {
    let opened = match Handle::try_current() {
        Ok(runtime) => builder.prepare().map(|prepared| (runtime, prepared)),
        Err(_) => Err(Error::new(ErrorKind::NoRuntime, INSTALL)),
    };
    async move {
        let (runtime, mut prepared) = opened?;
        let mut pauses = Pauses::new(INSTALL, QueueClock::System)?;
        loop {
            let installing = runtime.spawn_blocking(move || (prepared.try_install(), prepared));
            let ended = |source: JoinError| Error::new(ErrorKind::NoRuntime, INSTALL).with_source(source.into());
            let (installed, back) = installing.await.map_err(ended)?;
            if let Some(divert) = installed? {
                return Ok(divert);
            }
            prepared = back;
            pauses.pause().await;
        }
    }
}

impl Handover {
    /// Hands the table over together with the queues. Its rules and hooks stay installed all the
    /// time.
    ///
    /// From now on `divert` cannot be used: its methods return [`Other`](ErrorKind::Other). If this
    /// process keeps the queues, `divert` can be used again. If they are handed over, drop it: that
    /// does not affect the table any more.
    ///
    /// # Errors
    /// This process keeps the queues: [`InvalidInput`](ErrorKind::InvalidInput) if the table is
    /// being handed over already, or an error of the operating system.
    pub fn with_divert(mut self, divert: &Divert) -> Result<Self, Error> {
        let lent = divert.lend()?;
        let loan = lent.loan();
        let socket = lent.socket().try_clone_to_owned().map_err(|source| {
            loan.end();
            Error::os("hand over a table", source)
        })?;
        let record = PartRecord { cookie: lent.cookie(), body: lent.description().to_vec() };
        self.push(Part { socket, record, use_again: Box::new(move || loan.end()) });
        Ok(self)
    }
}

impl Takeover {
    /// Takes over the first table that the predecessor hands over; `None` if there is none (any
    /// more). It can be changed when everything has been [accepted](Self::accept).
    ///
    /// The rules, the sets with their elements, and the counters stay as they are. If this process
    /// wants other rules, it calls [`Divert::replace_rules`] afterwards, which drops no queued
    /// packet either. (Chains that only the new rules need are added then: see
    /// [`Divert`](Divert#installing-a-table-can-queue-packets-again).)
    ///
    /// # Errors
    /// [`Malformed`](ErrorKind::Malformed) if what the predecessor has sent is damaged, or an error
    /// of the operating system. The predecessor keeps the table if this value is dropped.
    pub fn take_divert(&mut self) -> Result<Option<Divert>, Error> {
        let Some(passed) = self.first_part() else { return Ok(None) };
        let socket = passed.socket.as_fd().try_clone_to_owned();
        let socket = socket.map_err(|source| Error::os("take over a table", source))?;
        let (divert, loan) = Divert::adopt(socket, &passed.record.body)?;
        self.part_taken(Box::new(move || loan.end()));
        Ok(Some(divert))
    }
}
