//! Rules that send traffic to a queue, and vanish with the process.

mod expression;
mod nft;
mod rule;
mod socket;

use std::{
    fmt, io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::io::Errno;

use self::{
    expression::Via,
    nft::{Chains, Command, Subject},
    rule::Terminal,
    socket::{Connection, Outcome, Refusal},
};
use crate::{Error, ErrorKind, NetworkNamespace};

pub use self::rule::{Protocol, Rule};

/// The kernel's `NFT_NAME_MAXLEN` less the NUL.
const LONGEST_NAME: usize = 255;

/// nf_tables rules that send traffic to queues, for as long as this value lives.
///
/// They stand in a table of their own, family `inet`, that belongs to the socket in here (Linux
/// 5.12 and later): other programs can read but not change it, `nft flush ruleset` passes it by,
/// and the kernel removes it when the value is dropped or the process dies, by whatever signal.
/// Table and rules are made in the network namespace of the thread that calls
/// [`install`](DivertBuilder::install), or in [another one](DivertBuilder::namespace).
///
/// ```no_run
/// use tokio_nfqueue::{Divert, Hook, Protocol, Rule};
///
/// # fn main() -> Result<(), tokio_nfqueue::Error> {
/// // Bind queue 0 first, then:
/// let divert = Divert::builder()
///     .rule(Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(53).to_queue(0))
///     .install()?;
/// // ... and at the end, in this order:
/// divert.remove_rules()?;
/// // close the queue: it drains
/// divert.close()?;
/// # Ok(())
/// # }
/// ```
///
/// # Removing a table drops queued packets
///
/// When a table goes, so do its hooks, and whenever any hook is unregistered the kernel drops **every packet that is
/// queued in the network namespace, in all queues**, those of other processes included (`nf_queue_nf_hook_drop`).
/// Removing rules alone does no such thing. Therefore stop in this order:
///
/// 1. [`remove_rules`](Self::remove_rules): nothing new is queued, and what is queued stays.
/// 2. Close the queue, which waits for the verdicts that are owed. Nothing is left in it then.
/// 3. [`close`](Self::close), or drop this value: the table goes.
///
/// From step 1 on the traffic passes unseen. A firewall that must stay shut closes its queue first: what arrives between
/// that and step 1 finds no queue and is dropped, unless the rule says [`bypass`](Rule::bypass). Step 3 is the last in
/// any case: whatever is still queued then is lost, and so it is if this value is dropped too early. A verdict for such a
/// packet is answered with `ENOENT`. To spare other users of queues in the namespace, keep one `Divert` for as long as
/// it is needed rather than making and closing many. [`install`](DivertBuilder::install) costs nobody a packet, not even
/// when it fails.
pub struct Divert {
    table: String,
    connection: Mutex<Connection>,
}

impl Divert {
    /// Starts with no rule, a unique table name and priority 0.
    pub fn builder() -> DivertBuilder {
        DivertBuilder { table: None, priority: 0, namespace: None, rules: Vec::new() }
    }

    /// The table's name, as `nft list table inet NAME` wants it.
    pub fn table(&self) -> &str {
        &self.table
    }

    /// Removes the rules; the table and its hooks stay. No packet is sent to a queue by them from now on, and none that
    /// is queued is dropped. Doing it twice is no error.
    ///
    /// Blocks as [`install`](DivertBuilder::install) does.
    ///
    /// # Errors
    ///
    /// [`NotPermitted`](ErrorKind::NotPermitted) if the thread has lost `CAP_NET_ADMIN`. The rules are then still there.
    pub fn remove_rules(&self) -> Result<(), Error> {
        let commands = nft::delete_rules(&self.table);
        self.lock()
            .transact(&commands, Outcome::Commit)
            .map_err(|refusal| refused(format!("remove the rules of table {}", self.table), &commands, refusal))
    }

    /// Removes the rules, and then the table.
    ///
    /// The second step drops [all packets queued in the network namespace](Self#removing-a-table-drops-queued-packets):
    /// drain and close queues between [`remove_rules`](Self::remove_rules) and this.
    ///
    /// Blocks as [`install`](DivertBuilder::install) does. Dropping the value has the same effect in one step, and tells
    /// no error.
    ///
    /// # Errors
    ///
    /// As `remove_rules`. The socket is closed all the same, and with it the kernel removes the table.
    pub fn close(self) -> Result<(), Error> {
        self.remove_rules()?;
        let commands = nft::delete_table(&self.table);
        self.lock()
            .transact(&commands, Outcome::Commit)
            .map_err(|refusal| refused(format!("remove table {}", self.table), &commands, refusal))
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic between two system calls leaves nothing half done in the connection.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Divert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Divert").field("table", &self.table).finish_non_exhaustive()
    }
}

/// The rules to be, from [`Divert::builder`].
#[derive(Debug, Clone)]
#[must_use = "nothing is diverted until `install`"]
pub struct DivertBuilder {
    table: Option<String>,
    priority: i32,
    namespace: Option<NetworkNamespace>,
    rules: Vec<Rule>,
}

impl DivertBuilder {
    /// The table's name, 1 to 255 bytes. Default: `tokio_nfqueue_` and a number that no other socket in the network
    /// namespace has.
    pub fn table(mut self, name: impl Into<String>) -> Self {
        self.table = Some(name.into());
        self
    }

    /// The priority of the chains among all that are registered at the same hook; lower comes first. Default: 0, where
    /// filters stand.
    ///
    /// Connections are tracked at −200, `mangle` stands at −150, destination NAT at −100, source NAT at 100. Before −400
    /// packets are not yet defragmented (where anything defragments them).
    pub fn priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }

    /// Installs the rules in another network namespace. Default: the calling thread's.
    ///
    /// The caller's threads stay where they are. A thread made for it opens the nf_tables socket,
    /// which stays in that namespace. Interface names in the rules are those of that namespace.
    ///
    /// Entering another namespace needs `CAP_SYS_ADMIN` in one's own user namespace and in the one
    /// that owns the network namespace.
    pub fn namespace(mut self, namespace: NetworkNamespace) -> Self {
        self.namespace = Some(namespace);
        self
    }

    /// Adds a rule. Those of one hook are tried in the order in which they were added, until one ends a packet's way; a
    /// packet that none matches goes on as if there were no rules.
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// Adds several rules.
    pub fn rules(mut self, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.rules.extend(rules);
        self
    }

    /// Makes the table, a chain for each hook in use, and the rules, in one transaction: all of it or nothing.
    ///
    /// The rules are tried out first, without hooks, so that a refusal costs nobody a packet. They use nf_tables' own
    /// `queue` expression, or where the kernel is built without it (`NFT_QUEUE`), the `NFQUEUE` target of xtables
    /// (`NFT_COMPAT`, `NETFILTER_XT_TARGET_NFQUEUE`).
    ///
    /// Blocks for some tens of milliseconds (46 measured on Linux 6.18 with two cores), because the kernel waits for
    /// other CPUs to let go of the old rules. From an async task, call it in `spawn_blocking`.
    ///
    /// # Errors
    ///
    /// * [`InvalidInput`](ErrorKind::InvalidInput): no rule; a rule with no end, with ports and no protocol that has
    ///   them, with an empty range of queues, an impossible interface name or mark. The error says which, counting
    ///   from 0. Also more rules than fit into one transaction: some hundreds, or without limit if the thread has
    ///   `CAP_NET_ADMIN` in the first user namespace (`SO_SNDBUFFORCE`).
    /// * [`NotPermitted`](ErrorKind::NotPermitted): the thread lacks `CAP_NET_ADMIN` in the user
    ///   namespace that owns the network namespace, or what [`namespace`](Self::namespace) needs.
    /// * [`Unsupported`](ErrorKind::Unsupported): no nf_tables, no tables with owners (before Linux 5.12), or neither of
    ///   the two ways to a queue.
    /// * [`Other`](ErrorKind::Other): a table of that name exists (`EEXIST`, or `EPERM` if it is
    ///   another socket's), [`namespace`](Self::namespace) is not a network namespace, or the
    ///   kernel reports another error.
    pub fn install(&self) -> Result<Divert, Error> {
        let rules = self.checked()?;
        let failed = |error| Error::os("open a netlink socket for nf_tables", error);
        let opened = match &self.namespace {
            None => Connection::open(),
            Some(namespace) => namespace.run(Connection::open)?,
        };
        let mut connection = opened.map_err(failed)?;
        let table = match &self.table {
            Some(name) => name.clone(),
            None => format!("tokio_nfqueue_{}", connection.port()),
        };

        // A chain with a hook cannot be part of the trial: undoing its registration would drop all queued packets.
        let mut via = Via::Expression;
        let mut trial = nft::create(&table, Chains::Unhooked, via, &rules);
        let mut result = connection.transact(&trial, Outcome::Abort);
        if result.as_ref().is_err_and(|refusal| lacks_queue(refusal, &trial, &rules)) {
            via = Via::Target;
            trial = nft::create(&table, Chains::Unhooked, via, &rules);
            result = connection.transact(&trial, Outcome::Abort);
        }
        let operation = || format!("install table {table}");
        result.map_err(|refusal| {
            let lacking = lacks_queue(&refusal, &trial, &rules);
            let error = refused(operation(), &trial, refusal);
            if lacking {
                error.with_kind(ErrorKind::Unsupported).with_detail("neither NFT_QUEUE nor NFT_COMPAT with NFQUEUE")
            } else {
                error
            }
        })?;

        let commands = nft::create(&table, Chains::Hooked(self.priority), via, &rules);
        connection.transact(&commands, Outcome::Commit).map_err(|refusal| refused(operation(), &commands, refusal))?;
        Ok(Divert { table, connection: Mutex::new(connection) })
    }

    fn checked(&self) -> Result<Vec<(&Rule, Terminal)>, Error> {
        let invalid = |detail: String| Error::new(ErrorKind::InvalidInput, "install rules").with_detail(detail);
        if let Some(name) = &self.table
            && (name.is_empty() || name.len() > LONGEST_NAME || name.contains('\0'))
        {
            return Err(invalid(format!("a table's name has 1 to {LONGEST_NAME} bytes and no NUL")));
        }
        if self.rules.is_empty() {
            return Err(invalid("there is no rule".to_owned()));
        }
        let check = |(index, rule): (usize, _)| match Rule::check(rule) {
            Ok(terminal) => Ok((rule, terminal)),
            Err(reason) => Err(invalid(format!("rule {index}: {reason}"))),
        };
        self.rules.iter().enumerate().map(check).collect()
    }
}

/// Whether the kernel did not know the expression (or the target) that leads to a queue: nothing else in a rule with
/// this end is ever "not there".
fn lacks_queue(refusal: &Refusal, commands: &[Command], rules: &[(&Rule, Terminal)]) -> bool {
    let rule = match subject(refusal, commands) {
        Some(Subject::Rule(index)) => rules.get(index),
        _ => None,
    };
    errno(&refusal.error) == Some(Errno::NOENT) && matches!(rule, Some((_, Terminal::Queue(..))))
}

fn subject(refusal: &Refusal, commands: &[Command]) -> Option<Subject> {
    Some(commands.get(refusal.command?)?.subject)
}

fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw_os_error)
}

/// Tells what the kernel refused, and why, as far as that can be known.
fn refused(operation: String, commands: &[Command], refusal: Refusal) -> Error {
    let subject = subject(&refusal, commands);
    let operation = match subject {
        Some(Subject::Rule(index)) => format!("{operation}, rule {index}"),
        Some(Subject::Chain(hook)) => format!("{operation}, chain {}", nft::chain_name(hook)),
        Some(Subject::Table) | None => operation,
    };
    let (kind, hint) = match (errno(&refusal.error), subject) {
        // The capability is checked once for the whole batch, and answered to its first message.
        (Some(Errno::PERM), None) => {
            (ErrorKind::NotPermitted, Some("CAP_NET_ADMIN is needed in the user namespace of the network namespace"))
        }
        (Some(Errno::PERM), Some(Subject::Table)) => {
            (ErrorKind::Other, Some("another socket owns a table of this name"))
        }
        (Some(Errno::EXIST), Some(Subject::Table)) => (ErrorKind::Other, Some("a table of this name exists")),
        (Some(Errno::OPNOTSUPP), None) => (ErrorKind::Unsupported, Some("the kernel has no nf_tables")),
        (Some(Errno::OPNOTSUPP | Errno::INVAL), Some(Subject::Table)) => {
            (ErrorKind::Unsupported, Some("tables with an owner need Linux 5.12"))
        }
        (Some(Errno::OPNOTSUPP | Errno::AFNOSUPPORT), _) => (ErrorKind::Unsupported, None),
        (Some(Errno::MSGSIZE), None) => (ErrorKind::InvalidInput, Some("too many rules for one transaction")),
        (Some(Errno::AGAIN), None) => (ErrorKind::TimedOut, Some("the kernel did not answer")),
        _ => (ErrorKind::Other, None),
    };
    let error = Error::new(kind, operation).with_source(refusal.error);
    match (refusal.text, hint) {
        (Some(text), _) => error.with_detail(text),
        (None, Some(hint)) => error.with_detail(hint),
        (None, None) => error,
    }
}
