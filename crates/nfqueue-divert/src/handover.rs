//! Handing a table over to another process, together with queues.
//!
//! The table belongs to the netlink socket that has made it, whichever process holds the socket. So
//! the socket is passed on, and the table with its base chains stays as it is.

use std::{
    ops::RangeInclusive,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustix::net::sockopt::socket_cookie;

use super::{
    Divert, State,
    builder::check_table_name,
    chain::{Chain, ChainType, Place},
    denied::FlowTable,
    encoder::QueueMethod,
    family::TableFamily,
    hooks::Hooks,
    matching::check_interface_name,
    set::{NamedSet, SetField},
    socket::Connection,
};
use nfqueue_proto::{
    record::{FieldReader, FieldWriter},
    types::{Error, ErrorKind, Family, FlowMarks, Hook},
};

/// What is known of rules that another process has installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ForeignRules {
    pub(super) installed: InstalledRules,
    /// For [`Divert::to_nft`]. `None` if `nft` cannot read the table's name.
    pub(super) script: Option<String>,
}

/// The rules of the kernel, for [`Divert::counters`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct InstalledRules {
    /// The number of the user's rules.
    pub(super) count: usize,
    /// The chain of each rule of the kernel, and the index of the user's rule if it is one, in the
    /// order of each chain.
    pub(super) rules: Vec<(String, Option<usize>)>,
}

/// A table that is being handed over to another process: [`Divert::lend`] and [`Divert::adopt`].
///
/// While it is lent, the table cannot be used in this process.
#[derive(Debug)]
pub struct Lent {
    socket: OwnedFd,
    cookie: u64,
    description: Vec<u8>,
    loan: Loan,
}

/// Whether a table is lent. Clones concern the same table.
#[derive(Debug, Clone)]
pub struct Loan(Arc<AtomicBool>);

impl Loan {
    /// The table can be used in this process, again or for the first time.
    pub fn end(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl Lent {
    /// The socket that owns the table.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The kernel's unique number of the socket (`SO_COOKIE`).
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// What [`Divert::adopt`] must know, in a format of this version of the crate.
    pub fn description(&self) -> &[u8] {
        &self.description
    }

    /// To end the loan.
    pub fn loan(&self) -> Loan {
        self.loan.clone()
    }
}

impl Divert {
    /// Lends the table, to hand it over to another process. Its rules and hooks stay installed all
    /// the time.
    ///
    /// From now on the methods of this value return [`Other`](ErrorKind::Other), until the
    /// [loan](Lent::loan) ends. When the other process has the table, drop this value: that does
    /// not affect the table any more.
    ///
    /// # Errors
    /// [`InvalidInput`](ErrorKind::InvalidInput) if it is lent already, or an error of the
    /// operating system.
    pub fn lend(&self) -> Result<Lent, Error> {
        let operation = || format!("hand over table {}", self.table);
        let script = self.to_nft().ok();
        let state = self.lock();
        let installed = self.installed(&state)?;
        let lent = state.connection.lent();
        let os = |source| Error::os(operation(), source);
        let socket = state.connection.socket().and_then(|socket| socket.as_fd().try_clone_to_owned()).map_err(os)?;
        let cookie = socket_cookie(&socket).map_err(|errno| os(errno.into()))?;
        if lent.swap(true, Ordering::SeqCst) {
            let error = Error::new(ErrorKind::InvalidInput, operation());
            return Err(error.with_detail("it is being handed over already"));
        }
        let description = encode(self, &state, ForeignRules { installed, script });
        Ok(Lent { socket, cookie, description, loan: Loan(lent) })
    }

    /// Whether the table is [lent](Self::lend), or belongs to another process already.
    #[doc(hidden)]
    pub fn is_lent(&self) -> bool {
        self.lock().connection.lent().load(Ordering::SeqCst)
    }

    /// The [default queues](DivertBuilder::default_queues) of a table that is described.
    #[doc(hidden)]
    pub fn described_queues(description: &[u8]) -> Option<RangeInclusive<u16>> {
        decode(description)?.queues.map(|(first, last)| first..=last)
    }

    /// Makes a table of what another process has [lent](Self::lend): the socket, and the
    /// description. It is lent here too, until the loan is ended.
    ///
    /// The rules, the sets with their elements, and the counters stay as they are.
    ///
    /// # Errors
    /// [`Malformed`](ErrorKind::Malformed) if the description is damaged, or an error of the
    /// operating system.
    pub fn adopt(socket: OwnedFd, description: &[u8]) -> Result<(Self, Loan), Error> {
        let failed = |source| Error::os("take over a table", source);
        let decoded = decode(description).ok_or_else(|| Error::new(ErrorKind::Malformed, "take over a table"))?;
        let connection = Connection::adopt(socket, decoded.family, decoded.sequence).map_err(failed)?;
        let lent = connection.lent();
        lent.store(true, Ordering::SeqCst);
        let Decoded { table, family, priority, flows, offload, queues, fail_closed, sets, .. } = decoded;
        let Decoded { method, places, hooks, chains, foreign, .. } = decoded;
        let state = State { connection, method, places, hooks, rules: Vec::new(), foreign: Some(foreign), chains };
        let state = Mutex::new(state);
        Ok((Self { table, family, priority, flows, sets, offload, queues, fail_closed, state }, Loan(lent)))
    }
}

pub(super) struct Decoded {
    sequence: u32,
    table: String,
    family: TableFamily,
    priority: i32,
    method: QueueMethod,
    hooks: Hooks,
    flows: Option<FlowTable>,
    offload: Vec<String>,
    queues: Option<(u16, u16)>,
    fail_closed: bool,
    sets: Vec<NamedSet>,
    places: Vec<Place>,
    chains: Vec<Chain>,
    foreign: ForeignRules,
}

const FAMILIES: [TableFamily; 4] = [TableFamily::Inet, TableFamily::Ip, TableFamily::Ip6, TableFamily::Bridge];
const FIELDS: [SetField; 4] = [SetField::Ipv4Address, SetField::Ipv6Address, SetField::Port, SetField::Protocol];
const TYPES: [ChainType; 2] = [ChainType::Filter, ChainType::Route];
const METHODS: [QueueMethod; 2] = [QueueMethod::Expression, QueueMethod::Target];

fn number_of<T: PartialEq>(all: &[T], one: &T) -> u32 {
    // Every value is in its list, which a test checks by the round trip.
    all.iter().position(|other| other == one).map_or(u32::MAX, |at| at as u32)
}

fn encode(divert: &Divert, state: &State, foreign: ForeignRules) -> Vec<u8> {
    let mut fields = FieldWriter::default();
    fields.u32(state.connection.sequence()).bytes(divert.table.as_bytes());
    fields.u32(number_of(&FAMILIES, &divert.family)).u32(divert.priority as u32);
    fields.u32(number_of(&METHODS, &state.method));
    let Hooks { tracking, defragment, allowed } = state.hooks;
    fields.flag(tracking).flag(defragment).flag(allowed);
    fields.flag(divert.flows.is_some());
    if let Some(flows) = divert.flows {
        fields.u32(flows.marks.mask()).u32(flows.capacity).u64(nanoseconds(flows.timeout));
    }
    fields.u32(divert.offload.len() as u32);
    for name in &divert.offload {
        fields.bytes(name.as_bytes());
    }
    fields.flag(divert.queues.is_some());
    let (first, last) = divert.queues.unwrap_or_default();
    fields.u32(first.into()).u32(last.into()).flag(divert.fail_closed);
    fields.u32(divert.sets.len() as u32);
    for set in &divert.sets {
        fields.bytes(set.name().as_bytes()).u32(set.size());
        let timeout = set.default_timeout();
        fields.flag(timeout.is_some()).u64(timeout.map_or(0, nanoseconds));
        fields.u32(set.fields().len() as u32);
        for field in set.fields() {
            fields.u32(number_of(&FIELDS, field));
        }
    }
    fields.u32(state.places.len() as u32);
    for place in &state.places {
        encode_place(&mut fields, *place);
    }
    fields.u32(state.chains.len() as u32);
    for chain in &state.chains {
        fields.bytes(chain.name.as_bytes()).flag(chain.fixed).flag(chain.base.is_some());
        if let Some((place, kind)) = chain.base {
            encode_place(&mut fields, place);
            fields.u32(number_of(&TYPES, &kind));
        }
    }
    let ForeignRules { installed, script } = foreign;
    fields.u32(installed.count as u32).u32(installed.rules.len() as u32);
    for (chain, index) in &installed.rules {
        fields.bytes(chain.as_bytes()).flag(index.is_some()).u32(index.unwrap_or(0) as u32);
    }
    fields.flag(script.is_some()).bytes(script.unwrap_or_default().as_bytes());
    fields.0
}

fn encode_place(fields: &mut FieldWriter, place: Place) {
    fields.u32(place.hook.number().into()).u32(place.priority as u32);
}

fn decode_place(fields: &mut FieldReader<'_>) -> Option<Place> {
    let hook = Hook::new(Family::Ipv4, fields.u32()?.try_into().ok()?);
    Some(Place { hook, priority: fields.u32()? as i32 })
}

/// A time-out is at most a hundred years.
fn nanoseconds(timeout: Duration) -> u64 {
    u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX)
}

pub(super) fn decode(body: &[u8]) -> Option<Decoded> {
    let mut fields = FieldReader(body);
    let decoded = Decoded {
        sequence: fields.u32()?,
        table: text(&mut fields)?,
        family: *FAMILIES.get(fields.u32()? as usize)?,
        priority: fields.u32()? as i32,
        method: *METHODS.get(fields.u32()? as usize)?,
        hooks: Hooks { tracking: fields.flag()?, defragment: fields.flag()?, allowed: fields.flag()? },
        flows: match fields.flag()? {
            true => Some(FlowTable {
                marks: FlowMarks::new(fields.u32()?),
                capacity: fields.u32()?,
                timeout: Duration::from_nanos(fields.u64()?),
            }),
            false => None,
        },
        offload: list(&mut fields, text)?,
        queues: {
            let given = fields.flag()?;
            let queues = (fields.u32()?.try_into().ok()?, fields.u32()?.try_into().ok()?);
            given.then_some(queues)
        },
        fail_closed: fields.flag()?,
        sets: list(&mut fields, |fields| {
            let (name, capacity) = (text(fields)?, fields.u32()?);
            let timeout = fields.flag()?.then_some(fields.u64()?).map(Duration::from_nanos);
            let of = list(fields, |fields| FIELDS.get(fields.u32()? as usize).copied())?;
            let set = NamedSet::new(name, of).capacity(capacity);
            let set = if let Some(timeout) = timeout { set.timeout(timeout) } else { set };
            set.check().is_ok().then_some(set)
        })?,
        places: list(&mut fields, decode_place)?,
        chains: list(&mut fields, |fields| {
            let (name, fixed) = (text(fields)?, fields.flag()?);
            let base = match fields.flag()? {
                true => Some((decode_place(fields)?, *TYPES.get(fields.u32()? as usize)?)),
                false => None,
            };
            Some(Chain { name, base, fixed })
        })?,
        foreign: ForeignRules {
            installed: InstalledRules {
                count: fields.u32()? as usize,
                rules: list(&mut fields, |fields| {
                    let chain = text(fields)?;
                    Some((chain, fields.flag()?.then_some(fields.u32()? as usize)))
                })?,
            },
            script: fields.flag()?.then_some(text(&mut fields)?),
        },
    };
    let InstalledRules { count, rules } = &decoded.foreign.installed;
    let marks = decoded.flows.is_none_or(|flows| flows.check(decoded.family).is_ok());
    let names = check_table_name(&decoded.table).is_ok() && decoded.chains.iter().all(|chain| chain.has_valid_name());
    let devices = decoded.offload.iter().all(|name| check_interface_name(name).is_ok());
    // A rule becomes one or two of the kernel's.
    (fields.is_at_end() && marks && names && devices && *count <= rules.len()).then_some(decoded)
}

fn list<T>(fields: &mut FieldReader<'_>, item: impl Fn(&mut FieldReader<'_>) -> Option<T>) -> Option<Vec<T>> {
    let mut list = Vec::new();
    for _ in 0..fields.u32()? {
        list.push(item(fields)?);
    }
    Some(list)
}

fn text(fields: &mut FieldReader<'_>) -> Option<String> {
    String::from_utf8(fields.bytes()?.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn divert() -> Divert {
        let sets = vec![
            NamedSet::new("a", FIELDS[..1].to_vec()).timeout(Duration::from_micros(1500)),
            NamedSet::new("b", [SetField::Ipv6Address, SetField::Port, SetField::Protocol]).capacity(7),
        ];
        let place = Place { hook: Hook::Output, priority: -100 };
        let state = State {
            connection: Connection::open(TableFamily::Ip6).unwrap(),
            method: QueueMethod::Target,
            places: vec![place],
            hooks: Hooks { tracking: false, defragment: true, allowed: true },
            rules: Vec::new(),
            foreign: None,
            chains: vec![
                Chain { name: "regular".to_owned(), base: None, fixed: true },
                Chain { name: "output".to_owned(), base: Some((place, ChainType::Route)), fixed: false },
            ],
        };
        let flows = FlowTable { marks: FlowMarks::new(0x70), capacity: 9, timeout: Duration::from_secs(3) };
        let (table, family) = ("t".to_owned(), TableFamily::Ip6);
        let offload = vec!["eth0".to_owned(), "eth1".to_owned()];
        let (queues, fail_closed, state) = (Some((2, 5)), true, Mutex::new(state));
        Divert { table, family, priority: -5, flows: Some(flows), sets, offload, queues, fail_closed, state }
    }

    fn foreign(script: &str) -> ForeignRules {
        let rules = vec![("output".to_owned(), Some(0)), ("regular".to_owned(), None)];
        ForeignRules { installed: InstalledRules { count: 1, rules }, script: Some(script.to_owned()) }
    }

    /// A change of the format writes the seed of the fuzz target again:
    /// `NFQUEUE_FUZZ_WRITE_SEEDS=1 cargo test -p nfqueue-divert`.
    #[test]
    fn the_seed_for_fuzzing_is_of_this_format() {
        let seed = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/records/03");
        if std::env::var_os("NFQUEUE_FUZZ_WRITE_SEEDS").is_some() {
            std::fs::write(seed, body()).unwrap();
        }
        // A published package has no seeds.
        if let Ok(seed) = std::fs::read(seed) {
            assert_eq!(seed, body());
        }
    }

    /// The description of a table with something of everything.
    fn body() -> Vec<u8> {
        let divert = divert();
        let state = divert.lock();
        encode(&divert, &state, foreign("script"))
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let divert = divert();
        let state = divert.lock();
        let body = body();
        let decoded = decode(&body).unwrap();
        assert_eq!((&*decoded.table, decoded.family, decoded.priority), ("t", TableFamily::Ip6, -5));
        assert_eq!((decoded.method, decoded.hooks), (state.method, state.hooks));
        assert_eq!((decoded.places, decoded.chains), (state.places.clone(), state.chains.clone()));
        assert_eq!((decoded.foreign, decoded.flows), (foreign("script"), divert.flows));
        assert_eq!(decoded.offload, divert.offload);
        assert_eq!((decoded.queues, decoded.fail_closed), (Some((2, 5)), true));
        assert_eq!(format!("{:?}", decoded.sets), format!("{:?}", divert.sets));
        for length in 0..body.len() {
            assert!(decode(&body[..length]).is_none(), "{length}");
        }
        for at in 0..body.len() {
            let mut damaged = body.clone();
            damaged[at] ^= 0xff;
            let _ = decode(&damaged);
        }
    }

    /// A name that does not fit into an attribute must not reach the encoder of messages.
    #[test]
    fn names_that_no_table_can_have_are_damage() {
        let long = "x".repeat(70_000);
        for name in ["", "a\0b", &long] {
            let mut divert = divert();
            divert.table = name.to_owned();
            let body = encode(&divert, &divert.lock(), foreign("script"));
            assert!(decode(&body).is_none(), "table {:.9?}", name);
            let divert = self::divert();
            divert.lock().chains[0].name = name.to_owned();
            let body = encode(&divert, &divert.lock(), foreign("script"));
            assert!(decode(&body).is_none(), "chain {:.9?}", name);
        }
    }

    #[test]
    fn every_family_method_and_field_has_a_number() {
        assert!(FAMILIES.iter().all(|family| number_of(&FAMILIES, family) < 4));
        let fields = [SetField::Ipv4Address, SetField::Ipv6Address, SetField::Port, SetField::Protocol];
        assert!(fields.iter().all(|field| number_of(&FIELDS, field) < 4));
    }
}
