//! The cases, the path of the packets, and the queue that edits them.

use std::{
    fmt, fs,
    future::Future,
    net::{IpAddr, UdpSocket},
};

use libtest_mimic::Trial;
use nfqueue_divert::Divert;
use tokio::task::JoinHandle;
use tokio_nfqueue::{Error, Hook, Protocol, Queue, Rule, VerdictSink, edit::Edit};

use super::second;
use crate::{
    common,
    support::{self, Peer, VethOptions},
};

/// The port of the receivers.
pub(crate) const PORT: u16 = 9000;

/// The parameters of a test.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) v6: bool,
    /// Whether the offloads of both interfaces are on.
    pub(crate) offloads: bool,
    /// Whether the queue takes super-packets.
    pub(crate) gso: bool,
}

impl Case {
    /// The prefix length of a single address.
    pub(crate) fn prefix(self) -> u8 {
        if self.v6 { 128 } else { 32 }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |on| if on { "on" } else { "off" };
        write!(f, "IPv{}, offloads {}, GSO {}", if self.v6 { 6 } else { 4 }, on(self.offloads), on(self.gso))
    }
}

/// A test with all parameters.
pub(crate) fn each_case<F: Future<Output = ()> + 'static>(name: &str, body: fn(Case) -> F) -> Vec<Trial> {
    (0..8)
        .map(|bits| Case { v6: bits & 4 != 0, offloads: bits & 2 != 0, gso: bits & 1 != 0 })
        .map(|case| {
            let name = format!("{}: {case}", common::test_name(module_path!(), name));
            support::test_multi(&name.clone(), move || async move {
                if common::replaces_payloads() {
                    body(case).await;
                } else {
                    eprintln!("{name}: not tried, for this kernel refuses replaced payloads in a user namespace");
                }
            })
        })
        .collect()
}

/// This namespace and another, with an address of each.
pub(crate) struct Path {
    pub(crate) peer: Peer,
    pub(crate) near: IpAddr,
    pub(crate) far: IpAddr,
}

impl Path {
    pub(crate) fn new(case: Case) -> Self {
        Self::with_index(case, 0)
    }

    /// A path to a third namespace.
    pub(crate) fn beside(case: Case) -> Self {
        Self::with_index(case, 1)
    }

    fn with_index(case: Case, index: u8) -> Self {
        let peer = support::veth_with(&VethOptions { index, offloads: case.offloads, ..VethOptions::default() });
        let (near, far): (IpAddr, IpAddr) = match case.v6 {
            false => (peer.near_v4.into(), peer.far_v4.into()),
            true => (peer.near_v6.into(), peer.far_v6.into()),
        };
        Self { peer, near, far }
    }

    /// Adds an address to one side.
    pub(crate) fn add_address(&self, near: bool, address: IpAddr) {
        let prefix = if address.is_ipv4() { 24 } else { 64 };
        if near {
            support::add_address(&self.peer.near, address, prefix);
        } else {
            self.peer.run(|| support::add_address(&self.peer.far, address, prefix));
        }
    }

    /// Adds a second address to one side, whose first address becomes a hop of routes to it.
    /// Returns the second address.
    pub(crate) fn accept_routes(&self, near: bool) -> IpAddr {
        let (first, interface) = if near { (self.near, &self.peer.near) } else { (self.far, &self.peer.far) };
        let last = second(first);
        self.add_address(near, last);
        let accept = || {
            let file = if first.is_ipv4() { "accept_source_route" } else { "seg6_enabled" };
            for interface in ["all", interface] {
                let path = format!("/proc/sys/net/ipv{}/conf/{interface}/{file}", if first.is_ipv4() { 4 } else { 6 });
                fs::write(&path, "1").unwrap_or_else(|error| panic!("{path}: {error}"));
            }
        };
        if near {
            accept()
        } else {
            self.peer.run(accept)
        }
        last
    }

    pub(crate) fn near_udp(&self) -> UdpSocket {
        support::udp((self.near, 0))
    }

    /// A socket in the other namespace.
    pub(crate) fn far_udp(&self, port: u16) -> UdpSocket {
        self.peer.run(|| support::udp((self.far, port)))
    }

    pub(crate) fn udp_to(hook: Hook, port: u16) -> Rule {
        Rule::new(hook).protocol(Protocol::Udp).destination_port(port)
    }

    /// Asserts that the kernel has found no wrong checksum on either side.
    #[track_caller]
    pub(crate) fn assert_checksums(&self) {
        assert_eq!((checksum_errors(), self.peer.run(checksum_errors)), (0, 0), "wrong checksums, near and far");
    }
}

/// The number of wrong checksums that the kernel has found in this thread's namespace: of TCP, UDP,
/// ICMP and ICMPv6, and of IPv4 headers.
pub(crate) fn checksum_errors() -> u64 {
    let v4 = fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let v4: Vec<_> = v4.lines().map(|line| line.split_ascii_whitespace()).collect();
    let v4 = v4.chunks_exact(2).flat_map(|pair| pair[0].clone().zip(pair[1].clone()));
    let v6 = fs::read_to_string("/proc/thread-self/net/snmp6").unwrap();
    let v6 = v6.lines().filter_map(|line| line.split_once(char::is_whitespace));
    let relevant = |name: &str| name.ends_with("InCsumErrors") || name == "InHdrErrors" || name == "Ip6InHdrErrors";
    let counters = v4.chain(v6).filter(|(name, _)| relevant(name));
    counters.map(|(_, number)| number.trim().parse::<u64>().unwrap()).sum()
}

/// A queue that edits all its packets.
pub(crate) struct Editor {
    divert: Divert,
    sink: VerdictSink,
    task: JoinHandle<Seen>,
}

/// The packets that an [`Editor`] has received.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) packets: u32,
    pub(crate) super_packets: u32,
    /// Packets with an unfinished checksum.
    pub(crate) unfinished: u32,
}

impl Editor {
    /// Starts to edit the packets that the rules match.
    pub(crate) fn start(
        case: Case,
        rules: impl IntoIterator<Item = Rule>,
        mut change: impl FnMut(&mut Edit) -> Result<(), Error> + Send + 'static,
    ) -> Self {
        let mut queue = common::bind_now(Queue::builder(0).gso(case.gso));
        let sink = queue.sink();
        let divert = common::divert(rules.into_iter().map(|rule| rule.to_queue(0)));
        let task = tokio::spawn(async move {
            let mut seen = Seen::default();
            while let Some(packet) = queue.recv().await {
                let packet = packet.expect("a packet and no error");
                seen.packets += 1;
                seen.super_packets += u32::from(packet.is_gso());
                seen.unfinished += u32::from(!packet.is_checksum_ready());
                let mut edit = packet.edit().expect("a packet that can be edited");
                change(&mut edit).unwrap_or_else(|error| panic!("{edit:?}: {error}"));
                packet.accept().payload(edit.finish()).submit().expect("a possible verdict");
            }
            seen
        });
        Self { divert, sink, task }
    }

    /// Closes the queue, and returns the numbers of its packets. Fails if an edit has failed.
    pub(crate) async fn stop(self) -> Seen {
        self.divert.remove_rules().unwrap();
        self.sink.close().await.unwrap();
        self.task.await.expect("every edit succeeds")
    }
}
