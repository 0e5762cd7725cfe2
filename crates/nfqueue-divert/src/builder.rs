//! The rules and settings of a table.

use std::{ops::RangeInclusive, sync::Mutex, time::Duration};

use nfqueue_proto::types::{Error, ErrorKind, FlowMarks, Hook};
use rustix::io::Errno;

use super::{
    Divert, State,
    chain::{Chain, LONGEST_NAME, Place},
    check_rules,
    checked::{KernelRule, Surroundings},
    denied::{self, FlowTable},
    encoder::{Encoding, QueueMethod},
    failure::{errno, lacks_queue, refused, subject},
    family::TableFamily,
    forget::{Forget, forget_marks},
    layout::Layout,
    nft::{Batch, ChainKind, Command, Creation, Ownership, Subject},
    offload::{Interfaces, SHORTEST_DENIAL},
    priority::Priority,
    rule::Rule,
    script::script,
    set::{NamedSet, name_problem},
    socket::{Connection, Outcome, Refusal},
};

/// The rules and settings of a [`Divert`], from [`Divert::builder`].
#[derive(Debug, Clone)]
#[must_use = "no packet is sent to a queue until `install` is called"]
pub struct DivertBuilder {
    table: Option<String>,
    family: TableFamily,
    priority: Priority,
    sets: Vec<NamedSet>,
    chains: Vec<(Hook, Option<Priority>)>,
    track: bool,
    /// `None`: if a rule needs it.
    defragment: Option<bool>,
    flow_marks: Option<FlowMarks>,
    /// Whether `flow_marks` was called.
    flow_marks_chosen: bool,
    fail_closed: bool,
    queues: Option<(u16, u16)>,
    /// Capacity and time-out of the sets of denied connections.
    denied: (u32, Duration),
    offload: Option<Interfaces>,
    rules: Vec<Rule>,
}

impl DivertBuilder {
    pub(super) fn new() -> Self {
        Self {
            table: None,
            family: TableFamily::Inet,
            priority: Priority::FILTER,
            sets: Vec::new(),
            chains: Vec::new(),
            track: false,
            defragment: None,
            flow_marks: None,
            flow_marks_chosen: false,
            fail_closed: false,
            queues: None,
            denied: (65_535, Duration::from_secs(600)),
            offload: None,
            rules: Vec::new(),
        }
    }

    /// Sets the name of the table, 1 to 255 bytes without NUL. Default: `tokio_nfqueue_` and a
    /// number that is unique in the network namespace (the netlink port id).
    pub fn table(mut self, name: impl Into<String>) -> Self {
        self.table = Some(name.into());
        self
    }

    /// Sets the family of the table. Default: [`Inet`](TableFamily::Inet), IPv4 and IPv6.
    ///
    /// In the family [`Bridge`](TableFamily::Bridge), rules can send packets to a queue only if the
    /// kernel has the `queue` expression (kernel option `NFT_QUEUE`), and can reject only if it has
    /// `NFT_BRIDGE_REJECT`.
    pub fn family(mut self, family: TableFamily) -> Self {
        self.family = family;
        self
    }

    /// Sets the priority of rules that have [none of their own](Rule::priority): a [`Priority`], or
    /// its number. Default: 0, the priority of `filter`.
    ///
    /// Chains with a priority below −400 see fragments that are not yet reassembled. Later chains
    /// see reassembled packets only if connection tracking or another module reassembles them; see
    /// [`defragment`](Self::defragment).
    pub fn priority(mut self, priority: impl Into<Priority>) -> Self {
        self.priority = priority.into();
        self
    }

    /// Adds a named set, whose elements rules match with [`Match::in_set`](super::Match::in_set).
    pub fn set(mut self, set: NamedSet) -> Self {
        self.sets.push(set);
        self
    }

    /// Creates a base chain even if no rule needs it yet, so that
    /// [`replace_rules`](Divert::replace_rules) need not register a hook for later rules. `None` is
    /// the priority of rules without one of their own.
    pub fn chain(mut self, hook: Hook, priority: impl Into<Option<Priority>>) -> Self {
        self.chains.push((hook, priority.into()));
        self
    }

    /// Switches connection tracking on while the table exists, even if no rule needs it. Default:
    /// only if a rule needs it.
    ///
    /// Conditions on the connection need connection tracking, which costs time for every packet of
    /// the network namespace. A rule sees the connection at a priority above −200
    /// ([`Priority::CONNECTION_TRACKING`]).
    pub fn track_connections(mut self) -> Self {
        self.track = true;
        self
    }

    /// Whether the kernel reassembles fragments before the rules see them. Default: if a rule
    /// compares fields of the transport header (ports, TCP flags, ICMP types) at a hook where
    /// fragments can arrive.
    ///
    /// Only a first fragment has a transport header, so that the rules would not match the others.
    /// Reassembly costs little for packets that are not fragments. The kernel does it without
    /// connection tracking if it has the `tproxy` expression (`NFT_TPROXY`), and otherwise with it.
    /// If it has neither, it does not reassemble, which is an error only for
    /// `defragment(true)`. It does not concern the family [`Bridge`](TableFamily::Bridge).
    pub fn defragment(mut self, on: bool) -> Self {
        self.defragment = Some(on);
        self
    }

    /// Makes verdicts for whole connections possible (`Verdict::for_flow`), and verdicts that
    /// reject packets. Default: off (`None`); on, with [`FlowMarks::default`], for the rules of a
    /// queue (`QueueBuilder::divert`) of an IP family.
    ///
    /// Give the same marks to `QueueBuilder::flow_marks`, except for the rules of a queue, which
    /// takes those of its rules. The
    /// table gets chains that carry out these verdicts, and needs connection tracking; see
    /// `guide::flows` of tokio-nfqueue. Connections that were marked before are treated as
    /// new: [`install`](Self::install) removes their marks.
    pub fn flow_marks(mut self, marks: impl Into<Option<FlowMarks>>) -> Self {
        self.flow_marks = marks.into();
        self.flow_marks_chosen = true;
        self
    }

    /// The flow marks, if [`flow_marks`](Self::flow_marks) was called.
    #[doc(hidden)]
    pub fn chosen_flow_marks(&self) -> Option<Option<FlowMarks>> {
        self.flow_marks_chosen.then_some(self.flow_marks)
    }

    /// See [`fail_closed`](Self::fail_closed).
    #[doc(hidden)]
    pub fn fails_closed(&self) -> bool {
        self.fail_closed
    }

    /// Whether the family carries out verdicts for connections.
    #[doc(hidden)]
    pub fn can_have_flow_marks(&self) -> bool {
        self.family != TableFamily::Bridge
    }

    /// Where rules send packets that have no target of their own
    /// ([`to_queue`](Rule::to_queue), [`accept`](Rule::accept) and so on), and change nothing.
    /// Default: such a rule is an error. With several queues, packets are distributed over them:
    /// see [`Rule::to_queues`].
    ///
    /// The rules of a queue (`QueueBuilder::divert` of tokio-nfqueue) go to all its numbers.
    pub fn default_queues(mut self, queues: RangeInclusive<u16>) -> Self {
        self.queues = Some((*queues.start(), *queues.end()));
        self
    }

    /// Drops the packets of the rules, instead of letting them pass, when the process has ended
    /// without [closing](Divert::close) the table: until a new process installs a table of the same
    /// [name](Self::table), which must be given. Default: off, so that the rules end with the
    /// process. [`Divert`](Divert#fail-open-or-fail-closed) has the table of what stays when.
    ///
    /// A stop by a signal that the program does not handle, such as SIGTERM, is such an end as
    /// well.
    ///
    /// The kernel keeps the table (`NFT_TABLE_F_PERSIST`, Linux 6.9 and later), and drops what its
    /// rules send to a queue that is not bound; so no rule may have [`bypass`](Rule::bypass).
    /// [`install`](Self::install) replaces, in one step, a table of this name whose owner has
    /// ended: at no time do packets pass, but what is queued in other queues of the network
    /// namespace [is dropped](Divert#removing-a-table-drops-queued-packets). Verdicts for
    /// connections are forgotten then. Any other table of this name is an error, as always.
    ///
    /// A table that has lost its owner can be changed by other programs, and `nft flush ruleset`
    /// removes it. It still queues to the number of its queue: give the queue a number of its own,
    /// not `Queue::ANY`, so that no other program binds that number and gets the packets.
    ///
    /// Before Linux 6.9 the table never has an owner. It works in the same way, but at any time
    /// other programs can change it, and a second process with the same name replaces the table of
    /// the first. When the first then closes, it removes the table of the second: let the first end
    /// before the second begins, or hand over.
    pub fn fail_closed(mut self) -> Self {
        self.fail_closed = true;
        self
    }

    /// How many dropped and how many rejected connections of each IP version the table remembers at
    /// least, and for how long after their last packet. Default: 65 535, and ten minutes: five
    /// times the longest interval in which TCP sends a segment again.
    ///
    /// If the set is full, a connection is denied only as long as connection tracking has an entry
    /// for it: not if its first packet was denied, so that its next packet comes to the queue. A
    /// rejected connection is then dropped. A sender whose every packet is a new connection that
    /// the policy denies fills the set: give such packets a verdict for the packet alone, or raise
    /// `capacity`. Only with [`flow_marks`](Self::flow_marks).
    pub fn denied_flows(mut self, capacity: u32, timeout: Duration) -> Self {
        self.denied = (capacity, timeout);
        self
    }

    /// Lets accepted connections leave the hooks: TCP and UDP that this host forwards between these
    /// interfaces, after `Verdict::for_flow`. Default: off.
    ///
    /// The kernel then forwards their packets when they arrive, past all hooks (an nf_tables
    /// flowtable). `guide::flows` of tokio-nfqueue says
    /// what the price is. In short:
    ///
    /// - Nothing sees the packets any more: no rule and no counter of this table or of another
    ///   program, at `Prerouting`, `Forward` and `Postrouting`. A rule that drops them, changes
    ///   them or sends them to another table's queue misses them.
    /// - The list of interfaces is static.
    ///
    /// What begins a connection is still asked about, and a denial holds.
    ///
    /// It needs [`flow_marks`](Self::flow_marks), the family [`Inet`](TableFamily::Inet), a rule or
    /// a [chain](Self::chain) at [`Forward`](Hook::Forward), and [denials](Self::denied_flows) that
    /// are remembered for at least 60 s. Both interfaces of a connection must be named.
    ///
    /// An interface must carry packets of its own: Ethernet, a bridge, a VLAN, WireGuard or TUN. It
    /// cannot be the port of a bridge or a bond, a tunnel of another kind, PPP, or one that carries
    /// another of these interfaces. Do not name an interface with macvlan or ipvlan children in
    /// other network namespaces that forward packets themselves.
    ///
    /// A rule with a [rate](super::Match::rate_above) at these hooks is refused, unless it is
    /// limited to certain TCP flags or connection states.
    /// [`first_bytes`](super::Match::first_bytes) counts offloaded packets too.
    pub fn offload(mut self, interfaces: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.offload = Some(Interfaces::Named(interfaces.into_iter().map(Into::into).collect()));
        self
    }

    /// As [`offload`](Self::offload), between all interfaces that are up when the table is
    /// installed, except those that `offload` cannot name. Of an interface and one that it carries,
    /// such as a VLAN, it is the latter.
    pub fn offload_all(mut self) -> Self {
        self.offload = Some(Interfaces::All);
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
    /// cores), because the kernel waits until no CPU uses the old rules. With
    /// [`flow_marks`](Self::flow_marks), it also takes as long as
    /// [`forget_flows`](Divert::forget_flows). From an async task, call it in `spawn_blocking`.
    ///
    /// # Errors
    ///
    /// * [`InvalidInput`](ErrorKind::InvalidInput): there is no rule, set or chain; the table name
    ///   is invalid; a set or a rule is invalid; or the rules do not fit into one transaction. The
    ///   error names the set, or the rule by its index, from 0, and the field. Rules that can never
    ///   match are invalid. One transaction can carry some hundreds of rules. There is no limit if
    ///   the thread has `CAP_NET_ADMIN` in the initial user namespace (`SO_SNDBUFFORCE`).
    /// * [`NotPermitted`](ErrorKind::NotPermitted): the thread lacks `CAP_NET_ADMIN` in the user
    ///   namespace that owns the network namespace.
    /// * [`Unsupported`](ErrorKind::Unsupported): the kernel has no nf_tables, with flow marks no
    ///   `NF_CT_NETLINK`, with [`offload`](Self::offload) no flowtables, no tables with owners
    ///   (before Linux 5.12), neither the `queue` expression nor the `NFQUEUE` target, or lacks
    ///   another expression that a rule needs.
    /// * [`TimedOut`](ErrorKind::TimedOut): the kernel did not reply within 5 seconds.
    /// * [`AlreadyExists`](ErrorKind::AlreadyExists): a table of this name exists (`EEXIST`, or
    ///   `EPERM` if another socket owns it).
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

    /// As far as the rules can be checked without the kernel.
    #[doc(hidden)]
    pub fn validate(&self) -> Result<(), Error> {
        let invalid = |detail: String| Error::new(ErrorKind::InvalidInput, "install rules").with_detail(detail);
        check_rules(&self.rules, self.check(&[]).map_err(invalid)?).map_err(invalid).map(drop)
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

    /// The interfaces of the flowtable.
    fn devices(&self, operation: &'static str) -> Result<Vec<String>, Error> {
        let Some(interfaces) = &self.offload else { return Ok(Vec::new()) };
        let names = interfaces.names().map_err(|error| Error::os("list the interfaces", error))?;
        names.map_err(|reason| Error::new(ErrorKind::InvalidInput, operation).with_detail(reason))
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
        let result = connection.transact(&commands, Outcome::Commit);
        result.map_err(|refusal| refused(operation(), &commands, rules, refusal))?;
        let Surroundings { priority, flows, .. } = surroundings;
        Ok((table, Installed { priority, flows, method, places, hooks, chains: layout.chains }))
    }

    /// Prints the table as a script for `nft -f`, which `nft -c -f` checks.
    ///
    /// The script makes an ordinary table, which no process owns. With
    /// [`flow_marks`](Self::flow_marks), the script names denied connections by addresses and ports
    /// of the packet, where the installed rules use those of the connection. With
    /// [`offload_all`](Self::offload_all), it names the interfaces that are up now.
    /// Without a [table name](Self::table), the table is called `tokio_nfqueue`.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](ErrorKind::InvalidInput) for what [`install`](Self::install) refuses
    /// without the kernel, and if `nft` cannot read the table's name: it has letters, digits and
    /// `_`, and begins with a letter.
    pub fn to_nft(&self) -> Result<String, Error> {
        let invalid = |detail: String| Error::new(ErrorKind::InvalidInput, "print rules").with_detail(detail);
        self.check(&[]).map_err(invalid)?;
        let devices = match &self.offload {
            Some(Interfaces::Named(names)) => names.clone(),
            _ => self.devices("print rules")?,
        };
        let surroundings = self.check(&devices).map_err(invalid)?;
        let rules = check_rules(&self.rules, surroundings).map_err(invalid)?;
        let table = self.table.as_deref().unwrap_or("tokio_nfqueue");
        print(table, surroundings, &self.rules, &self.places(&rules))
    }

    /// `devices` are the interfaces of the flowtable.
    fn check<'a>(&'a self, devices: &'a [String]) -> Result<Surroundings<'a>, String> {
        self.table.as_deref().map_or(Ok(()), check_table_name)?;
        if self.rules.is_empty() && self.sets.is_empty() && self.chains.is_empty() {
            return Err("there is no rule; add one with rule()".to_owned());
        }
        for (index, set) in self.sets.iter().enumerate() {
            set.check().map_err(|reason| format!("set {:?}: {reason}", set.name()))?;
            if self.sets[..index].iter().any(|other| other.name() == set.name()) {
                return Err(format!("set {:?}: name: there is another set of this name", set.name()));
            }
        }
        if self.chains.iter().any(|(hook, _)| matches!(hook, Hook::Other(_))) {
            return Err("chain: the hook must be prerouting, input, forward, output or postrouting".to_owned());
        }
        let flows = self.flow_marks.map(|marks| FlowTable { marks, capacity: self.denied.0, timeout: self.denied.1 });
        if self.fail_closed && self.table.is_none() {
            return Err("fail_closed: the table needs a name, by which a new process finds it".to_owned());
        }
        if let Some(flows) = flows {
            flows.check(self.family)?;
            for (hook, priority) in &self.chains {
                let place = Place { hook: *hook, priority: priority.unwrap_or(self.priority).number() };
                flows.check_place(place).map_err(|reason| format!("chain: {reason}"))?;
            }
            if let Some(name) =
                denied::names(self.family).find(|name| self.sets.iter().any(|other| other.name() == *name))
            {
                return Err(format!("set {name:?}: name: flow marks need a set of this name"));
            }
        }
        if let Some(interfaces) = &self.offload {
            interfaces.check()?;
            let Some(flows) = flows else { return Err("offload: it needs flow marks".to_owned()) };
            if self.family != TableFamily::Inet {
                return Err("offload: it needs a table of the family inet".to_owned());
            }
            if flows.timeout < SHORTEST_DENIAL {
                return Err(format!("offload: denied flows must be remembered for at least {SHORTEST_DENIAL:?}"));
            }
            let hooks = self.rules.iter().map(|rule| rule.hook).chain(self.chains.iter().map(|(hook, _)| *hook));
            if !hooks.into_iter().any(|hook| hook == Hook::Forward) {
                return Err("offload: there is no rule or chain at forward".to_owned());
            }
            if self.sets.iter().any(|set| set.name() == denied::RECALLED) {
                return Err(format!("set {:?}: name: offload needs a set of this name", denied::RECALLED));
            }
        }
        let priority = self.priority.number();
        let Self { family, ref sets, queues, fail_closed, .. } = *self;
        Ok(Surroundings { family, sets, priority, flows, offload: devices, queues, fail_closed })
    }

    fn places(&self, rules: &[KernelRule<'_>]) -> Vec<Place> {
        let declared = self
            .chains
            .iter()
            .map(|(hook, priority)| Place { hook: *hook, priority: priority.unwrap_or(self.priority).number() });
        let mut places: Vec<Place> = declared.chain(rules.iter().map(|rule| rule.place)).collect();
        places.sort();
        places.dedup();
        places
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

/// Which hooks beside the base chains the table keeps registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Hooks {
    /// Connection tracking, and with it defragmentation.
    pub(super) tracking: bool,
    /// Only defragmentation.
    pub(super) defragment: bool,
    /// Whether a rule may switch defragmentation on.
    pub(super) allowed: bool,
}

impl Hooks {
    /// With what these rules need in addition.
    pub(super) fn needed(rules: &[KernelRule<'_>], connection: &mut Connection, present: Self) -> Self {
        let tracking = present.tracking || rules.iter().any(KernelRule::tracks);
        let hooks = Self { tracking, ..present };
        if hooks.allowed && rules.iter().any(KernelRule::needs_reassembly) {
            return hooks.with_reassembly(connection);
        }
        hooks
    }

    /// What a table with `present` must add: connection tracking, defragmentation.
    pub(super) fn beyond(self, present: Self) -> (bool, bool) {
        (self.tracking && !present.tracking, self.defragment && !present.defragment)
    }

    fn reassembles(self) -> bool {
        self.tracking || self.defragment
    }

    fn with_reassembly(self, connection: &mut Connection) -> Self {
        if self.reassembles() {
            self
        } else if has_expression(connection, "tproxy") {
            Self { defragment: true, ..self }
        } else {
            Self { tracking: has_expression(connection, "ct"), ..self }
        }
    }
}

/// Whether the kernel has an expression. A rule with an incomplete one is refused, but not with
/// `ENOENT` if the kernel has it.
fn has_expression(connection: &mut Connection, name: &str) -> bool {
    let table = format!("tokio_nfqueue_{}_probe", connection.port());
    let mut batch = Batch::new(&table, Encoding { method: QueueMethod::Expression, trial: true });
    batch.create_table(Creation { ownership: Ownership::Process, replaces: false });
    batch.probe(name);
    let refusal = connection.transact(&batch.commands, Outcome::Abort).err();
    let refused = refusal.filter(|refusal| matches!(subject(refusal, &batch.commands), Some(Subject::Hooks(_))));
    refused.is_some_and(|refusal| refusal.error.raw_os_error() == Some(Errno::INVAL.raw_os_error()))
}

/// Whether the kernel has refused to create a table because there is one.
fn exists(refusal: &Refusal, commands: &[Command]) -> bool {
    subject(refusal, commands) == Some(&Subject::Table) && errno(refusal) == Some(Errno::EXIST)
}

/// Whether the kernel keeps a table without its owner.
fn has_lasting_tables(connection: &mut Connection) -> bool {
    let table = format!("tokio_nfqueue_{}_probe", connection.port());
    let mut batch = Batch::new(&table, Encoding { method: QueueMethod::Expression, trial: true });
    batch.create_table(Creation { ownership: Ownership::Lasting, replaces: false });
    connection.transact(&batch.commands, Outcome::Abort).is_ok()
}

/// The table in the language of nft.
pub(super) fn print(
    table: &str,
    surroundings: Surroundings<'_>,
    rules: &[Rule],
    places: &[Place],
) -> Result<String, Error> {
    let invalid = |detail: String| Error::new(ErrorKind::InvalidInput, "print rules").with_detail(detail);
    if let Some(problem) = name_problem(table) {
        return Err(invalid(format!("nft cannot read the table name: {problem}")));
    }
    let rules = check_rules(rules, surroundings).map_err(invalid)?;
    Ok(script(table, surroundings, &Layout::new(rules, places, surroundings)))
}

/// What is wrong with the name of a table.
pub(super) fn check_table_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > LONGEST_NAME || name.contains('\0') {
        return Err(format!("the table name must have 1 to {LONGEST_NAME} bytes and no NUL"));
    }
    Ok(())
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
