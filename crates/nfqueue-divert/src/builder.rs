//! The rules and settings of a table.

mod install;

use std::{ops::RangeInclusive, time::Duration};

use nfqueue_proto::types::{Error, ErrorKind, FlowMarks, Hook};

use super::{
    chain::{LONGEST_NAME, Place},
    check_rules,
    checked::{KernelRule, Surroundings},
    denied::{self, FlowTable},
    family::TableFamily,
    layout::Layout,
    offload::{Interfaces, SHORTEST_DENIAL},
    priority::Priority,
    rule::Rule,
    script::script,
    set::{NamedSet, name_problem},
};

pub use self::install::Installation;

/// The rules and settings of a [`Divert`](crate::Divert), from
/// [`Divert::builder`](crate::Divert::builder).
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
    /// [`replace_rules`](crate::Divert::replace_rules) need not register a hook for later rules.
    /// `None` is the priority of rules without one of their own.
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

    /// Whether the kernel reassembles fragments before the rules see them. Default: if, at a hook
    /// where fragments can arrive, a rule compares fields of the transport header (ports, TCP
    /// flags, ICMP types), or matches IPv6 packets of all protocols except some.
    ///
    /// Only a first fragment has a transport header, so that the rules would not match the others.
    /// A fragment of IPv6 may not even show the protocol, if extension headers come before it: then
    /// no condition on the protocol matches, negated or not. So a table for one protocol without
    /// ports may need `defragment(true)`.
    ///
    /// Reassembly costs little for packets that are not fragments. The kernel does it without
    /// connection tracking if it has the `tproxy` expression (`NFT_TPROXY`), and otherwise with it.
    /// If it has neither, it does not reassemble, which is an error only for
    /// `defragment(true)`. It does not concern the family [`Bridge`](TableFamily::Bridge).
    ///
    /// An IPv6 packet that is still a fragment behind reassembly had a fragment header in front of
    /// its own. The kernel would send its parts on one by one, so the table drops them, before all
    /// rules, except on the loopback interface (at priorities of −400 and below, rules at
    /// `Prerouting` and `Output` see fragments). They include fragments that another program
    /// excludes from reassembly; with [`flow_marks`](Self::flow_marks), those pass.
    ///
    /// Rules at `Output` alone do not switch it on: the kernel fragments behind that hook. What a
    /// process with `CAP_NET_RAW` fragments itself gets past rules with ports there, unless you
    /// call `defragment(true)`; in IPv4 also then, with `IP_NODEFRAG`.
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
    /// without [closing](crate::Divert::close) the table: until a new process installs a table of
    /// the same [name](Self::table), which must be given. Default: off, so that the rules end with
    /// the process. [`Divert`](crate::Divert#fail-open-or-fail-closed) has the table of what stays
    /// when.
    ///
    /// A stop by a signal that the program does not handle, such as SIGTERM, is such an end as
    /// well.
    ///
    /// The kernel keeps the table (`NFT_TABLE_F_PERSIST`, Linux 6.9 and later), and drops what its
    /// rules send to a queue that is not bound; so no rule may have [`bypass`](Rule::bypass).
    /// [`install`](Self::install) replaces, in one step, a table of this name whose owner has
    /// ended: at no time do packets pass, but what is queued in other queues of the network
    /// namespace [is dropped](crate::Divert#removing-a-table-drops-queued-packets). Verdicts for
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
    ///
    /// The kernel takes the memory for `capacity` when the table is installed: 27 MB for the
    /// default (measured on Linux 6.18), and less or more in proportion, in powers of two.
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

    /// As far as the rules can be checked without the kernel.
    #[doc(hidden)]
    pub fn validate(&self) -> Result<(), Error> {
        let invalid = |detail: String| Error::new(ErrorKind::InvalidInput, "install rules").with_detail(detail);
        check_rules(&self.rules, self.check(&[]).map_err(invalid)?).map_err(invalid).map(drop)
    }

    /// The interfaces of the flowtable.
    fn devices(&self, operation: &'static str) -> Result<Vec<String>, Error> {
        let Some(interfaces) = &self.offload else { return Ok(Vec::new()) };
        let names = interfaces.names().map_err(|error| Error::os("list the interfaces", error))?;
        names.map_err(|reason| Error::new(ErrorKind::InvalidInput, operation).with_detail(reason))
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
