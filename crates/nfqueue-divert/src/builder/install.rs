//! Installing what a builder says.

use std::sync::Mutex;

use nfqueue_proto::types::{Error, ErrorKind};
use rustix::io::Errno;

use super::DivertBuilder;
use crate::{
    Divert, State,
    chain::{Chain, Place, chain_name},
    check_rules,
    checked::{KernelRule, Surroundings},
    denied::FlowTable,
    encoder::{Encoding, QueueMethod},
    failure::{errno, lacks_queue, refused, subject},
    family::TableFamily,
    forget::{Forget, forget_marks},
    hooks::Hooks,
    layout::{Layout, guards},
    nft::{Batch, ChainKind, Command, Creation, Ownership, Subject},
    socket::{self, Connection, Outcome, Refusal},
};

impl DivertBuilder {
    /// Creates the table, a base chain for each used hook, and the rules.
    ///
    /// One transaction creates everything. If the kernel refuses a part, it creates nothing. Before
    /// that, a trial transaction without base chains checks the rules, so that an error drops no
    /// queued packet.
    ///
    /// With [`flow_marks`](Self::flow_marks) a transaction has 560 KB or more. Where the process
    /// cannot enlarge the send buffer as far (in a user namespace, with the `net.core.wmem_max` of
    /// kernels before Linux 6.18), there are several. The last one creates all base chains with
    /// their rules, so that no packet meets a part of the table. If one is refused, the table is
    /// removed. A table that replaces one that has stayed
    /// ([`fail_closed`](Self::fail_closed)) drops all packets at the hooks of its rules and chains
    /// meanwhile, for some 100 ms; if one is refused, it continues to drop them.
    ///
    /// The rules use the `queue` expression of nf_tables (kernel option `NFT_QUEUE`). If the kernel
    /// lacks it, they use the `NFQUEUE` target of xtables (`NFT_COMPAT`,
    /// `NETFILTER_XT_TARGET_NFQUEUE`).
    ///
    /// Blocks the thread for some tens of milliseconds (25 to 46 ms measured on Linux 6.18 with two
    /// cores), because the kernel waits until no CPU uses the old rules. With
    /// [`flow_marks`](Self::flow_marks) it blocks for longer (105 ms, of which 75 ms are processor
    /// time: the table has many rules and the memory of [`denied_flows`](Self::denied_flows)), and
    /// also as long as [`forget_flows`](Divert::forget_flows). From an async task, call it in
    /// `spawn_blocking`.
    ///
    /// # Errors
    ///
    /// * [`InvalidInput`](ErrorKind::InvalidInput): there is no rule, set or chain; the table name
    ///   is invalid; a set or a rule is invalid; or the rules do not fit into one transaction. The
    ///   error names the set, or the rule by its index, from 0, and the field. Rules that can never
    ///   match are invalid. One transaction can carry some hundreds of rules. There is no limit if
    ///   the thread has `CAP_NET_ADMIN` in the initial user namespace (`SO_SNDBUFFORCE`); otherwise
    ///   `net.core.wmem_max` decides.
    /// * [`NotPermitted`](ErrorKind::NotPermitted): the thread lacks `CAP_NET_ADMIN` in the user
    ///   namespace that owns the network namespace.
    /// * [`Unsupported`](ErrorKind::Unsupported): the kernel has no nf_tables, with flow marks no
    ///   `NF_CT_NETLINK`, with [`offload`](Self::offload) no flowtables, no tables with owners
    ///   (before Linux 5.12), neither the `queue` expression nor the `NFQUEUE` target, or lacks
    ///   another expression that a rule needs.
    /// * [`TimedOut`](ErrorKind::TimedOut): the kernel did not reply within 5 seconds.
    /// * [`AlreadyExists`](ErrorKind::AlreadyExists): a table of this name exists (`EEXIST`, or
    ///   `EPERM` if another socket owns it), or another process has replaced the table between two
    ///   transactions.
    /// * [`Other`](ErrorKind::Other): the kernel returns another error.
    pub fn install(&self) -> Result<Divert, Error> {
        let (connection, devices) = self.open()?;
        self.install_on(connection, &devices).map_err(|(error, _)| error)
    }

    /// Checks the rules, and opens the socket in the network namespace of the calling thread. The
    /// rules are installed by [`Installation::try_install`], in any thread.
    ///
    /// # Errors
    ///
    /// As [`install`](Self::install), as far as the rules can be checked without the kernel.
    pub fn prepare(&self) -> Result<Installation, Error> {
        let (connection, devices) = self.open()?;
        Ok(Installation { builder: self.clone(), connection: Some(connection), devices })
    }

    /// Checks the rules, and opens the socket. Also returns the interfaces of the flowtable.
    fn open(&self) -> Result<(Connection, Vec<String>), Error> {
        let invalid = |detail: String| Error::new(ErrorKind::InvalidInput, "install rules").with_detail(detail);
        self.check(&[]).map_err(invalid)?;
        let devices = self.devices("install rules")?;
        check_rules(&self.rules, self.check(&devices).map_err(invalid)?).map_err(invalid)?;
        let failed = |error| Error::os("open a netlink socket for nf_tables", error);
        Ok((Connection::open(self.family).map_err(failed)?, devices))
    }

    /// Returns the socket if there is an error.
    fn install_on(&self, mut connection: Connection, devices: &[String]) -> Result<Divert, (Error, Connection)> {
        match self.transact(&mut connection, devices) {
            Ok((table, state)) => {
                let Installed { priority, flows, method, places, hooks, chains } = state;
                let rules = self.rules.clone();
                let state = State { connection, method, places, hooks, rules, foreign: None, chains };
                let sets = self.sets.clone();
                let offload = devices.to_vec();
                let (family, queues, fail_closed) = (self.family, self.queues, self.fail_closed);
                let state = Mutex::new(state);
                Ok(Divert { table, family, priority, flows, sets, offload, queues, fail_closed, state })
            }
            Err(error) => Err((error, connection)),
        }
    }

    fn transact(&self, connection: &mut Connection, devices: &[String]) -> Result<(String, Installed), Error> {
        let invalid = |detail: String| Error::new(ErrorKind::InvalidInput, "install rules").with_detail(detail);
        let surroundings = self.check(devices).map_err(invalid)?;
        let rules = check_rules(&self.rules, surroundings).map_err(invalid)?;
        let places = self.places(&rules);
        let layout = Layout::new(rules, &places, surroundings);
        let rules = &layout.rules;

        let table = match &self.table {
            Some(name) => name.clone(),
            None => format!("tokio_nfqueue_{}", connection.port()),
        };
        let none = Hooks::default();
        let encode = |creation: Creation, encoding: Encoding, hooks: Hooks| {
            let mut batch = Batch::new(&table, encoding);
            batch.create_table(creation);
            let (tracking, defragment) = hooks.beyond(none);
            batch.create_holder(self.family, tracking, defragment);
            self.sets.iter().for_each(|set| batch.create_set(set));
            if let Some(flows) = surroundings.flows {
                batch.create_denied_sets(self.family, flows);
                if surroundings.offloads() {
                    batch.create_recalled_set(flows);
                    batch.create_flowtable(devices);
                }
            }
            let kind = if encoding.trial { ChainKind::Regular } else { ChainKind::Base };
            layout.chains.iter().for_each(|chain| batch.create_chain(chain, kind, devices));
            if hooks.reassembles() {
                guards(&places, surroundings).iter().for_each(|rule| batch.add_rule(rule));
            }
            rules.iter().for_each(|rule| batch.add_rule(rule));
            batch.commands
        };

        // The trial must not contain base chains: to abort it, the kernel would unregister their
        // hooks, which drops all queued packets.
        let operation = || format!("install table {table}");
        let mut method = QueueMethod::Expression;
        let ownership = match self.fail_closed {
            false => Ownership::Process,
            true if has_lasting_tables(connection) => Ownership::Lasting,
            true => Ownership::None,
        };
        let mut creation = Creation { ownership, replaces: false };
        loop {
            let trial = encode(creation, Encoding { method, trial: true }, none);
            let Err(refusal) = connection.transact(&trial, Outcome::Abort) else { break };
            if method == QueueMethod::Expression && lacks_queue(&refusal, &trial, rules) {
                method = QueueMethod::Target;
            } else if self.fail_closed && !creation.replaces && exists(&refusal, &trial) {
                creation.replaces = true;
            } else {
                return Err(refused(operation(), &trial, rules, refusal));
            }
        }

        if let Some(flows) = surroundings.flows {
            // The marks of a table that was here before, perhaps of a process that was killed.
            forget_marks(connection, flows.marks, Forget::All).map_err(|error| error.with_operation(operation()))?;
        }
        let hooks = self.hooks(rules, connection).map_err(|error| error.with_operation(operation()))?;
        let commands = encode(creation, Encoding { method, trial: false }, hooks);
        match connection.transact(&commands, Outcome::Commit) {
            Ok(()) => {}
            Err(refusal) if too_long(&refusal) => {
                let longest = connection.longest_batch();
                let marker = format!("installing_{}", connection.port());
                let parts = self.parts(&table, creation, commands, &places, &marker, longest);
                // Before a table is replaced that would then stay half done.
                if parts.iter().any(|part| socket::length(part, self.family) > longest) {
                    return Err(refused(operation(), &[], rules, refusal));
                }
                transact_all(connection, &table, creation, &marker, &parts)
                    .map_err(|(part, refusal)| refused(operation(), part, rules, refusal))?;
            }
            Err(refusal) => return Err(refused(operation(), &commands, rules, refusal)),
        }
        let Surroundings { priority, flows, .. } = surroundings;
        Ok((table, Installed { priority, flows, method, places, hooks, chains: layout.chains }))
    }

    /// Divides what creates a table into several transactions, the last of which lets packets meet
    /// the rules: it contains all rules of base chains.
    ///
    /// The base chains are created there too. But if the table replaces one that has stayed, no
    /// packet may pass meanwhile: then the first transaction creates them, and they drop all
    /// packets at the places of the rules.
    ///
    /// Another process may replace a table without an owner meanwhile. So the first transaction
    /// creates a chain that only this installation knows, and the others are refused without it.
    fn parts(
        &self,
        table: &str,
        creation: Creation,
        commands: Vec<Command>,
        places: &[Place],
        marker: &str,
        longest: usize,
    ) -> Vec<Vec<Command>> {
        let batch = || Batch::new(table, Encoding { method: QueueMethod::Expression, trial: false });
        let (mut last, others): (Vec<_>, Vec<_>) = commands.into_iter().partition(|command| command.hooked);
        let (mut first, others): (Vec<_>, Vec<_>) = others.into_iter().partition(Command::comes_first);
        let mut beginning = batch();
        beginning.create_marker(marker);
        if creation.replaces {
            let mut opening = batch();
            for place in places {
                let name = chain_name(*place, self.priority.number());
                beginning.add_drop(&name);
                opening.delete_rules(&name);
            }
            let (chains, rules): (Vec<_>, Vec<_>) = last.into_iter().partition(Command::is_chain);
            first.extend(chains);
            last = opening.commands.into_iter().chain(rules).collect();
        }
        first.extend(beginning.commands);
        let mut parts = vec![first];
        let with_marker = |commands: Vec<Command>| {
            let mut part = batch();
            part.require_marker(marker);
            part.commands.extend(commands);
            part.commands
        };
        let mut rest = others.into_iter();
        let ranges = socket::parts(rest.as_slice(), self.family, longest.saturating_sub(MARKER));
        parts.extend(ranges.into_iter().map(|range| with_marker(rest.by_ref().take(range.len()).collect())));
        let mut ending = batch();
        ending.delete_marker(marker);
        last.extend(ending.commands);
        parts.push(with_marker(last));
        parts
    }

    fn hooks(&self, rules: &[KernelRule<'_>], connection: &mut Connection) -> Result<Hooks, Error> {
        let tracking = self.track || rules.iter().any(KernelRule::tracks);
        let defragment = self.defragment.unwrap_or_else(|| rules.iter().any(KernelRule::needs_reassembly));
        let given = Hooks { tracking, allowed: self.defragment != Some(false), ..Hooks::default() };
        if !defragment || self.family == TableFamily::Bridge {
            return Ok(given);
        }
        let hooks = given.with_reassembly(connection);
        if self.defragment == Some(true) && !hooks.reassembles() {
            return Err(
                Error::new(ErrorKind::Unsupported, "").with_detail("the kernel has neither NFT_TPROXY nor NFT_CT")
            );
        }
        Ok(hooks)
    }
}

/// What the kernel has installed.
struct Installed {
    priority: i32,
    flows: Option<FlowTable>,
    method: QueueMethod,
    places: Vec<Place>,
    hooks: Hooks,
    chains: Vec<Chain>,
}

/// Whether the transaction does not fit in the send buffer. The kernel has done nothing.
fn too_long(refusal: &Refusal) -> bool {
    refusal.command.is_none() && errno(refusal) == Some(Errno::MSGSIZE)
}

/// Creates a table by several transactions. If one is refused, returns its commands. Then there
/// is no table, unless it replaces one: that stays, and drops all packets at the places of its
/// rules.
fn transact_all<'a>(
    connection: &mut Connection,
    table: &str,
    creation: Creation,
    marker: &str,
    parts: &'a [Vec<Command>],
) -> Result<(), (&'a [Command], Refusal)> {
    for part in parts {
        if let Err(refusal) = connection.transact(part, Outcome::Commit) {
            if !creation.replaces {
                let mut batch = Batch::new(table, Encoding { method: QueueMethod::Expression, trial: false });
                // Only the own table.
                batch.require_marker(marker);
                batch.delete_table();
                let _ = connection.transact(&batch.commands, Outcome::Commit);
            }
            return Err((part, refusal));
        }
    }
    Ok(())
}

/// More than the bytes of [`Batch::require_marker`]: a table has a name of at most 255 bytes.
const MARKER: usize = 400;

/// Whether the kernel has refused to create a table because there is one.
fn exists(refusal: &Refusal, commands: &[Command]) -> bool {
    subject(refusal, commands) == Some(&Subject::Table) && errno(refusal) == Some(Errno::EXIST)
}

/// Whether the kernel keeps a table without its owner.
fn has_lasting_tables(connection: &mut Connection) -> bool {
    let table = format!("tokio_nfqueue_{}_probe", connection.port());
    let mut batch = Batch::new(&table, Encoding { method: QueueMethod::Expression, trial: true });
    batch.create_table(Creation { ownership: Ownership::Lasting, replaces: false });
    let refused = connection.transact(&batch.commands, Outcome::Abort).err();
    // nf_tables_newtable. Another error returns when the table is installed.
    !refused.is_some_and(|refusal| matches!(errno(&refusal), Some(Errno::OPNOTSUPP | Errno::INVAL)))
}

/// Rules that can be installed: [`DivertBuilder::prepare`].
#[derive(Debug)]
pub struct Installation {
    builder: DivertBuilder,
    /// `None` after it has been installed.
    connection: Option<Connection>,
    devices: Vec<String>,
}

impl Installation {
    /// Installs the rules: see [`DivertBuilder::install`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn install(self) -> Result<Divert, Error> {
        let Self { builder, connection, devices } = self;
        let missing = || Error::new(ErrorKind::InvalidInput, "install rules").with_detail("they are installed");
        builder.install_on(connection.ok_or_else(missing)?, &devices).map_err(|(error, _)| error)
    }

    /// Installs the rules. `None` while another socket owns a table of this name, for example that
    /// of a process which is about to end: try again later. The kernel does not report that a table
    /// has been removed.
    ///
    /// Blocks the thread as [`DivertBuilder::install`] does.
    ///
    /// # Errors
    ///
    /// As [`DivertBuilder::install`], except that it returns `None` instead of the error that
    /// another socket owns the table. A table of this name without an owner is an error.
    /// [`InvalidInput`](ErrorKind::InvalidInput) after it has been installed.
    pub fn try_install(&mut self) -> Result<Option<Divert>, Error> {
        let Some(connection) = self.connection.take() else {
            return Err(Error::new(ErrorKind::InvalidInput, "install rules").with_detail("they are installed"));
        };
        match self.builder.install_on(connection, &self.devices) {
            Ok(divert) => Ok(Some(divert)),
            // The kernel lacks no capability, so it is the owner of the table: see `failure`.
            Err((error, connection))
                if error.kind() == ErrorKind::AlreadyExists && error.errno() == Some(Errno::PERM) =>
            {
                self.connection = Some(connection);
                Ok(None)
            }
            Err((error, connection)) => {
                self.connection = Some(connection);
                Err(error)
            }
        }
    }
}
