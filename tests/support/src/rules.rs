//! nf_tables rules that `Divert` does not support.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
};

use netlink_packet_core::{
    DefaultNla, Emitable, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner,
    nftables::{
        ChainAttribute, ChainMessage, Cmp, DataAttribute, Hook as HookAttribute, HookNumber, Immediate,
        NfTablesMessage, Operator, Payload, Register, RuleAttribute, RuleMessage, TableAttribute, TableMessage,
    },
    none::ControlMessage,
};

use super::{connections::acknowledged, namespace::Namespace};

pub use netlink_packet_netfilter::{NetfilterProtoFamily, nftables::Expressions};

/// The place of a base chain.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The number of the hook in the family.
    pub hook: u32,
    /// Lower ones come first.
    pub priority: i32,
}

/// Adds a rule to a chain of this name in a table of this name, which are created if necessary.
/// Without a place, no packet traverses the chain. All of it is removed with the network namespace.
pub fn install(
    family: NetfilterProtoFamily,
    name: &str,
    place: Option<Place>,
    expressions: Vec<Expressions>,
) -> io::Result<()> {
    let name = || name.to_owned();
    let mut chain = vec![ChainAttribute::Table(name()), ChainAttribute::Name(name())];
    if let Some(place) = place {
        chain.push(hook_attribute(place));
        chain.push(ChainAttribute::Type("filter".to_owned()));
    }
    let expressions = expressions.into_iter().map(Into::into).collect();
    let rule =
        vec![RuleAttribute::Table(name()), RuleAttribute::Chain(name()), RuleAttribute::Expressions(expressions)];
    let table = vec![TableAttribute::Name(name())];
    transact(
        family,
        vec![
            (NfTablesMessage::NewTable(TableMessage { attributes: table }), NLM_F_CREATE),
            (NfTablesMessage::NewChain(ChainMessage { attributes: chain }), NLM_F_CREATE | NLM_F_EXCL),
            (NfTablesMessage::NewRule(RuleMessage { attributes: rule }), NLM_F_CREATE | NLM_F_APPEND | NLM_F_ACK),
        ],
    )
}

/// Keeps the hooks of IPv4, IPv6 and bridges in use, in the namespace that it returns: there are
/// chains that change nothing. A kernel without such chains is left as it is.
///
/// The first user of a hook in any namespace, and the last one, change the kernel's code. On an
/// emulated processor that takes long, because what it has translated is lost.
pub fn hold_hooks() -> Namespace {
    let namespace = Namespace::new();
    namespace.run(|| {
        for family in [NetfilterProtoFamily::Inet, NetfilterProtoFamily::Bridge] {
            for hook in 0..5 {
                let _ = install(family, &format!("holds_{hook}"), Some(Place { hook, priority: 0 }), Vec::new());
            }
        }
    });
    namespace
}

/// Sends IPv4 packets of this host, to any address and the port `from`, to 127.0.0.1 and the port
/// `to` instead (destination NAT).
pub fn install_nat(name: &str, from: u16, to: u16) -> io::Result<()> {
    // NF_INET_LOCAL_OUT, NF_IP_PRI_NAT_DST
    install_nat_at(name, Place { hook: 3, priority: -100 }, from, (Ipv4Addr::LOCALHOST, to))
}

/// Sends the IPv4 packets of a hook, to any address and the port `from`, to another address and
/// port instead (destination NAT).
pub fn install_nat_at(name: &str, place: Place, from: u16, to: (Ipv4Addr, u16)) -> io::Result<()> {
    // NFTA_NAT_REG_PROTO_MIN
    let port = (5, to.1.to_be_bytes().to_vec());
    // NFT_NAT_DNAT
    translate(name, place, from, 1, to.0, Some(port))
}

/// Gives IPv4 datagrams to the port `port` this source address (source NAT).
pub fn install_source_nat(name: &str, port: u16, source: Ipv4Addr) -> io::Result<()> {
    // NF_INET_POST_ROUTING, NF_IP_PRI_NAT_SRC, NFT_NAT_SNAT
    translate(name, Place { hook: 4, priority: 100 }, port, 0, source, None)
}

fn translate(
    name: &str,
    place: Place,
    destination: u16,
    kind: u32,
    address: Ipv4Addr,
    port: Option<(u16, Vec<u8>)>,
) -> io::Result<()> {
    let number = |kind, value: u32| DefaultNla::new(kind, value.to_be_bytes().to_vec());
    let load = |register, value: Vec<u8>| {
        Expressions::Immediate(vec![
            Immediate::DestinationRegister(Register::Other(register)),
            Immediate::Data(DataAttribute::Value(value)),
        ])
    };
    let mut expressions = vec![
        // The destination port, of the transport header.
        Expressions::Payload(vec![
            Payload::DestinationRegister(Register::Other(1)),
            Payload::Base(2),
            Payload::Offset(2),
            Payload::Len(2),
        ]),
        Expressions::Cmp(vec![
            Cmp::SourceRegister(Register::Reg1),
            Cmp::Op(Operator::Equal),
            Cmp::Data(DataAttribute::Value(destination.to_be_bytes().to_vec())),
        ]),
        load(1, address.octets().to_vec()),
    ];
    // NFTA_NAT_TYPE, NFTA_NAT_FAMILY: NFPROTO_IPV4, NFTA_NAT_REG_ADDR_MIN
    let mut attributes = vec![number(1, kind), number(2, 2), number(3, 1)];
    if let Some((attribute, port)) = port {
        expressions.push(load(2, port));
        attributes.push(number(attribute, 2));
    }
    expressions.push(Expressions::Other { expression_type: "nat".to_owned(), attributes });
    install_nat_chain(NetfilterProtoFamily::IPv4, name, place, expressions)
}

/// Sends packets to the host `from` and these ports to the host `to` instead, with the same port
/// (destination NAT); `masquerade`: under an address of this host.
pub fn install_redirection(
    name: &str,
    from: IpAddr,
    ports: RangeInclusive<u16>,
    to: IpAddr,
    masquerade: bool,
) -> io::Result<()> {
    let octets = |address| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let (family, number, destination) = match to {
        IpAddr::V4(_) => (NetfilterProtoFamily::IPv4, 2, 16),
        IpAddr::V6(_) => (NetfilterProtoFamily::IPv6, 10, 24),
    };
    let load = |base, offset, length| {
        Expressions::Payload(vec![
            Payload::DestinationRegister(Register::Other(1)),
            Payload::Base(base),
            Payload::Offset(offset),
            Payload::Len(length),
        ])
    };
    let compare = |operator, value: Vec<u8>| {
        Expressions::Cmp(vec![
            Cmp::SourceRegister(Register::Reg1),
            Cmp::Op(operator),
            Cmp::Data(DataAttribute::Value(value)),
        ])
    };
    let matches = |address| {
        vec![
            load(1, destination, octets(address).len() as u32),
            compare(Operator::Equal, octets(address)),
            load(2, 2, 2),
            compare(Operator::GreatherThanEqual, ports.start().to_be_bytes().to_vec()),
            compare(Operator::LessThanEqual, ports.end().to_be_bytes().to_vec()),
        ]
    };
    let other = |expression_type: &str, attributes: &[(u16, u32)]| Expressions::Other {
        expression_type: expression_type.to_owned(),
        attributes: attributes
            .iter()
            .map(|(kind, value)| DefaultNla::new(*kind, value.to_be_bytes().to_vec()))
            .collect(),
    };
    let mut expressions = matches(from);
    expressions.push(Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Other(1)),
        Immediate::Data(DataAttribute::Value(octets(to))),
    ]));
    // NFTA_NAT_TYPE: NFT_NAT_DNAT, NFTA_NAT_FAMILY, NFTA_NAT_REG_ADDR_MIN
    expressions.push(other("nat", &[(1, 1), (2, number), (3, 1)]));
    // NF_INET_PRE_ROUTING, NF_IP_PRI_NAT_DST
    install_nat_chain(family, name, Place { hook: 0, priority: -100 }, expressions)?;
    if masquerade {
        let mut expressions = matches(to);
        expressions.push(other("masq", &[]));
        // NF_INET_POST_ROUTING, NF_IP_PRI_NAT_SRC
        install_nat_chain(family, &format!("{name}_back"), Place { hook: 4, priority: 100 }, expressions)?;
    }
    Ok(())
}

/// Adds a rule to a base chain of type `nat`, as [`install`] does.
fn install_nat_chain(
    family: NetfilterProtoFamily,
    name: &str,
    place: Place,
    expressions: Vec<Expressions>,
) -> io::Result<()> {
    let chain = vec![
        ChainAttribute::Table(name.to_owned()),
        ChainAttribute::Name(name.to_owned()),
        hook_attribute(place),
        ChainAttribute::Type("nat".to_owned()),
    ];
    let expressions = expressions.into_iter().map(Into::into).collect();
    let rule = vec![
        RuleAttribute::Table(name.to_owned()),
        RuleAttribute::Chain(name.to_owned()),
        RuleAttribute::Expressions(expressions),
    ];
    let table = vec![TableAttribute::Name(name.to_owned())];
    transact(
        family,
        vec![
            (NfTablesMessage::NewTable(TableMessage { attributes: table }), NLM_F_CREATE),
            (NfTablesMessage::NewChain(ChainMessage { attributes: chain }), NLM_F_CREATE | NLM_F_EXCL),
            (NfTablesMessage::NewRule(RuleMessage { attributes: rule }), NLM_F_CREATE | NLM_F_APPEND | NLM_F_ACK),
        ],
    )
}

/// Adds a base chain that accepts everything, as [`install`] does. This registers a hook.
pub fn install_hook(family: NetfilterProtoFamily, name: &str, place: Place) -> io::Result<()> {
    let chain = vec![
        ChainAttribute::Table(name.to_owned()),
        ChainAttribute::Name(name.to_owned()),
        hook_attribute(place),
        ChainAttribute::Type("filter".to_owned()),
    ];
    let table = vec![TableAttribute::Name(name.to_owned())];
    transact(
        family,
        vec![
            (NfTablesMessage::NewTable(TableMessage { attributes: table }), NLM_F_CREATE),
            (NfTablesMessage::NewChain(ChainMessage { attributes: chain }), NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK),
        ],
    )
}

/// Removes a table with its content. If it has a base chain, this unregisters a hook, and the
/// kernel drops every packet that is queued in the network namespace.
pub fn remove(family: NetfilterProtoFamily, name: &str) -> io::Result<()> {
    let table = vec![TableAttribute::Name(name.to_owned())];
    transact(family, vec![(NfTablesMessage::DeleteTable(TableMessage { attributes: table }), NLM_F_ACK)])
}

fn hook_attribute(Place { hook, priority }: Place) -> ChainAttribute {
    let number = HookAttribute::Number(HookNumber::Other(hook));
    // The kernel reads the priority as signed (nft_chain_parse_hook).
    ChainAttribute::Hook(vec![number, HookAttribute::Priority(priority.cast_unsigned())])
}

/// Creates an object in this table, which is created if necessary. `attributes` contain the table
/// as well.
pub fn install_object(family: NetfilterProtoFamily, table: &str, attributes: Vec<DefaultNla>) -> io::Result<()> {
    let table = vec![TableAttribute::Name(table.to_owned())];
    transact(
        family,
        vec![
            (NfTablesMessage::NewTable(TableMessage { attributes: table }), NLM_F_CREATE),
            (NfTablesMessage::NewObject(attributes), NLM_F_CREATE | NLM_F_ACK),
        ],
    )
}

/// Gives new connections of a transport protocol this helper of connection tracking.
pub fn install_helper(name: &str, place: Place, helper: &str, protocol: u8) -> io::Result<()> {
    let string = |kind, text: &str| DefaultNla::new(kind, [text.as_bytes(), b"\0"].concat());
    // NFT_OBJECT_CT_HELPER, as the attributes NFTA_OBJ_TYPE and NFTA_OBJREF_IMM_TYPE.
    let kind = |kind| DefaultNla::new(kind, vec![0, 0, 0, 3]);
    // NFTA_CT_HELPER_NAME, NFTA_CT_HELPER_L4PROTO
    let data = [string(1, helper), DefaultNla::new(3, vec![protocol])];
    let data: &[DefaultNla] = &data;
    let mut nested = vec![0; data.buffer_len()];
    data.emit(&mut nested);
    // NFTA_OBJ_TABLE, _NAME, _TYPE, _DATA
    let object = vec![string(1, name), string(2, helper), kind(3), DefaultNla::new(4, nested)];
    install_object(NetfilterProtoFamily::Inet, name, object)?;
    let assign =
        Expressions::Other { expression_type: "objref".to_owned(), attributes: vec![kind(1), string(2, helper)] };
    install(NetfilterProtoFamily::Inet, name, Some(place), vec![assign])
}

/// Removes an object. `attributes` are its table, name and type.
pub fn remove_object(family: NetfilterProtoFamily, attributes: Vec<DefaultNla>) -> io::Result<()> {
    transact(family, vec![(NfTablesMessage::DeleteObject(attributes), NLM_F_ACK)])
}

/// As [`install`], with a rule that sends everything to a queue: by the `queue` expression
/// (`NFT_QUEUE`), or by the xtables target (`NFT_COMPAT`) if the kernel lacks the expression.
pub fn install_queue(family: NetfilterProtoFamily, name: &str, place: Place, queue: u16) -> io::Result<()> {
    install_queue_if(family, name, place, &[], queue)
}

/// As [`install_queue`], for packets that meet the conditions.
pub fn install_queue_if(
    family: NetfilterProtoFamily,
    name: &str,
    place: Place,
    conditions: &[Expressions],
    queue: u16,
) -> io::Result<()> {
    match install(family, name, Some(place), [conditions, &[queue_expression(queue)]].concat()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            install(family, name, Some(place), [conditions, &[queue_target(queue)]].concat())
        }
        result => result,
    }
}

/// NFTA_QUEUE_NUM, NFTA_QUEUE_TOTAL
fn queue_expression(queue: u16) -> Expressions {
    let attributes = [(1, queue), (2, 1)].map(|(kind, value)| DefaultNla::new(kind, value.to_be_bytes().to_vec()));
    Expressions::Other { expression_type: "queue".to_owned(), attributes: attributes.to_vec() }
}

/// NFTA_TARGET_NAME, NFTA_TARGET_REV, NFTA_TARGET_INFO with `struct xt_NFQ_info_v3`.
fn queue_target(queue: u16) -> Expressions {
    let info = [queue, 1, 0, 0].into_iter().flat_map(u16::to_ne_bytes).collect();
    let attributes = [(1, b"NFQUEUE\0".to_vec()), (2, 3_u32.to_be_bytes().to_vec()), (3, info)];
    let attributes = attributes.map(|(kind, value)| DefaultNla::new(kind, value)).to_vec();
    Expressions::Other { expression_type: "target".to_owned(), attributes }
}

/// Sends messages as a batch. The last one requests an acknowledgement, which follows the first
/// error if there is one.
fn transact(family: NetfilterProtoFamily, messages: Vec<(NfTablesMessage, u16)>) -> io::Result<()> {
    let control = |message| {
        // The subsystem nf_tables is 10.
        let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 10);
        (NetfilterMessage::new::<NetfilterMessageInner>(header, ControlMessage::into(message)), 0)
    };
    let of_family = |(message, flags)| {
        (NetfilterMessage::new::<NfTablesMessage>(NetfilterHeader::new(family, 0, 0), message), flags)
    };
    let begin = std::iter::once(control(ControlMessage::BatchBegin));
    let end = std::iter::once(control(ControlMessage::BatchEnd));
    let mut batch = Vec::new();
    for (message, flags) in begin.chain(messages.into_iter().map(of_family)).chain(end) {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let start = batch.len();
        batch.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut batch[start..]);
    }
    acknowledged(&batch)
}
