//! nf_tables rules that send packets to a queue. The kernel removes them when the process ends.
#![deny(unsafe_code)]

/// The code in the README is compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod action;
mod builder;
mod chain;
mod chained;
mod checked;
pub mod decode;
mod denied;
mod dump;
mod elements;
mod encoder;
mod facts;
mod failure;
mod family;
mod flow_chain;
mod flows;
mod forget;
mod handover;
mod hooks;
mod layout;
mod links;
mod matching;
mod nft;
mod offload;
mod priority;
mod rule;
mod script;
mod set;
mod socket;
mod sys;
mod tuple;

use std::{
    fmt,
    ops::RangeInclusive,
    sync::{Mutex, MutexGuard, PoisonError},
};

use self::{
    chain::{Chain, Place, chain_name},
    checked::{KernelRule, Surroundings},
    denied::FlowTable,
    encoder::{Encoding, QueueMethod},
    failure::{lacks_queue, refused},
    forget::{Forget, Forgotten, denied_elements, forget_marks},
    handover::{ForeignRules, InstalledRules},
    hooks::Hooks,
    layout::{Layout, guards},
    nft::{Batch, ChainKind},
    socket::{Connection, Outcome},
    tuple::version_of,
};
use rustix::io::Errno;

pub use nfqueue_proto::types::{ConnectionState, Direction, Error, ErrorKind, FlowMarks, FlowTuple, Hook, Protocol};

pub use self::{
    builder::{DivertBuilder, Installation},
    dump::RuleCounter,
    elements::DivertSet,
    family::TableFamily,
    handover::{Lent, Loan},
    matching::{Match, PacketField, PortRange, Rate, TcpFlags},
    priority::Priority,
    rule::Rule,
    set::{NamedSet, SetElement, SetField, SetValue},
};

/// nf_tables rules that send packets to queues. The rules exist until this value is dropped.
///
/// The rules are in a separate table, of family `inet` unless
/// [`family`](DivertBuilder::family) says otherwise. A netlink socket in this value owns the
/// table (Linux 5.12 and later). Other programs can read the table but cannot change it, and `nft
/// flush ruleset` skips it. The kernel removes it when this value is dropped, or when the process
/// ends for any reason, including a signal.
///
/// The table is created in the network namespace of the thread that calls
/// [`install`](DivertBuilder::install). (`NetworkNamespace::run` of tokio-nfqueue calls a function
/// in another namespace.)
///
/// ```no_run
/// use nfqueue_divert::{Divert, Hook, Protocol, Rule};
///
/// # fn main() -> Result<(), nfqueue_divert::Error> {
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
/// # Fail open, or fail closed
///
/// By default the rules end with the process, and the packets pass unfiltered: they fail open. With
/// [`fail_closed`](DivertBuilder::fail_closed) the kernel keeps them after a failure, and drops the
/// packets that they match until a new process has installed a table of the same name.
///
/// | event | default | `fail_closed` |
/// |---|---|---|
/// | the process is killed, crashes or panics | no table stays; packets pass | the table stays; packets are dropped |
/// | it returns early, or drops this value (tokio-nfqueue: or the queue) | the same | the same |
/// | it calls [`close`](Self::close) (tokio-nfqueue: or closes the queue), for example at SIGTERM | no table stays; packets pass | the same |
/// | it ends by a signal that it does not handle, for example SIGTERM | no table stays; packets pass | the table stays; packets are dropped |
/// | it hands the table over | the table goes along | the same |
/// | a new process installs a table of the same name | refused while the old process lives | the same; a table that was left behind is replaced |
///
/// Packets that wait in a queue when its socket is closed are dropped in each case. With `bypass`,
/// which `fail_closed` does not allow, packets that come between the end of the queue and that of
/// the table pass; otherwise they are dropped. Connections that a verdict for the whole connection
/// has accepted pass while a table stays.
///
/// To remove a table that was left behind: `nft delete table inet NAME`. A host that must drop
/// packets before the program has been started for the first time needs rules of `nft -f`;
/// [`to_nft`](Self::to_nft) prints them.
///
/// # Changes while it is installed
///
/// [`replace_rules`](Self::replace_rules) replaces all rules in one step. [`set`](Self::set)
/// changes the elements of named sets, which rules match with [`Match::in_set`].
/// [`counters`](Self::counters) reads how many packets each rule has matched.
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
/// `Divert`, and do not create and close many; change its rules with
/// [`replace_rules`](Self::replace_rules). [`install`](DivertBuilder::install) drops no queued
/// packet, with one exception: if the kernel refuses nothing but connection tracking or
/// defragmentation, which `install` cannot try out beforehand, the failed `install` removes its
/// hooks again.
///
/// # Installing a table can queue packets again
///
/// A packet continues behind the hook at which it was queued, and the kernel finds that hook by its
/// position (`nf_reinject`). If a hook is registered at the same point, at a priority before or
/// equal to that of the queueing chain, a packet that is queued there at this time comes to the
/// queue a second time when it is accepted, with a new id. This concerns the base chains of the
/// table and, if no other rule has needed them before, the hooks of connection tracking (priority
/// −200) and of defragmentation (−400), at `Prerouting` and `Output`. So install a table before
/// packets are queued, and declare what later rules need:
/// [`DivertBuilder::chain`], [`DivertBuilder::track_connections`], [`DivertBuilder::defragment`].
pub struct Divert {
    table: String,
    family: TableFamily,
    /// The priority of rules without one of their own.
    priority: i32,
    flows: Option<FlowTable>,
    sets: Vec<NamedSet>,
    /// The interfaces of the flowtable.
    offload: Vec<String>,
    /// The first and the last queue of rules without a target.
    queues: Option<(u16, u16)>,
    fail_closed: bool,
    state: Mutex<State>,
}

/// What changes while the table is installed.
struct State {
    connection: Connection,
    method: QueueMethod,
    /// The base chains of rules.
    places: Vec<Place>,
    hooks: Hooks,
    rules: Vec<Rule>,
    /// Instead of `rules`, while the rules are those of the process that had the table before.
    foreign: Option<ForeignRules>,
    /// All chains that exist, also those that no rule needs any more.
    chains: Vec<Chain>,
}

impl Divert {
    /// Returns a builder with no rule, a unique table name and priority 0.
    pub fn builder() -> DivertBuilder {
        DivertBuilder::new()
    }

    /// The name of the table. `nft list table inet NAME` lists the table.
    pub fn table(&self) -> &str {
        &self.table
    }

    /// Whether the table stays when the process ends without [closing](Self::close) it:
    /// [`DivertBuilder::fail_closed`].
    pub fn fails_closed(&self) -> bool {
        self.fail_closed
    }

    /// The flow marks of the table.
    #[doc(hidden)]
    pub fn flow_marks(&self) -> Option<FlowMarks> {
        self.flows.map(|flows| flows.marks)
    }

    /// Where rules without a target send packets: [`DivertBuilder::default_queues`].
    #[doc(hidden)]
    pub fn default_queues(&self) -> Option<RangeInclusive<u16>> {
        self.queues.map(|(first, last)| first..=last)
    }

    /// Replaces all rules in one step.
    ///
    /// The kernel changes from the old rules to the new ones in one transaction: at each hook, a
    /// packet meets either the old or the new rules. Queued packets stay in their queues, and are
    /// not queued again. The base chains and the elements of named sets stay. The counters begin at
    /// 0, and the token buckets of rates are full.
    ///
    /// A condition on more than 16 ranges of ports, or on more than about 16 networks, is an
    /// exception: the kernel holds the ranges in a tree, and a packet that it evaluates at this
    /// very time may find neither the old nor the new tree, so that the rule does not match it
    /// (seen on Linux 6.18). Fewer ranges, any number of single ports, and named sets are not
    /// concerned.
    ///
    /// If the new rules need a hook, connection tracking or defragmentation that the table does not
    /// have yet, the transaction adds them: see [the effect on queued
    /// packets](Self#installing-a-table-can-queue-packets-again). What the table has, it keeps
    /// until it is removed.
    ///
    /// Blocks the thread as [`install`](DivertBuilder::install) does.
    ///
    /// # Errors
    ///
    /// As `install`; the old rules then stay installed. No rule is not an error.
    pub fn replace_rules(&self, rules: impl IntoIterator<Item = Rule>) -> Result<(), Error> {
        let rules: Vec<Rule> = rules.into_iter().collect();
        let operation = || format!("replace the rules of table {}", self.table);
        let surroundings = self.surroundings();
        let invalid = |reason| Error::new(ErrorKind::InvalidInput, operation()).with_detail(reason);
        let checked = check_rules(&rules, surroundings).map_err(invalid)?;

        let mut state = self.lock();
        let state = &mut *state;
        let mut places: Vec<Place> =
            checked.iter().map(|rule| rule.place).chain(state.places.iter().copied()).collect();
        places.sort();
        places.dedup();
        let layout = Layout::new(checked, &places, surroundings);
        let checked = &layout.rules;
        let added: Vec<&Chain> = layout.chains.iter().filter(|chain| !state.chains.contains(chain)).collect();
        let kept = |rule: &KernelRule<'_>| state.chains.iter().any(|chain| chain.fixed && chain.name == rule.chain);
        let new_hooks = added.iter().any(|chain| chain.base.is_some());
        let hooks = Hooks::needed(checked, &mut state.connection, state.hooks);

        let encode = |method: QueueMethod, trial: bool| {
            let mut batch = Batch::new(&self.table, Encoding { method, trial });
            let (tracking, defragment) = hooks.beyond(state.hooks);
            batch.create_holder(self.family, tracking, defragment);
            let kind = if trial { ChainKind::Regular } else { ChainKind::Base };
            added.iter().for_each(|chain| batch.create_chain(chain, kind, &self.offload));
            state.chains.iter().filter(|chain| !chain.fixed).for_each(|chain| batch.delete_rules(&chain.name));
            if hooks.reassembles() && !trial {
                guards(&places, surroundings).iter().for_each(|rule| batch.add_rule(rule));
            }
            checked.iter().filter(|rule| !kept(rule)).for_each(|rule| batch.add_rule(rule));
            batch.commands
        };
        // If the kernel refused the transaction, it would unregister the new hooks.
        let outcomes: &[Outcome] = match new_hooks || hooks != state.hooks {
            true => &[Outcome::Abort, Outcome::Commit],
            false => &[Outcome::Commit],
        };
        let mut method = state.method;
        for outcome in outcomes {
            loop {
                let commands = encode(method, *outcome == Outcome::Abort);
                let Err(refusal) = state.connection.transact(&commands, *outcome) else { break };
                // The old rules had no queue.
                if method == QueueMethod::Expression && lacks_queue(&refusal, &commands, checked) {
                    method = QueueMethod::Target;
                } else {
                    return Err(refused(operation(), &commands, checked, refusal));
                }
            }
        }
        let added: Vec<Chain> = added.into_iter().cloned().collect();
        drop(layout);
        state.chains.extend(added);
        state.method = method;
        state.places = places;
        state.hooks = hooks;
        state.rules = rules;
        state.foreign = None;
        Ok(())
    }

    /// Forgets all verdicts for connections (`Verdict::for_flow`): the next packet of each
    /// connection comes to the queue again.
    ///
    /// A verdict that is sent while this runs may be forgotten or not. So may an accept whose first
    /// packet has not yet passed all hooks: see `guide::flows`, "Taking verdicts back". It walks
    /// all entries of connection tracking in the network namespace, with
    /// [`offload`](DivertBuilder::offload) twice.
    ///
    /// Blocks the thread meanwhile; from an async task, call it in `spawn_blocking`.
    ///
    /// # Errors
    ///
    /// * [`InvalidInput`](ErrorKind::InvalidInput): the table has no
    ///   [flow marks](DivertBuilder::flow_marks).
    /// * [`NotPermitted`](ErrorKind::NotPermitted): the thread has lost `CAP_NET_ADMIN`.
    /// * [`Other`](ErrorKind::Other): the kernel returns another error. Some verdicts may be
    ///   forgotten then.
    pub fn forget_flows(&self) -> Result<(), Error> {
        let operation = || format!("forget the flows of table {}", self.table);
        let flows = self.flows(operation)?;
        let mut state = self.lock();
        let mut batch = Batch::new(&self.table, Encoding { method: state.method, trial: false });
        denied::names(self.family).for_each(|name| batch.clear_set(name));
        let commands = batch.commands;
        let result = state.connection.transact(&commands, Outcome::Commit);
        result.map_err(|refusal| refused(operation(), &commands, &[], refusal))?;
        let forgotten = forget_marks(&mut state.connection, flows.marks, Forget::Verdicts);
        let forgotten = forgotten.map_err(|error| error.with_operation(operation()))?;
        self.recall(&mut state, &forgotten, operation)
    }

    fn recall(&self, state: &mut State, forgotten: &Forgotten, operation: impl Fn() -> String) -> Result<(), Error> {
        if self.offload.is_empty() {
            return Ok(());
        }
        let recalled = forget::recall(&mut state.connection, &self.table, forgotten);
        recalled.map_err(|refusal| refused(operation(), &[], &[], refusal))
    }

    /// Forgets the verdict for one connection. Either direction of the connection will do, and with
    /// address translation the addresses that a packet shows in the queue or those before the
    /// translation. Returns whether there was a verdict.
    ///
    /// Blocks the thread: it walks the entries of connection tracking, and if the connection was
    /// denied, the kernel then waits until no CPU uses the old set, as for
    /// [`install`](DivertBuilder::install). From an async task, call it in `spawn_blocking`.
    ///
    /// # Errors
    ///
    /// As [`forget_flows`](Self::forget_flows); [`InvalidInput`](ErrorKind::InvalidInput) also if
    /// the addresses are of different IP versions.
    pub fn forget_flow(&self, flow: FlowTuple) -> Result<bool, Error> {
        let operation = || format!("forget a flow of table {}", self.table);
        let flows = self.flows(operation)?;
        let Some(version) = version_of(flow) else {
            let error = Error::new(ErrorKind::InvalidInput, operation());
            return Err(error.with_detail("the addresses are of different IP versions"));
        };
        let mut state = self.lock();
        let state = &mut *state;
        let forgotten = forget_marks(&mut state.connection, flows.marks, Forget::VerdictOf(flow));
        let forgotten = forgotten.map_err(|error| error.with_operation(operation()))?;
        self.recall(state, &forgotten, operation)?;
        let marked = forgotten.flows;
        let denied = loop {
            let found = denied_elements(&mut state.connection, &self.table, version, flow, &marked);
            let found = found.map_err(|error| Error::os(operation(), error))?;
            let mut batch = Batch::new(&self.table, Encoding { method: state.method, trial: false });
            found.iter().for_each(|(set, key)| batch.delete_elements(set, &[(key.clone(), None)]));
            if found.is_empty() {
                break false;
            }
            match state.connection.transact(&batch.commands, Outcome::Commit) {
                // One of them has expired meanwhile.
                Err(refusal) if failure::errno(&refusal) == Some(Errno::NOENT) => {}
                result => {
                    result.map_err(|refusal| refused(operation(), &batch.commands, &[], refusal))?;
                    break found.iter().any(|(set, _)| *set != denied::beside(version));
                }
            }
        };
        Ok(denied || !marked.is_empty())
    }

    fn flows(&self, operation: impl Fn() -> String) -> Result<FlowTable, Error> {
        let missing = || Error::new(ErrorKind::InvalidInput, operation()).with_detail("the table has no flow marks");
        self.flows.ok_or_else(missing)
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
        let mut state = self.lock();
        let operation = || format!("remove the rules of table {}", self.table);
        let mut batch = Batch::new(&self.table, Encoding { method: state.method, trial: false });
        state.chains.iter().filter(|chain| !chain.fixed).for_each(|chain| batch.delete_rules(&chain.name));
        let commands = batch.commands;
        state
            .connection
            .transact(&commands, Outcome::Commit)
            .map_err(|refusal| refused(operation(), &commands, &[], refusal))?;
        state.rules.clear();
        state.foreign = None;
        Ok(())
    }

    /// How many packets each rule has matched since it was installed, in the order of the rules.
    ///
    /// # Errors
    ///
    /// [`Other`](ErrorKind::Other) if other programs change nf_tables all the time, so that the
    /// kernel cannot list the rules, or if the kernel returns another error.
    pub fn counters(&self) -> Result<Vec<RuleCounter>, Error> {
        let mut state = self.lock();
        let objects = state
            .connection
            .dump(&nft::get_rules(&self.table))
            .map_err(|error| Error::os(format!("read the counters of table {}", self.table), error))?;
        let found: Vec<(String, RuleCounter)> = objects.iter().filter_map(|rule| dump::counter(rule)).collect();
        let installed = self.installed(&state)?;
        let mut counters = vec![RuleCounter::default(); installed.count];
        for place in &state.places {
            let name = chain_name(*place, self.priority);
            let indices = installed.rules.iter().filter(|(chain, _)| *chain == name).map(|(_, index)| *index);
            let of_chain = found.iter().filter(|(chain, _)| *chain == name).map(|(_, counter)| counter);
            for (index, counter) in indices.zip(of_chain) {
                if let Some(sum) = index.and_then(|index| counters.get_mut(index)) {
                    sum.packets = sum.packets.saturating_add(counter.packets);
                    sum.bytes = sum.bytes.saturating_add(counter.bytes);
                }
            }
        }
        Ok(counters)
    }

    /// The named set with this name.
    ///
    /// Its operations return an error if the [`DivertBuilder::set`] has not declared it.
    pub fn set(&self, name: impl Into<String>) -> DivertSet<'_> {
        DivertSet::new(self, name.into())
    }

    /// The table with its present rules, as a script for `nft -f`. See [`DivertBuilder::to_nft`].
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](ErrorKind::InvalidInput) if `nft` cannot read the table's name.
    pub fn to_nft(&self) -> Result<String, Error> {
        let state = self.lock();
        if let Some(script) = state.foreign.as_ref().and_then(|foreign| foreign.script.clone()) {
            return Ok(script);
        }
        builder::print(&self.table, self.surroundings(), &state.rules, &state.places)
    }

    /// Removes the rules, and then the table. The other methods return errors afterwards.
    ///
    /// The second step drops [all packets queued in the network
    /// namespace](Self#removing-a-table-drops-queued-packets). Call
    /// [`remove_rules`](Self::remove_rules), close the queues, and then call this method.
    ///
    /// Blocks the thread as [`install`](DivertBuilder::install) does. Dropping the value has the
    /// same effect in one step, but returns no error; except that a table that
    /// [fails closed](DivertBuilder::fail_closed) stays when the value is dropped.
    ///
    /// Does nothing if it has been closed before.
    ///
    /// # Errors
    ///
    /// As `remove_rules`. The socket is closed even then, and the kernel removes the table with it.
    pub fn close(&self) -> Result<(), Error> {
        if self.is_closed() {
            return Ok(());
        }
        let removed = self.remove_rules().and_then(|()| self.remove_table());
        self.lock().connection.close();
        removed
    }

    /// Whether [`close`](Self::close) has been called.
    #[doc(hidden)]
    pub fn is_closed(&self) -> bool {
        self.lock().connection.socket().is_err()
    }

    fn remove_table(&self) -> Result<(), Error> {
        let mut state = self.lock();
        let mut batch = Batch::new(&self.table, Encoding { method: state.method, trial: false });
        batch.delete_table();
        let commands = batch.commands;
        state
            .connection
            .transact(&commands, Outcome::Commit)
            .map_err(|refusal| refused(format!("remove table {}", self.table), &commands, &[], refusal))
    }

    fn surroundings(&self) -> Surroundings<'_> {
        Surroundings {
            family: self.family,
            sets: &self.sets,
            priority: self.priority,
            flows: self.flows,
            offload: &self.offload,
            queues: self.queues,
            fail_closed: self.fail_closed,
        }
    }

    /// The rules that are installed.
    fn installed(&self, state: &State) -> Result<InstalledRules, Error> {
        if let Some(foreign) = &state.foreign {
            return Ok(foreign.installed.clone());
        }
        let layout = self.layout(state).map_err(|reason| Error::new(ErrorKind::Other, reason))?;
        let counting = layout.rules.iter().filter(|rule| rule.counts);
        let rules = counting.map(|rule| (rule.chain.clone(), rule.index)).collect();
        Ok(InstalledRules { count: state.rules.len(), rules })
    }

    /// The chains and rules of the table.
    fn layout<'a>(&'a self, state: &'a State) -> Result<Layout<'a>, String> {
        let surroundings = self.surroundings();
        Ok(Layout::new(check_rules(&state.rules, surroundings)?, &state.places, surroundings))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic cannot leave the connection in an inconsistent state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Divert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Divert").field("table", &self.table).finish_non_exhaustive()
    }
}

/// Checks rules. The reason for a refusal begins with the rule.
fn check_rules<'a>(rules: &'a [Rule], surroundings: Surroundings<'a>) -> Result<Vec<KernelRule<'a>>, String> {
    let mut checked = Vec::with_capacity(rules.len());
    for (index, rule) in rules.iter().enumerate() {
        let of_kernel = rule.check(index, surroundings).map_err(|reason| format!("rule {index}: {reason}"))?;
        checked.extend(of_kernel);
    }
    Ok(checked)
}
