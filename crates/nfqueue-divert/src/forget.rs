//! Takes verdicts for connections back.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashSet},
};

use netlink_packet_core::{DefaultNla, NLA_F_NESTED};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage},
};
use rustix::io::Errno;

use nfqueue_proto::{
    types::{Error, ErrorKind, FlowMarks, FlowTuple},
    wire::tuple::decode,
};

use super::{
    denied::{self, DeniedSet},
    dump::{self, attribute},
    encoder::{Encoding, QueueMethod, number},
    failure,
    family::IpVersion,
    nft::{self, Batch, Element},
    socket::{Connection, Outcome, Refusal},
    tuple::{key_of, ports_key_of, same_connection, translated_flow},
};

/// The connections of which a verdict has been forgotten.
#[derive(Debug, Default)]
pub(super) struct Forgotten {
    /// Those that had a verdict, if one was named.
    pub(super) flows: Vec<FlowTuple>,
    /// Those that were accepted: the tuples of their first packets.
    accepted: HashSet<FlowTuple>,
}

/// Which marks of connections are removed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Forget {
    /// Also those that are no verdicts.
    All,
    /// Those of all verdicts. That a connection may have begun on an older one's entry stays:
    /// verdicts for packets of the older one may be on their way.
    Verdicts,
    /// Those of the verdict for one connection.
    VerdictOf(FlowTuple),
}

/// Removes the marks of connections.
pub(super) fn forget_marks(connection: &mut Connection, marks: FlowMarks, forget: Forget) -> Result<Forgotten, Error> {
    let found = RefCell::new(Forgotten::default());
    let verdicts = [marks.accepting(), marks.accepted(), marks.denied()];
    let common = verdicts.into_iter().fold(marks.mask(), |common, value| common & value);
    let begun_again = matches!(forget, Forget::All).then_some((marks.begun_again(), marks.mask()));
    for (value, mask) in [(common, common)].into_iter().chain(begun_again) {
        let filter = vec![
            ConntrackAttribute::Other(number(CTA_MARK, value)),
            ConntrackAttribute::Other(number(CTA_MARK_MASK, mask)),
        ];
        let request = message(NetfilterProtoFamily::Unspec, ConntrackMessage::Get(filter));
        let result = connection.change_all(request, |header, entry| {
            // Older kernels do not filter.
            let mark = u32::from_be_bytes(attribute(entry, CTA_MARK)?.try_into().ok()?) & marks.mask();
            let no_verdict = begun_again.is_some_and(|(value, _)| mark == value);
            if !verdicts.contains(&mark) && !no_verdict {
                return None;
            }
            let names = names(entry);
            if let Forget::VerdictOf(flow) = forget {
                let names = names?;
                if !names.iter().any(|name| same_connection(flow, *name)) {
                    return None;
                }
                // By the tuples of both sides. Without translation each names both.
                found.borrow_mut().flows.extend([names[0], names[2]]);
            }
            if mark == marks.accepted() || mark == marks.accepting() {
                found.borrow_mut().accepted.extend(names.map(|names| names[0]));
            }
            let family = NetfilterProtoFamily::from(*header.first()?);
            let original = DefaultNla::new(CTA_TUPLE_ORIG | NLA_F_NESTED, attribute(entry, CTA_TUPLE_ORIG)?.to_vec());
            let zone = attribute(entry, CTA_ZONE).map(|zone| DefaultNla::new(CTA_ZONE, zone.to_vec()));
            let all = matches!(forget, Forget::All);
            let left = if mark == marks.accepting() && !all { marks.begun_again() } else { 0 };
            let change = [number(CTA_MARK, left), number(CTA_MARK_MASK, marks.mask())];
            let attributes = [original].into_iter().chain(zone).chain(change).map(ConntrackAttribute::Other).collect();
            Some(message(family, ConntrackMessage::New(attributes)))
        });
        result.map_err(failed)?;
    }
    Ok(found.into_inner())
}

/// Moves the packets of the connections past the flowtable, if they are in it.
///
/// The kernel then forwards no more of them from there, and removes the connections soon.
pub(super) fn recall(connection: &mut Connection, table: &str, forgotten: &Forgotten) -> Result<(), Refusal> {
    if forgotten.accepted.is_empty() {
        return Ok(());
    }
    // Only now: until its mark was removed, a connection could come into the flowtable.
    let keys = RefCell::new(BTreeSet::new());
    let request = message(NetfilterProtoFamily::Unspec, ConntrackMessage::Get(Vec::new()));
    connection.change_all(request, |_, entry| {
        let status = u32::from_be_bytes(attribute(entry, CTA_STATUS)?.try_into().ok()?);
        let tuples = [CTA_TUPLE_ORIG, CTA_TUPLE_REPLY].map(|kind| attribute(entry, kind).and_then(decode));
        if status & IPS_OFFLOAD != 0 && forgotten.accepted.contains(&tuples[0]?) {
            keys.borrow_mut().extend(tuples.into_iter().flatten().map(ports_key_of));
        }
        None
    })?;
    let keys: Vec<Element> = keys.into_inner().into_iter().map(|key| (key, None)).collect();
    while !keys.is_empty() {
        // Older kernels do not change the time of an element that exists.
        let there = dump::keys(&connection.dump(&nft::get_elements(table, denied::RECALLED))?);
        let mut batch = Batch::new(table, Encoding { method: QueueMethod::Expression, trial: false });
        let old: Vec<Element> = keys.iter().filter(|(key, _)| there.contains(key)).cloned().collect();
        batch.delete_elements(denied::RECALLED, &old);
        batch.insert_elements(denied::RECALLED, &keys, false);
        match connection.transact(&batch.commands, Outcome::Commit) {
            // One of them has expired meanwhile.
            Err(refusal) if failure::errno(&refusal) == Some(Errno::NOENT) => {}
            result => return result,
        }
    }
    Ok(())
}

/// The elements of the sets of denied connections, and of those beside denied ones, that are this
/// connection, which has these tuples: set and key.
pub(super) fn denied_elements(
    connection: &mut Connection,
    table: &str,
    version: IpVersion,
    flow: FlowTuple,
    tuples: &[FlowTuple],
) -> std::io::Result<Vec<(&'static str, Vec<u8>)>> {
    let of = |tuple: FlowTuple| [tuple, tuple.reversed()].map(key_of);
    let mut keys: Vec<Vec<u8>> = tuples.iter().chain([&flow]).flat_map(|tuple| of(*tuple)).collect();
    let map = denied::translated(version);
    for object in connection.dump(&nft::get_elements(table, map))? {
        for (key, data) in dump::mapped(&object) {
            // As a packet shows it behind the translation. Either name names both.
            let Some(shown) = translated_flow(&key, &data) else { continue };
            if same_connection(flow, shown) || of(flow).contains(&key) {
                keys.extend(of(shown).into_iter().chain([key]));
            }
        }
    }
    keys.sort();
    keys.dedup();
    let others = [map, denied::beside(version), denied::recent(version)];
    let names: Vec<&str> = DeniedSet::of(version).map(DeniedSet::name).into_iter().chain(others).collect();
    let mut found = Vec::new();
    for key in keys {
        for name in &names {
            // To delete what is not there would abort a transaction, for which the kernel waits
            // until no CPU uses the old rules.
            match connection.ask(nft::get_element(table, name, &key)) {
                Ok(()) => found.push((*name, key.clone())),
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(found)
}

/// The tuples by which packets name the connection of an entry, in one direction: with and without
/// the translation of each end.
fn names(entry: &[u8]) -> Option<[FlowTuple; 4]> {
    let original = decode(attribute(entry, CTA_TUPLE_ORIG)?)?;
    let back = decode(attribute(entry, CTA_TUPLE_REPLY)?)?.reversed();
    let destination = FlowTuple { destination: back.destination, ..original };
    Some([original, destination, back, FlowTuple { source: back.source, ..original }])
}

fn message(family: NetfilterProtoFamily, message: ConntrackMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message)
}

fn failed(error: std::io::Error) -> Error {
    let (kind, detail) = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::PERM) => {
            (ErrorKind::NotPermitted, "CAP_NET_ADMIN is needed in the user namespace that owns the network namespace")
        }
        // nfnetlink_rcv_msg: the kernel has no such subsystem.
        Some(Errno::INVAL | Errno::OPNOTSUPP) => (
            ErrorKind::Unsupported,
            "the kernel has no NF_CT_NETLINK, which flow marks need; for rules without them: flow_marks(None)",
        ),
        _ => (ErrorKind::Other, "cannot change the marks of connections"),
    };
    Error::new(kind, "").with_source(error).with_detail(detail)
}

/// uapi/linux/netfilter/nf_conntrack_common.h
const IPS_OFFLOAD: u32 = 1 << 14;
// uapi/linux/netfilter/nfnetlink_conntrack.h
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_MARK: u16 = 8;
const CTA_ZONE: u16 = 18;
const CTA_MARK_MASK: u16 = 21;
