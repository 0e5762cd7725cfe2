//! Encodes tables, chains, sets and rules as nf_tables messages. This module uses no socket.

use std::time::Duration;

use netlink_packet_core::{DefaultNla, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, DataAttribute, Hook as HookAttribute, HookNumber, InetHookNumber, ListAttribute,
    NfTablesMessage, RuleAttribute, RuleMessage, SetAttribute, SetDescription, SetElementAttribute, SetElementFlags,
    SetElementList, SetElementMessage, SetFlags, SetMessage, TableAttribute, TableFlags, TableMessage,
};

use super::{
    action::{FLOWTABLE, NF_DROP},
    chain::{Chain, FLOWTABLE_PRIORITY, INGRESS},
    checked::KernelRule,
    denied::{self, DeniedSet, FlowTable},
    encoder::{ANONYMOUS, AnonymousSet, Encoder, Encoding, PORT, REG_1, nested, number, text},
    family::TableFamily,
    set::NamedSet,
    tuple,
};

/// The kind of the chains to create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChainKind {
    /// Regular chains. No packet reaches them. For a trial.
    Regular,
    /// Base chains.
    Base,
}

/// How a table is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Creation {
    pub(super) ownership: Ownership,
    /// Whether it replaces a table of the same name.
    pub(super) replaces: bool,
}

/// Who may change a table, and what becomes of it when the socket that created it is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ownership {
    /// The socket owns the table, which ends with it.
    Process,
    /// The socket owns the table, which stays without an owner when the socket is closed. Linux 6.9
    /// and later.
    Lasting,
    /// The table has no owner, and stays.
    None,
}

/// What a message of a transaction creates or deletes, for error texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Subject {
    /// The table that a new one replaces.
    Predecessor,
    Table,
    /// The chain that marks a table as that of an installation in several transactions.
    Marker,
    Chain(String),
    Rule(usize),
    Set(String),
    /// The rules that keep connection tracking or defragmentation registered.
    Hooks(&'static str),
    /// What carries out verdicts for connections.
    Flows,
    Flowtable,
    /// The rules that move packets past the flowtable.
    PastFlowtable,
}

/// A message, its flags in addition to `NLM_F_REQUEST`, and its subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Command {
    pub(super) subject: Subject,
    pub(super) flags: u16,
    pub(super) message: NfTablesMessage,
    /// Whether it is about a base chain or a rule in one: packets come to it at once.
    pub(super) hooked: bool,
}

impl Command {
    /// Whether it is about the table itself, the one that it replaces, or what keeps connection
    /// tracking and defragmentation registered.
    pub(super) fn comes_first(&self) -> bool {
        match &self.subject {
            Subject::Predecessor | Subject::Table | Subject::Hooks(_) => true,
            Subject::Chain(name) => name == HOLDER,
            _ => false,
        }
    }

    pub(super) fn is_chain(&self) -> bool {
        matches!(self.message, NfTablesMessage::NewChain(_))
    }

    /// Whether the next command must be in the same transaction: it fills the set, or is the rule
    /// that the set belongs to.
    pub(super) fn needs_the_next(&self) -> bool {
        let of_set = matches!(self.message, NfTablesMessage::NewSet(_) | NfTablesMessage::NewSetElement(_));
        of_set && !matches!(self.subject, Subject::Set(_))
    }
}

/// The messages of a transaction on one table.
pub(super) struct Batch<'a> {
    table: &'a str,
    encoding: Encoding,
    next_set: u32,
    /// The names of the base chains that this batch creates.
    bases: Vec<String>,
    pub(super) commands: Vec<Command>,
}

/// An element of a named set as the kernel wants it, and its time-out.
pub(super) type Element = (Vec<u8>, Option<Duration>);

impl<'a> Batch<'a> {
    pub(super) fn new(table: &'a str, encoding: Encoding) -> Self {
        Self { table, encoding, next_set: 1, bases: Vec::new(), commands: Vec::new() }
    }

    fn push(&mut self, subject: Subject, flags: u16, message: NfTablesMessage) {
        self.commands.push(Command { subject, flags, message, hooked: false });
    }

    /// Creates the table.
    pub(super) fn create_table(&mut self, creation: Creation) {
        if creation.replaces {
            // A table that has outlived its owner may be adopted; any other table with an owner or
            // without one is refused (nf_tables_updtable).
            self.push_table(Subject::Predecessor, creation.ownership, 0);
            self.delete_table();
        }
        self.push_table(Subject::Table, creation.ownership, NLM_F_CREATE | NLM_F_EXCL);
    }

    fn push_table(&mut self, subject: Subject, ownership: Ownership, flags: u16) {
        let owner = match ownership {
            Ownership::Process => TableFlags::Owner,
            Ownership::Lasting => TableFlags::Owner | TableFlags::Persisent,
            Ownership::None => TableFlags::empty(),
        };
        let attributes = vec![TableAttribute::Name(self.table.to_owned()), TableAttribute::Flags(owner)];
        self.push(subject, flags, NfTablesMessage::NewTable(TableMessage { attributes }));
    }

    /// Removes the table with all that it contains.
    pub(super) fn delete_table(&mut self) {
        let attributes = vec![TableAttribute::Name(self.table.to_owned())];
        self.push(Subject::Table, 0, NfTablesMessage::DeleteTable(TableMessage { attributes }));
    }

    /// `devices` are the interfaces of a chain at the hook `ingress`.
    pub(super) fn create_chain(&mut self, chain: &Chain, kind: ChainKind, devices: &[String]) {
        let Chain { name, base, .. } = chain;
        let mut attributes = vec![ChainAttribute::Table(self.table.to_owned()), ChainAttribute::Name(name.clone())];
        if let (Some((place, chain_type)), ChainKind::Base) = (base, kind) {
            let number = InetHookNumber::from(u32::from(place.hook.number()));
            let mut hook = vec![
                HookAttribute::Number(HookNumber::Inet(number)),
                // The kernel reads the priority as a signed number (`nft_chain_parse_hook`).
                HookAttribute::Priority(place.priority as u32),
            ];
            if place.hook == INGRESS {
                hook.push(HookAttribute::NetDevices(device_names(devices)));
            }
            attributes.push(ChainAttribute::Hook(hook));
            attributes.push(ChainAttribute::Type(chain_type.name().to_owned()));
        }
        let message = NfTablesMessage::NewChain(ChainMessage { attributes });
        self.push(Subject::Chain(name.clone()), NLM_F_CREATE | NLM_F_EXCL, message);
        if base.is_some() && kind == ChainKind::Base {
            self.bases.push(name.clone());
            self.commands.last_mut().expect("it has been pushed").hooked = true;
        }
    }

    /// Creates the flowtable. For a trial, it gets no interfaces, and so no hooks.
    pub(super) fn create_flowtable(&mut self, devices: &[String]) {
        let mut hook = vec![
            number(NFTA_FLOWTABLE_HOOK_NUM, NF_NETDEV_INGRESS),
            number(NFTA_FLOWTABLE_HOOK_PRIORITY, FLOWTABLE_PRIORITY as u32),
        ];
        if !self.encoding.trial {
            hook.push(nested(NFTA_FLOWTABLE_HOOK_DEVS, &device_names(devices)));
        }
        let attributes = vec![
            text(NFTA_FLOWTABLE_TABLE, self.table),
            text(NFTA_FLOWTABLE_NAME, FLOWTABLE),
            nested(NFTA_FLOWTABLE_HOOK, &hook),
            // So that `Match::first_bytes` and the like count offloaded packets too.
            number(NFTA_FLOWTABLE_FLAGS, NFT_FLOWTABLE_COUNTER),
        ];
        self.push(Subject::Flowtable, NLM_F_CREATE | NLM_F_EXCL, NfTablesMessage::NewFlowTable(attributes));
    }

    /// Creates a chain that no packet reaches. Its rules keep connection tracking, and with it
    /// defragmentation, or defragmentation alone registered while the table exists.
    pub(super) fn create_holder(&mut self, family: TableFamily, tracking: bool, defragment: bool) {
        if !tracking && !defragment {
            return;
        }
        let attributes = vec![ChainAttribute::Table(self.table.to_owned()), ChainAttribute::Name(HOLDER.to_owned())];
        let message = NfTablesMessage::NewChain(ChainMessage { attributes });
        self.push(Subject::Chain(HOLDER.to_owned()), NLM_F_CREATE, message);
        if tracking {
            let mut encoder = Encoder::new(self.encoding, 0);
            encoder.connection(CT_STATE);
            self.create_rule(Subject::Hooks("connection tracking"), HOLDER, encoder);
        }
        if defragment && !self.encoding.trial {
            let mut encoder = Encoder::new(self.encoding, 0);
            // A table for both versions leaves the version open (`nft_tproxy_init`).
            let version = match family {
                TableFamily::Ip => NFPROTO_IPV4,
                TableFamily::Ip6 => NFPROTO_IPV6,
                TableFamily::Inet | TableFamily::Bridge => NFPROTO_UNSPEC,
            };
            encoder.value(PORT.bytes(1));
            encoder.expression("tproxy", &[number(NFTA_TPROXY_FAMILY, version), number(NFTA_TPROXY_REG_PORT, REG_1)]);
            self.create_rule(Subject::Hooks("defragmentation"), HOLDER, encoder);
        }
    }

    /// A rule that the kernel refuses: with `ENOENT` if it lacks the expression, else with another
    /// error.
    pub(super) fn probe(&mut self, expression: &str) {
        let attributes = vec![ChainAttribute::Table(self.table.to_owned()), ChainAttribute::Name(HOLDER.to_owned())];
        let message = NfTablesMessage::NewChain(ChainMessage { attributes });
        self.push(Subject::Chain(HOLDER.to_owned()), NLM_F_CREATE, message);
        let mut encoder = Encoder::new(self.encoding, 0);
        encoder.expression::<DefaultNla>(expression, &[]);
        self.create_rule(Subject::Hooks("probe"), HOLDER, encoder);
    }

    /// Adds a rule to the end of its chain.
    pub(super) fn add_rule(&mut self, rule: &KernelRule<'_>) {
        let (expressions, sets) = rule.expressions(self.encoding, self.next_set);
        self.next_set += sets.len() as u32;
        let of_flows = || if rule.moves_past() { Subject::PastFlowtable } else { Subject::Flows };
        let subject = || rule.index.map_or_else(of_flows, Subject::Rule);
        let first = self.commands.len();
        for set in &sets {
            self.create_anonymous_set(subject(), set);
        }
        self.push_rule(subject(), &rule.chain, &expressions, rule.comment);
        if self.bases.contains(&rule.chain) {
            self.commands[first..].iter_mut().for_each(|command| command.hooked = true);
        }
    }

    fn create_rule(&mut self, subject: Subject, chain: &str, encoder: Encoder) {
        let (expressions, _) = encoder.finish();
        self.push_rule(subject, chain, &expressions, None);
    }

    /// Creates a chain whose name tells that the table is that of an installation in several
    /// transactions.
    pub(super) fn create_marker(&mut self, name: &str) {
        let attributes = self.chain(name);
        self.push(Subject::Marker, NLM_F_CREATE | NLM_F_EXCL, NfTablesMessage::NewChain(ChainMessage { attributes }));
    }

    /// Lets the kernel refuse the transaction if there is no such chain (`nf_tables_delrule`).
    pub(super) fn require_marker(&mut self, name: &str) {
        let attributes = vec![RuleAttribute::Table(self.table.to_owned()), RuleAttribute::Chain(name.to_owned())];
        self.push(Subject::Marker, 0, NfTablesMessage::DeleteRule(RuleMessage { attributes }));
    }

    pub(super) fn delete_marker(&mut self, name: &str) {
        let attributes = self.chain(name);
        self.push(Subject::Marker, 0, NfTablesMessage::DeleteChain(ChainMessage { attributes }));
    }

    fn chain(&self, name: &str) -> Vec<ChainAttribute> {
        vec![ChainAttribute::Table(self.table.to_owned()), ChainAttribute::Name(name.to_owned())]
    }

    /// Adds a rule that drops all packets.
    pub(super) fn add_drop(&mut self, chain: &str) {
        let mut encoder = Encoder::new(self.encoding, 0);
        encoder.verdict(NF_DROP);
        self.create_rule(Subject::Chain(chain.to_owned()), chain, encoder);
    }

    fn push_rule(&mut self, subject: Subject, chain: &str, expressions: &[DefaultNla], text: Option<&str>) {
        let mut attributes = vec![
            RuleAttribute::Table(self.table.to_owned()),
            RuleAttribute::Chain(chain.to_owned()),
            RuleAttribute::Other(nested(NFTA_RULE_EXPRESSIONS, expressions)),
        ];
        attributes.extend(text.map(|text| RuleAttribute::UserData(comment(text))));
        let message = NfTablesMessage::NewRule(RuleMessage { attributes });
        self.push(subject, NLM_F_CREATE | NLM_F_APPEND, message);
    }

    /// Removes all rules of a chain (`nf_tables_delrule` without a handle).
    pub(super) fn delete_rules(&mut self, chain: &str) {
        let attributes = vec![RuleAttribute::Table(self.table.to_owned()), RuleAttribute::Chain(chain.to_owned())];
        let message = NfTablesMessage::DeleteRule(RuleMessage { attributes });
        self.push(Subject::Chain(chain.to_owned()), 0, message);
    }

    pub(super) fn create_set(&mut self, set: &NamedSet) {
        let mut attributes = vec![
            SetAttribute::Table(self.table.to_owned()),
            SetAttribute::Name(set.name().to_owned()),
            SetAttribute::Flags(SetFlags::Timeout),
            SetAttribute::KeyType(set.key_type()),
            SetAttribute::KeyLen(set.key_length() as u32),
            SetAttribute::Id(self.next_set),
            SetAttribute::Description(vec![SetDescription::Size(set.size())]),
        ];
        attributes.extend(set.default_timeout().map(|timeout| SetAttribute::Timeout(milliseconds(timeout))));
        self.next_set += 1;
        let message = NfTablesMessage::NewSet(SetMessage { attributes });
        self.push(Subject::Set(set.name().to_owned()), NLM_F_CREATE | NLM_F_EXCL, message);
    }

    /// Creates the sets to which rules add denied connections.
    pub(super) fn create_denied_sets(&mut self, family: TableFamily, flows: FlowTable) {
        for set in DeniedSet::every(family) {
            self.create_denied_set(set.name(), tuple::key(set.version), None, flows.capacity, flows);
        }
        for version in denied::versions(family) {
            let data = tuple::translated(version);
            let name = denied::translated(version);
            self.create_denied_set(name, tuple::key(version), Some(data), flows.capacity, flows);
            self.create_denied_set(denied::begun(version), tuple::key(version), None, denied::BEGUN, flows);
            let beside = FlowTable { timeout: flows.beside_timeout(), ..flows };
            self.create_denied_set(denied::beside(version), tuple::key(version), None, denied::BESIDE, beside);
            let briefly = FlowTable { timeout: denied::RECENT, ..flows };
            for (name, capacity) in
                [(denied::recent(version), flows.capacity), (denied::replied(version), denied::REPLIED)]
            {
                self.create_denied_set(name, tuple::key(version), None, capacity, briefly);
            }
        }
        let capacity = denied::ports_capacity(flows.capacity);
        self.create_denied_set(denied::PORTS, tuple::ports_key(), None, capacity, flows);
    }

    /// Creates the set of the connections whose packets must not take the flowtable.
    pub(super) fn create_recalled_set(&mut self, flows: FlowTable) {
        let flows = FlowTable { timeout: denied::RECALL, ..flows };
        self.create_denied_set(denied::RECALLED, tuple::ports_key(), None, denied::RECALLED_CAPACITY, flows);
    }

    /// Length and type of the keys, and of the data if it is a map.
    fn create_denied_set(
        &mut self,
        name: &str,
        (length, key_type): (usize, u32),
        data: Option<(usize, u32)>,
        size: u32,
        flows: FlowTable,
    ) {
        let mut flags = SetFlags::Timeout | SetFlags::Eval;
        flags.set(SetFlags::Map, data.is_some());
        let mut attributes = vec![
            SetAttribute::Table(self.table.to_owned()),
            SetAttribute::Name(name.to_owned()),
            SetAttribute::Flags(flags),
            SetAttribute::KeyType(key_type),
            SetAttribute::KeyLen(length as u32),
            SetAttribute::Id(self.next_set),
            SetAttribute::Description(vec![SetDescription::Size(size)]),
            SetAttribute::Timeout(milliseconds(flows.timeout)),
        ];
        if let Some((length, data_type)) = data {
            attributes.extend([SetAttribute::DataType(data_type), SetAttribute::DataLen(length as u32)]);
        }
        self.next_set += 1;
        let message = NfTablesMessage::NewSet(SetMessage { attributes });
        self.push(Subject::Set(name.to_owned()), NLM_F_CREATE | NLM_F_EXCL, message);
    }

    fn create_anonymous_set(&mut self, subject: Subject, set: &AnonymousSet) {
        let interval = set.ranges.iter().any(|(first, last)| first != last);
        let mut flags = SetFlags::Anonymous | SetFlags::Constant;
        flags.set(SetFlags::Interval, interval);
        let attributes = vec![
            SetAttribute::Table(self.table.to_owned()),
            SetAttribute::Name(ANONYMOUS.to_owned()),
            SetAttribute::Flags(flags),
            SetAttribute::KeyType(set.value_type.number),
            SetAttribute::KeyLen(set.value_type.length as u32),
            SetAttribute::Id(set.id),
        ];
        self.push(subject.clone(), NLM_F_CREATE, NfTablesMessage::NewSet(SetMessage { attributes }));

        let element = |value, end: bool| {
            let mut attributes = vec![SetElementAttribute::Key(DataAttribute::Value(set.value_type.bytes(value)))];
            if end {
                attributes.push(SetElementAttribute::Flags(SetElementFlags::IntervalEnd));
            }
            ListAttribute::Element(attributes)
        };
        let mut elements = Vec::new();
        // As `nft` does, the values before the first range are marked as outside.
        if interval && set.ranges.first().is_some_and(|(first, _)| *first != 0) {
            elements.push(element(0, true));
        }
        for (first, last) in &set.ranges {
            elements.push(element(*first, false));
            if interval && *last < set.value_type.highest() {
                elements.push(element(last + 1, true));
            }
        }
        for part in elements.chunks(ELEMENTS_PER_MESSAGE) {
            let attributes = vec![
                SetElementList::Table(self.table.to_owned()),
                SetElementList::Set(ANONYMOUS.to_owned()),
                SetElementList::SetId(set.id),
                SetElementList::Elements(part.to_vec()),
            ];
            let message = NfTablesMessage::NewSetElement(SetElementMessage { attributes });
            self.push(subject.clone(), NLM_F_CREATE, message);
        }
    }

    /// Adds elements to a named set. With `exclusive`, the kernel refuses an element that exists.
    pub(super) fn insert_elements(&mut self, set: &str, elements: &[Element], exclusive: bool) {
        let flags = NLM_F_CREATE | if exclusive { NLM_F_EXCL } else { 0 };
        for part in elements.chunks(ELEMENTS_PER_MESSAGE) {
            let message = NfTablesMessage::NewSetElement(self.element_list(set, part));
            self.push(Subject::Set(set.to_owned()), flags, message);
        }
    }

    pub(super) fn delete_elements(&mut self, set: &str, elements: &[Element]) {
        for part in elements.chunks(ELEMENTS_PER_MESSAGE) {
            let keys: Vec<Element> = part.iter().map(|(key, _)| (key.clone(), None)).collect();
            let message = NfTablesMessage::DeleteSetElement(self.element_list(set, &keys));
            self.push(Subject::Set(set.to_owned()), 0, message);
        }
    }

    /// Removes all elements of a named set (`nf_tables_delsetelem` without elements).
    pub(super) fn clear_set(&mut self, set: &str) {
        let attributes = vec![SetElementList::Table(self.table.to_owned()), SetElementList::Set(set.to_owned())];
        let message = NfTablesMessage::DeleteSetElement(SetElementMessage { attributes });
        self.push(Subject::Set(set.to_owned()), 0, message);
    }

    fn element_list(&self, set: &str, elements: &[Element]) -> SetElementMessage {
        let element = |(key, timeout): &Element| {
            let mut attributes = vec![SetElementAttribute::Key(DataAttribute::Value(key.clone()))];
            attributes.extend(timeout.map(|timeout| SetElementAttribute::Timeout(milliseconds(timeout))));
            ListAttribute::Element(attributes)
        };
        SetElementMessage {
            attributes: vec![
                SetElementList::Table(self.table.to_owned()),
                SetElementList::Set(set.to_owned()),
                SetElementList::Elements(elements.iter().map(element).collect()),
            ],
        }
    }
}

/// The names of interfaces, as an attribute contains them.
fn device_names(devices: &[String]) -> Vec<DefaultNla> {
    let name = |name: &String| text(NFTA_DEVICE_NAME, name);
    devices.iter().map(name).collect()
}

/// A request for all rules of a table.
pub(super) fn get_rules(table: &str) -> NfTablesMessage {
    NfTablesMessage::GetRule(RuleMessage { attributes: vec![RuleAttribute::Table(table.to_owned())] })
}

/// A request for one element of a set.
pub(super) fn get_element(table: &str, set: &str, key: &[u8]) -> NfTablesMessage {
    let element = ListAttribute::Element(vec![SetElementAttribute::Key(DataAttribute::Value(key.to_vec()))]);
    let attributes = vec![
        SetElementList::Table(table.to_owned()),
        SetElementList::Set(set.to_owned()),
        SetElementList::Elements(vec![element]),
    ];
    NfTablesMessage::GetSetElement(SetElementMessage { attributes })
}

/// A request for all elements of a set.
pub(super) fn get_elements(table: &str, set: &str) -> NfTablesMessage {
    let attributes = vec![SetElementList::Table(table.to_owned()), SetElementList::Set(set.to_owned())];
    NfTablesMessage::GetSetElement(SetElementMessage { attributes })
}

/// User data of a rule: a record with type, length and text, as `nft` writes it.
fn comment(text: &str) -> Vec<u8> {
    let mut bytes = vec![UDATA_RULE_COMMENT, text.len() as u8 + 1];
    bytes.extend_from_slice(text.as_bytes());
    bytes.push(0);
    bytes
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The chain of [`Batch::create_holder`].
const HOLDER: &str = "holder";
/// An element with the longest key, four IPv6 addresses, takes less than 120 bytes, and the list
/// must be shorter than 65 536 bytes.
const ELEMENTS_PER_MESSAGE: usize = 500;
/// The type of a comment in the user data of a rule.
const UDATA_RULE_COMMENT: u8 = 0;
// uapi/linux/netfilter/nf_tables.h
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_FLOWTABLE_TABLE: u16 = 1;
const NFTA_FLOWTABLE_NAME: u16 = 2;
const NFTA_FLOWTABLE_HOOK: u16 = 3;
const NFTA_FLOWTABLE_FLAGS: u16 = 7;
const NFTA_FLOWTABLE_HOOK_NUM: u16 = 1;
const NFTA_FLOWTABLE_HOOK_PRIORITY: u16 = 2;
const NFTA_FLOWTABLE_HOOK_DEVS: u16 = 3;
const NFTA_DEVICE_NAME: u16 = 1;
const NFT_FLOWTABLE_COUNTER: u32 = 2;
const CT_STATE: u32 = 0;
const NFTA_TPROXY_FAMILY: u16 = 1;
const NFTA_TPROXY_REG_PORT: u16 = 3;
// uapi/linux/netfilter.h
const NF_NETDEV_INGRESS: u32 = 0;
const NFPROTO_UNSPEC: u32 = 0;
const NFPROTO_IPV4: u32 = 2;
const NFPROTO_IPV6: u32 = 10;

#[cfg(test)]
mod tests;
