//! nf_tables rules that send packets to a queue. The kernel removes them when the process ends.

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
    expression::QueueMethod,
    nft::{ChainKind, Command, Subject},
    rule::RuleAction,
    socket::{Connection, Outcome, Refusal},
};
use crate::{
    namespace::NetworkNamespace,
    types::{Error, ErrorKind},
};

pub use self::rule::{Protocol, Rule};

/// nf_tables rules that send packets to queues. The rules exist until this value is dropped.
///
/// The rules are in a separate table of family `inet`. A netlink socket in this value owns the
/// table (Linux 5.12 and later). Other programs can read the table but cannot change it, and `nft
/// flush ruleset` skips it. The kernel removes it when this value is dropped, or when the process
/// ends for any reason, including a signal.
///
/// The table is created in the network namespace of the thread that calls
/// [`install`](DivertBuilder::install), or in [another namespace](DivertBuilder::namespace).
///
/// ```no_run
/// use tokio_nfqueue::{Divert, Hook, Protocol, Rule};
///
/// # fn main() -> Result<(), tokio_nfqueue::Error> {
/// // Bind queue 0 first, then:
/// let divert = Divert::builder()
///     .rule(Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(53).to_queue(0))
///     .install()?;
/// // To stop, in this order:
/// divert.remove_rules()?;
/// // Close the queue here: it waits for the outstanding verdicts.
/// divert.close()?;
/// # Ok(())
/// # }
/// ```
///
/// # Removing a table drops queued packets
///
/// Removing a table also removes its base chains, and so unregisters their hooks. When a hook is
/// unregistered, the kernel drops **every packet that is queued in the network namespace, in all
/// queues**, also those of other processes (`nf_queue_nf_hook_drop`). Removing only the rules drops
/// no packet. Therefore stop in this order:
///
/// 1. Call [`remove_rules`](Self::remove_rules). No new packet is queued, and queued packets stay
///    in the queue.
/// 2. Close the queue. This waits for the outstanding verdicts. The queue is then empty.
/// 3. Call [`close`](Self::close) or drop this value. The table is removed.
///
/// After step 1, packets are no longer sent to the queue, so they are not filtered. A firewall that
/// must fail closed closes its queue before step 1: until the rules are removed, new packets find
/// no queue and are dropped, unless the rule has [`bypass`](Rule::bypass) set.
///
/// Step 3 must be the last. Packets that are still queued at step 3, or when this value is dropped,
/// are lost. The kernel replies with `ENOENT` to a verdict for such a packet.
///
/// Other queues in the namespace lose packets each time a `Divert` is closed. Therefore keep one
/// `Divert`, and do not create and close many. [`install`](DivertBuilder::install) drops no queued
/// packet, even if it fails.
pub struct Divert {
    table: String,
    connection: Mutex<Connection>,
}

impl Divert {
    /// Returns a builder with no rule, a unique table name and priority 0.
    pub fn builder() -> DivertBuilder {
        DivertBuilder { table: None, priority: 0, namespace: None, rules: Vec::new() }
    }

    /// The name of the table. `nft list table inet NAME` lists the table.
    pub fn table(&self) -> &str {
        &self.table
    }

    /// Removes the rules, but not the table and its base chains.
    ///
    /// The rules send no more packets to a queue. Queued packets stay in the queue. A second call
    /// has no effect and returns no error.
    ///
    /// Blocks the thread as [`install`](DivertBuilder::install) does.
    ///
    /// # Errors
    ///
    /// [`NotPermitted`](ErrorKind::NotPermitted) if the thread has lost `CAP_NET_ADMIN`. The rules
    /// then stay installed.
    pub fn remove_rules(&self) -> Result<(), Error> {
        let commands = nft::delete_rules(&self.table);
        self.lock()
            .transact(&commands, Outcome::Commit)
            .map_err(|refusal| refused(format!("remove the rules of table {}", self.table), &commands, refusal))
    }

    /// Removes the rules, and then the table.
    ///
    /// The second step drops [all packets queued in the network
    /// namespace](Self#removing-a-table-drops-queued-packets). Call
    /// [`remove_rules`](Self::remove_rules), close the queues, and then call this method.
    ///
    /// Blocks the thread as [`install`](DivertBuilder::install) does. Dropping the value has the
    /// same effect in one step, but returns no error.
    ///
    /// # Errors
    ///
    /// As `remove_rules`. The socket is closed even then, and the kernel removes the table with it.
    pub fn close(self) -> Result<(), Error> {
        self.remove_rules()?;
        let commands = nft::delete_table(&self.table);
        self.lock()
            .transact(&commands, Outcome::Commit)
            .map_err(|refusal| refused(format!("remove table {}", self.table), &commands, refusal))
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic cannot leave the connection in an inconsistent state.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Divert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Divert").field("table", &self.table).finish_non_exhaustive()
    }
}

/// The rules and settings of a [`Divert`], from [`Divert::builder`].
#[derive(Debug, Clone)]
#[must_use = "no packet is sent to a queue until `install` is called"]
pub struct DivertBuilder {
    table: Option<String>,
    priority: i32,
    namespace: Option<NetworkNamespace>,
    rules: Vec<Rule>,
}

impl DivertBuilder {
    /// Sets the name of the table, 1 to 255 bytes without NUL. Default: `tokio_nfqueue_` and a
    /// number that is unique in the network namespace (the netlink port id).
    pub fn table(mut self, name: impl Into<String>) -> Self {
        self.table = Some(name.into());
        self
    }

    /// Sets the priority of the base chains. At each hook, the kernel calls chains with lower
    /// numbers first. Default: 0, the priority of `filter`.
    ///
    /// Other priorities are −400 for defragmentation, −200 for connection tracking, −150 for
    /// `mangle`, −100 for destination NAT and 100 for source NAT. Chains with a priority below −400
    /// see fragments that are not yet reassembled. Later chains see reassembled packets only if
    /// connection tracking or another module reassembles them.
    pub fn priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }

    /// Installs the rules in another network namespace. Default: the calling thread's.
    ///
    /// The calling thread stays in its namespace. A temporary thread opens the nf_tables socket,
    /// which stays in the other namespace. Interface names in the rules are names in the other
    /// namespace.
    ///
    /// Entering another namespace needs `CAP_SYS_ADMIN` in the caller's user namespace and in the
    /// user namespace that owns the network namespace.
    pub fn namespace(mut self, namespace: NetworkNamespace) -> Self {
        self.namespace = Some(namespace);
        self
    }

    /// Adds a rule.
    ///
    /// The kernel checks the rules of a hook in the order in which they were added. The first
    /// matching rule decides what happens to the packet. A packet that no rule matches is accepted
    /// by this table and continues to other chains.
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// Adds several rules.
    pub fn rules(mut self, rules: impl IntoIterator<Item = Rule>) -> Self {
        self.rules.extend(rules);
        self
    }

    /// Creates the table, a base chain for each used hook, and the rules.
    ///
    /// One transaction creates everything. If the kernel refuses a part, it creates nothing. Before
    /// that, a trial transaction without base chains checks the rules, so that an error drops no
    /// queued packet.
    ///
    /// The rules use the `queue` expression of nf_tables (kernel option `NFT_QUEUE`). If the kernel
    /// lacks it, they use the `NFQUEUE` target of xtables (`NFT_COMPAT`,
    /// `NETFILTER_XT_TARGET_NFQUEUE`).
    ///
    /// Blocks the thread for some tens of milliseconds (46 ms measured on Linux 6.18 with two
    /// cores), because the kernel waits until no CPU uses the old rules. From an async task, call
    /// it in `spawn_blocking`.
    ///
    /// # Errors
    ///
    /// * [`InvalidInput`](ErrorKind::InvalidInput): there is no rule; the table name is invalid; a
    ///   rule is invalid (no action, ports without a protocol that has ports, or an invalid hook,
    ///   address, interface name, mark or range of queues); or the rules do not fit into one
    ///   transaction. The error names the invalid rule by its index, from 0. One transaction can
    ///   carry some hundreds of rules. There is no limit if the thread has `CAP_NET_ADMIN` in the
    ///   initial user namespace (`SO_SNDBUFFORCE`).
    /// * [`NotPermitted`](ErrorKind::NotPermitted): the thread lacks `CAP_NET_ADMIN` in the user
    ///   namespace that owns the network namespace, or a capability that
    ///   [`namespace`](Self::namespace) needs.
    /// * [`Unsupported`](ErrorKind::Unsupported): the kernel has no nf_tables, no tables with
    ///   owners (before Linux 5.12), or neither the `queue` expression nor the `NFQUEUE` target.
    /// * [`TimedOut`](ErrorKind::TimedOut): the kernel did not reply within 5 seconds.
    /// * [`Other`](ErrorKind::Other): a table of this name exists (`EEXIST`, or `EPERM` if another
    ///   socket owns it), [`namespace`](Self::namespace) is not a network namespace, or the kernel
    ///   returns another error.
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

        // The trial must not contain base chains: to abort it, the kernel would unregister their
        // hooks, which drops all queued packets.
        let mut method = QueueMethod::Expression;
        let mut trial = nft::create(&table, ChainKind::Regular, method, &rules);
        let mut result = connection.transact(&trial, Outcome::Abort);
        if result.as_ref().is_err_and(|refusal| lacks_queue(refusal, &trial, &rules)) {
            method = QueueMethod::Target;
            trial = nft::create(&table, ChainKind::Regular, method, &rules);
            result = connection.transact(&trial, Outcome::Abort);
        }
        let operation = || format!("install table {table}");
        result.map_err(|refusal| {
            let lacking = lacks_queue(&refusal, &trial, &rules);
            let error = refused(operation(), &trial, refusal);
            if lacking {
                error
                    .with_kind(ErrorKind::Unsupported)
                    .with_detail("the kernel has neither NFT_QUEUE nor NFT_COMPAT with the NFQUEUE target")
            } else {
                error
            }
        })?;

        let commands = nft::create(&table, ChainKind::Base(self.priority), method, &rules);
        connection.transact(&commands, Outcome::Commit).map_err(|refusal| refused(operation(), &commands, refusal))?;
        Ok(Divert { table, connection: Mutex::new(connection) })
    }

    fn checked(&self) -> Result<Vec<(&Rule, RuleAction)>, Error> {
        let invalid = |detail: String| Error::new(ErrorKind::InvalidInput, "install rules").with_detail(detail);
        if let Some(name) = &self.table
            && (name.is_empty() || name.len() > LONGEST_NAME || name.contains('\0'))
        {
            return Err(invalid(format!("the table name must have 1 to {LONGEST_NAME} bytes and no NUL")));
        }
        if self.rules.is_empty() {
            return Err(invalid("there is no rule; add one with rule()".to_owned()));
        }
        let check = |(index, rule): (usize, _)| match Rule::check(rule) {
            Ok(action) => Ok((rule, action)),
            Err(reason) => Err(invalid(format!("rule {index}: {reason}"))),
        };
        self.rules.iter().enumerate().map(check).collect()
    }
}

/// Whether the kernel lacks the expression or the target that sends packets to a queue. For a rule
/// with the action queue, `ENOENT` has no other cause.
fn lacks_queue(refusal: &Refusal, commands: &[Command], rules: &[(&Rule, RuleAction)]) -> bool {
    let rule = match subject(refusal, commands) {
        Some(Subject::Rule(index)) => rules.get(index),
        _ => None,
    };
    errno(&refusal.error) == Some(Errno::NOENT) && matches!(rule, Some((_, RuleAction::Queue(..))))
}

fn subject(refusal: &Refusal, commands: &[Command]) -> Option<Subject> {
    Some(commands.get(refusal.command?)?.subject)
}

fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw_os_error)
}

/// Builds the error for a failed transaction, with the refused table, chain or rule and the reason,
/// if they are known.
fn refused(operation: String, commands: &[Command], refusal: Refusal) -> Error {
    let subject = subject(&refusal, commands);
    let operation = match subject {
        Some(Subject::Rule(index)) => format!("{operation}, rule {index}"),
        Some(Subject::Chain(hook)) => format!("{operation}, chain {}", nft::chain_name(hook)),
        Some(Subject::Table) | None => operation,
    };
    let (kind, hint) = match (errno(&refusal.error), subject) {
        // The kernel checks the capability once for the whole batch, and replies to its first
        // message.
        (Some(Errno::PERM), None) => (
            ErrorKind::NotPermitted,
            Some("CAP_NET_ADMIN is needed in the user namespace that owns the network namespace"),
        ),
        (Some(Errno::PERM), Some(Subject::Table)) => {
            (ErrorKind::Other, Some("another socket owns a table of this name"))
        }
        (Some(Errno::EXIST), Some(Subject::Table)) => (ErrorKind::Other, Some("a table of this name exists")),
        (Some(Errno::OPNOTSUPP), None) => (ErrorKind::Unsupported, Some("the kernel has no nf_tables")),
        (Some(Errno::OPNOTSUPP | Errno::INVAL), Some(Subject::Table)) => {
            (ErrorKind::Unsupported, Some("tables with an owner need Linux 5.12 or later"))
        }
        (Some(Errno::OPNOTSUPP | Errno::AFNOSUPPORT), _) => (ErrorKind::Unsupported, None),
        (Some(Errno::MSGSIZE), None) => (ErrorKind::InvalidInput, Some("too many rules for one transaction")),
        (Some(Errno::AGAIN), None) => (ErrorKind::TimedOut, Some("the kernel did not reply")),
        _ => (ErrorKind::Other, None),
    };
    let error = Error::new(kind, operation).with_source(refusal.error);
    match (refusal.text, hint) {
        (Some(text), _) => error.with_detail(text),
        (None, Some(hint)) => error.with_detail(hint),
        (None, None) => error,
    }
}

/// `NFT_NAME_MAXLEN` of the kernel, without the NUL.
const LONGEST_NAME: usize = 255;
