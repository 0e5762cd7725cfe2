//! Connections whose packets the adversary sends, from both sides.

use std::net::SocketAddr;

use super::{
    model::Side,
    segment::{self, ACK, FIN, PSH, RST, SYN, Segment},
    world::Host,
};
use crate::common::Random;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Udp,
    Syn,
    SynAck,
    Ack,
    Data,
    Fin,
    Rst,
    /// With data.
    RstData,
    /// Out of sequence.
    WrongRst,
    /// An ICMP error about a packet of the connection.
    Error,
}

impl Kind {
    /// Whether a connection of its own begins with it.
    pub(super) fn begins(self) -> bool {
        matches!(self, Self::Udp | Self::Syn)
    }

    pub(super) fn begins_tcp(self) -> bool {
        self == Self::Syn
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    Forward,
    /// From the left to this host.
    Inbound,
    /// From this host to the right.
    Outbound,
    Loopback,
}

pub(super) const PATHS: [Path; 4] = [Path::Forward, Path::Inbound, Path::Outbound, Path::Loopback];

impl Path {
    /// The hosts of both sides.
    pub(super) fn hosts(self) -> [Host; 2] {
        match self {
            Self::Forward => [Host::Left, Host::Right],
            Self::Inbound => [Host::Left, Host::This],
            Self::Outbound => [Host::This, Host::Right],
            Self::Loopback => [Host::This, Host::This],
        }
    }
}

/// How far a TCP connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Fresh,
    Opening(Side),
    Answered(Side),
    Open,
    /// It began in the middle.
    Loose,
    /// Reset, or something that connection tracking may take for it.
    Over,
}

#[derive(Debug, Clone)]
pub(super) struct Connection {
    pub(super) id: usize,
    pub(super) path: Path,
    pub(super) tcp: bool,
    /// The addresses of both sides.
    pub(super) ends: [SocketAddr; 2],
    /// What each side takes for the address of the other, if that is translated.
    pub(super) seen: [Option<SocketAddr>; 2],
    pub(super) translated: bool,
    /// How many more packets are sent.
    pub(super) budget: usize,
    phase: Phase,
    /// The next sequence number of each side.
    sequence: [u32; 2],
    /// The first TCP connection has opened as it should, and nothing else has happened.
    orderly: bool,
    /// A packet has arrived: the kernel knows a UDP connection.
    pub(super) passed: bool,
    pub(super) log: Vec<(u64, String)>,
}

impl Connection {
    pub(super) fn new(id: usize, path: Path, tcp: bool, ends: [SocketAddr; 2], budget: usize) -> Self {
        Self {
            id,
            path,
            tcp,
            ends,
            seen: [None; 2],
            translated: false,
            budget,
            phase: Phase::Fresh,
            sequence: [0; 2],
            orderly: true,
            passed: false,
            log: Vec::new(),
        }
    }

    /// Whether this side knows whom to send to.
    pub(super) fn can_send(&self, side: Side) -> bool {
        !self.translated || side == 0 || self.seen[1].is_some()
    }

    /// The kernel certainly knows the connection, whose packets are in order.
    pub(super) fn is_known(&self) -> bool {
        !self.translated && if self.tcp { self.orderly && self.phase == Phase::Open } else { self.passed }
    }

    /// What comes next, and from which side. `denied`: one tries to be rid of a denial.
    pub(super) fn draw(&self, denied: bool, random: &mut Random) -> (Side, Kind) {
        let any = random.below(2);
        if self.tcp && denied && random.one_in(2) {
            let kinds =
                [Kind::Rst, Kind::Rst, Kind::Syn, Kind::Syn, Kind::Data, Kind::Data, Kind::RstData, Kind::Error];
            return (usize::from(random.one_in(4)), kinds[random.below(kinds.len())]);
        }
        if random.one_in(12) && self.phase != Phase::Fresh {
            return (any, Kind::Error);
        }
        if !self.tcp {
            return (usize::from(random.one_in(3)), Kind::Udp);
        }
        let chance = random.below(100);
        match self.phase {
            Phase::Fresh => match chance {
                0..80 => (0, Kind::Syn),
                80..88 => (1, Kind::Syn),
                88..96 => (any, Kind::Data),
                96..98 => (any, Kind::SynAck),
                _ => (any, Kind::WrongRst),
            },
            Phase::Opening(side) => match chance {
                0..70 => (1 - side, Kind::SynAck),
                70..85 => (side, Kind::Syn),
                85..90 => (1 - side, Kind::Syn),
                90..94 => (1 - side, Kind::Rst),
                _ => (any, Kind::Data),
            },
            Phase::Answered(side) => match chance {
                0..85 => (side, Kind::Ack),
                85..92 => (1 - side, Kind::SynAck),
                92..96 => (side, Kind::Syn),
                _ => (any, Kind::Rst),
            },
            Phase::Open | Phase::Loose => match chance {
                0..60 => (any, Kind::Data),
                60..66 => (any, Kind::Ack),
                66..70 => (any, Kind::Fin),
                70..82 => (any, Kind::Rst),
                82..85 => (any, Kind::RstData),
                85..88 => (any, Kind::WrongRst),
                _ => (usize::from(random.one_in(4)), Kind::Syn),
            },
            Phase::Over => match chance {
                0..40 => (usize::from(random.one_in(6)), Kind::Syn),
                40..80 => (any, Kind::Data),
                80..90 => (any, Kind::Rst),
                90..94 => (any, Kind::RstData),
                _ => (any, Kind::Fin),
            },
        }
    }

    /// Makes a packet. Says whether connection tracking certainly takes it for one of the
    /// connection.
    pub(super) fn packet(&mut self, side: Side, kind: Kind, number: u32, random: &mut Random) -> (Vec<u8>, bool) {
        let (from, to) = (self.ends[side], self.seen[side].unwrap_or(self.ends[1 - side]));
        match kind {
            Kind::Udp => (segment::udp(from, to, number), true),
            Kind::Error => {
                let about = if self.tcp {
                    let segment = Segment {
                        flags: ACK,
                        sequence: self.sequence[1 - side],
                        acknowledgement: self.sequence[side],
                        payload: 0,
                    };
                    segment::tcp(to, from, segment, 0)
                } else {
                    segment::udp(to, from, 0)
                };
                (segment::icmp_error(from.ip(), to.ip(), &about, number), false)
            }
            _ => {
                let valid = self.advance(side, kind, random);
                let (flags, payload, wrong) = match kind {
                    Kind::Syn => (SYN, 0, 0),
                    Kind::SynAck => (SYN | ACK, 0, 0),
                    Kind::Ack => (ACK, 0, 0),
                    Kind::Data => (ACK | PSH, 10, 0),
                    Kind::Fin => (FIN | ACK, 0, 0),
                    Kind::RstData => (RST | ACK, 10, 0),
                    Kind::WrongRst => (RST | ACK, 0, 1 << 20),
                    _ => (if random.one_in(2) { RST } else { RST | ACK }, 0, 0),
                };
                let begins = u32::from(flags & (SYN | FIN) != 0);
                let sequence = self.sequence[side].wrapping_add(wrong);
                let segment = Segment { flags, sequence, acknowledgement: self.sequence[1 - side], payload };
                self.sequence[side] = self.sequence[side].wrapping_add(begins + payload as u32);
                (segment::tcp(from, to, segment, number), valid)
            }
        }
    }

    /// Takes the state to where the segment leads.
    fn advance(&mut self, side: Side, kind: Kind, random: &mut Random) -> bool {
        let isn = |random: &mut Random| 1_000_000 + random.below(1 << 30) as u32;
        let (next, valid) = match (self.phase, kind) {
            (Phase::Opening(first), Kind::Syn) if first == side => {
                self.sequence[side] = self.sequence[side].wrapping_sub(1);
                (self.phase, true)
            }
            (Phase::Fresh | Phase::Over, Kind::Syn) => {
                self.sequence[side] = isn(random);
                self.orderly &= self.phase == Phase::Fresh;
                (Phase::Opening(side), true)
            }
            (_, Kind::Syn) => {
                // The client has crashed and begins anew; or both begin at once.
                self.sequence[side] = isn(random);
                self.orderly = false;
                (Phase::Opening(side), false)
            }
            (Phase::Opening(first), Kind::SynAck) if first != side => {
                self.sequence[side] = isn(random);
                // The kernel forgets a connection whose first packet is dropped.
                self.orderly &= self.passed;
                (Phase::Answered(first), self.orderly)
            }
            (Phase::Answered(first), Kind::Ack | Kind::Data) if first == side => (Phase::Open, self.orderly),
            (Phase::Open, Kind::Ack | Kind::Data) => (Phase::Open, self.orderly),
            (Phase::Fresh, Kind::Data) => {
                self.sequence = [isn(random), isn(random)];
                self.orderly = false;
                (Phase::Loose, true)
            }
            (Phase::Loose, Kind::Ack | Kind::Data) => (Phase::Loose, false),
            (phase, Kind::WrongRst) => {
                self.orderly = false;
                (phase, false)
            }
            _ => {
                self.orderly = false;
                (Phase::Over, false)
            }
        };
        self.phase = next;
        valid
    }
}
