//! Lives of filters: processes that own a queue and its rules are killed, stopped, restarted and
//! replaced at random, while another host sends what is allowed and what is forbidden. For the
//! example `soak`.
//!
//! What must hold is in the documentation of `DivertBuilder::fail_closed`, in `guide::flows` and in
//! `guide::restarting`:
//!
//! - What is forbidden does not arrive: with rules that fail closed, from the first start until a
//!   clean stop; with others, while a filter lives that is ready and has not been told to end.
//! - After a failure, rules that fail closed let nothing pass but accepted connections; others let
//!   everything pass.
//! - A hand-over loses nothing that is allowed, nor does a clean stop of rules that fail open.
//! - A denied connection stays denied, and an accepted one accepted, as long as the table exists.
//! - `in_flow_order` keeps the order of a connection.
//! - A clean stop leaves no table and no queue, and every packet that was received has been
//!   decided.
//! - While a filter is ready, allowed traffic works.

mod filter;
mod process;
mod steps;
mod traffic;

use std::{
    collections::BTreeSet,
    net::{TcpStream, UdpSocket},
    ops::AddAssign,
    thread,
    time::{Duration, Instant},
};

pub(crate) use self::filter::child;
use self::{
    process::Process,
    traffic::{Echo, Flood, Receiver},
};
use crate::{
    common::Random,
    support::{self, Peer},
    walk::strangers::Stranger,
};

/// The table of the filters.
const TABLE: &str = "lives";
/// What the names of their sockets begin with.
const HAND_OVER: &str = "soak, filter";
/// How long is waited for what must come.
const PATIENCE: Duration = Duration::from_secs(20);
/// Steps of a history.
const STEPS: usize = 14;

/// What a filter does with packets to a port of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Port {
    /// UDP, accepted one by one.
    Allowed,
    /// UDP, dropped one by one.
    Forbidden,
    /// UDP, rejected one by one.
    Rejected,
    /// UDP, each connection as its first packet says: [`flow`].
    Flow,
    /// TCP, accepted one by one.
    Open,
    /// TCP, connections are accepted. One of their bytes is dropped if it comes to the queue.
    Stream,
    /// TCP, connections are rejected.
    Denied,
}

impl Port {
    const ALL: [(Self, u8, u16); 7] = [
        (Self::Allowed, 17, 5001),
        (Self::Forbidden, 17, 5002),
        (Self::Rejected, 17, 5003),
        (Self::Flow, 17, 5004),
        (Self::Open, 6, 6001),
        (Self::Stream, 6, 6002),
        (Self::Denied, 6, 6003),
    ];

    fn number(self) -> u16 {
        Self::ALL.into_iter().find(|(port, ..)| *port == self).expect("a port").2
    }

    /// From a packet's protocol and its ports, of which one is of this host.
    fn of(protocol: u8, ports: [u16; 2]) -> Option<Self> {
        let found = |(_, other, number): &(Self, u8, u16)| *other == protocol && ports.contains(number);
        Self::ALL.into_iter().find(found).map(|(port, ..)| port)
    }
}

/// The first byte of datagrams to [`Port::Flow`], and of what is sent over [`Port::Stream`].
mod flow {
    /// The connection is accepted, dropped or rejected.
    pub(super) const ACCEPT: u8 = b'a';
    pub(super) const DROP: u8 = b'd';
    pub(super) const REJECT: u8 = b'r';
    /// If it comes to the queue it is dropped, or accepted.
    pub(super) const DROP_ALONE: u8 = b'y';
    pub(super) const ACCEPT_ALONE: u8 = b'x';
}

/// What is the same for all filters of a history.
#[derive(Debug, Clone, Copy)]
struct Traits {
    /// The rules fail closed.
    closed: bool,
    /// They have `bypass`.
    bypass: bool,
    /// How many queue numbers.
    numbers: u16,
    /// Packets are served in the order of their connections.
    ordered: bool,
}

/// What has been tried.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Totals {
    pub(crate) histories: u64,
    pub(crate) closed: u64,
    pub(crate) starts: u64,
    pub(crate) kills: u64,
    pub(crate) hand_overs: u64,
    pub(crate) killed_hand_overs: u64,
    pub(crate) stops: u64,
    pub(crate) capabilities_lost: u64,
    pub(crate) strangers: u64,
    pub(crate) flaps: u64,
    pub(crate) flows: u64,
    pub(crate) datagrams: u64,
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.histories += other.histories;
        self.closed += other.closed;
        self.starts += other.starts;
        self.kills += other.kills;
        self.hand_overs += other.hand_overs;
        self.killed_hand_overs += other.killed_hand_overs;
        self.stops += other.stops;
        self.capabilities_lost += other.capabilities_lost;
        self.strangers += other.strangers;
        self.flaps += other.flaps;
        self.flows += other.flows;
        self.datagrams += other.datagrams;
    }
}

/// Runs the history of a seed in the current network namespace. The seed repeats the steps; when
/// threads and processes run, it does not determine.
///
/// # Errors
/// What was wrong, and each step until then.
pub(crate) fn history(seed: u64) -> Result<Totals, String> {
    let mut life = Life::new(seed);
    let result = life.live();
    life.totals.datagrams = u64::from(life.flood.sent()) * 3;
    match result {
        Ok(()) => Ok(life.totals),
        Err(wrong) => Err(format!("{wrong}\n{}", life.history())),
    }
}

/// A connection of UDP with a verdict.
struct Conversation {
    number: u32,
    accepted: bool,
    socket: UdpSocket,
}

struct Life {
    random: Random,
    traits: Traits,
    begun: Instant,
    log: Vec<String>,
    peer: Peer,
    flood: Flood,
    _echo: Echo,
    /// Of [`Port::Allowed`], [`Port::Forbidden`], [`Port::Rejected`] and [`Port::Flow`].
    receivers: [Receiver; 4],
    process: Option<Process>,
    processes: u32,
    /// The number of what is promised now, and whether nothing forbidden may arrive.
    promise: u32,
    guarded: bool,
    /// From this number on, allowed datagrams may not arrive either.
    shut: Option<u32>,
    /// From this number on, allowed datagrams arrive in their order.
    in_order: Option<u32>,
    last: u32,
    allowed: BTreeSet<u32>,
    /// A forbidden datagram that was sent under the present promise has arrived.
    leaked: bool,
    conversations: Vec<Conversation>,
    flows: u32,
    /// The flow whose datagram has arrived last.
    heard: Option<u32>,
    open: Option<TcpStream>,
    stream: Option<TcpStream>,
    strangers: Vec<Stranger>,
    totals: Totals,
}

impl Life {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x11fe);
        let closed = random.one_in(2);
        let traits = Traits {
            closed,
            bypass: !closed && random.one_in(2),
            numbers: [1, 1, 3][random.below(3)],
            ordered: random.one_in(2),
        };
        let peer = support::veth();
        let receivers = [Port::Allowed, Port::Forbidden, Port::Rejected, Port::Flow].map(Receiver::at);
        let flood = Flood::start(&peer);
        Self {
            random,
            traits,
            begun: Instant::now(),
            log: vec![format!("{traits:?}")],
            peer,
            flood,
            _echo: Echo::start([Port::Open, Port::Stream, Port::Denied]),
            receivers,
            process: None,
            processes: 0,
            promise: 0,
            guarded: false,
            shut: None,
            in_order: None,
            last: 0,
            allowed: BTreeSet::new(),
            leaked: false,
            conversations: Vec::new(),
            flows: 0,
            heard: None,
            open: None,
            stream: None,
            strangers: Vec::new(),
            totals: Totals { histories: 1, closed: closed.into(), ..Totals::default() },
        }
    }

    fn note(&mut self, text: impl Into<String>) {
        let (at, sent) = (self.begun.elapsed().as_secs_f64() * 1000.0, self.flood.sent());
        self.log.push(format!("{at:>9.2} ms, datagram {sent}: {}", text.into()));
    }

    /// Each step until now, and what the filter has said.
    fn history(&mut self) -> String {
        let lines = self.process.as_mut().map(|process| process.lines().join(" | "));
        format!("{}\nthe filter has said: {lines:?}", self.log.join("\n"))
    }

    /// From now on nothing forbidden may arrive.
    fn guard(&mut self) {
        if !self.guarded {
            self.change(true);
        }
    }

    /// From now on it may. What has arrived by now may not have.
    fn unguard(&mut self) -> Result<(), String> {
        if self.guarded {
            self.receive()?;
            self.change(false);
        }
        Ok(())
    }

    fn change(&mut self, guarded: bool) {
        (self.promise, self.guarded, self.leaked) = (self.promise + 1, guarded, false);
        self.flood.promise(self.promise);
        self.note(format!("promise {}: guarded: {guarded}", self.promise));
    }

    /// The verdicts for connections are forgotten.
    fn forget(&mut self) {
        self.conversations.clear();
        self.stream = None;
    }

    /// Reads what has arrived, and checks it.
    fn receive(&mut self) -> Result<(), String> {
        // The forbidden ones first: of those that are read, all were sent under a promise that
        // still holds or is over.
        for (index, port) in [(1, Port::Forbidden), (2, Port::Rejected)] {
            while let Some((promise, number)) = self.receivers[index].next().map(halves) {
                let present = promise == self.promise;
                self.leaked |= present;
                if present && self.guarded {
                    return Err(format!("a forbidden datagram arrived: {port:?}, number {number}, promise {promise}"));
                }
            }
        }
        while let Some((_, number)) = self.receivers[0].next().map(halves) {
            if !self.allowed.insert(number) {
                return Err(format!("datagram {number} arrived twice"));
            }
            if self.shut.is_some_and(|first| number >= first) {
                return Err(format!("datagram {number} passed after the filter had ended, though it fails closed"));
            }
            if self.in_order.is_some_and(|first| number >= first && self.last >= first && number < self.last) {
                return Err(format!("datagram {number} arrived after {}, out of flow order", self.last));
            }
            self.last = number;
        }
        while let Some(datagram) = self.receivers[3].next() {
            let (kind, flow) = (datagram[0], u32::from_be_bytes(*datagram[1..].first_chunk().expect("a number")));
            self.heard = Some(flow);
            let denied = self.conversations.iter().any(|other| other.number == flow && !other.accepted);
            if denied {
                return Err(format!("a datagram ({}) of the denied flow {flow} arrived", char::from(kind)));
            }
        }
        Ok(())
    }

    /// Waits until a condition holds, and receives meanwhile.
    fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.receive()?;
            if condition(self) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("not within {PATIENCE:?}: {what}"));
            }
            thread::sleep(Duration::from_micros(500));
        }
    }

    /// Lets so many datagrams be sent.
    fn traffic(&mut self, count: u32) -> Result<(), String> {
        let end = self.flood.sent() + count;
        self.until("traffic flows", |life| life.flood.sent() >= end)
    }
}

fn halves(datagram: [u8; 8]) -> (u32, u32) {
    let number = u64::from_be_bytes(datagram);
    ((number >> 32) as u32, number as u32)
}
