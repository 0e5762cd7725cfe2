//! Rules in full: each condition and its negation, each action, sets, replacement and counters.

mod actions;
mod matches;
mod replacing;
mod sets;
mod text;

use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};

use etherparse::PacketBuilder;
use libtest_mimic::Trial;
use nfqueue_divert::Divert;
use tokio_nfqueue::{Hook, Protocol, Rule, divert::Match};

use crate::support::{Bridge, Frame, PATIENCE, udp};

pub(crate) fn tests() -> Vec<Trial> {
    let modules = [matches::tests(), actions::tests(), sets::tests(), replacing::tests(), text::tests()];
    modules.into_iter().flatten().collect()
}

fn install(rules: impl IntoIterator<Item = Rule>) -> Divert {
    Divert::builder().rules(rules).install().unwrap()
}

fn out() -> Rule {
    Rule::new(Hook::Output)
}

fn udp_out() -> Rule {
    out().protocol(Protocol::Udp)
}

/// How many packets each rule has matched.
fn counts(divert: &Divert) -> Vec<u64> {
    divert.counters().unwrap().iter().map(|counter| counter.packets).collect()
}

/// How many packets of `traffic` meet a condition, and how many do not, of those that also meet the
/// conditions of `rule`.
fn matched(rule: Rule, condition: Match, traffic: impl FnOnce()) -> (u64, u64) {
    let divert = install([rule.clone().when(condition.clone()).count(), rule.unless(condition).count()]);
    traffic();
    let counts = counts(&divert);
    (counts[0], counts[1])
}

/// Sends a datagram from a port to a port of this host.
fn datagram(from: impl Into<IpAddr>, to: &UdpSocket) {
    udp((from.into(), 0)).send_to(b"x", to.local_addr().unwrap()).unwrap();
}

fn receiver(address: impl Into<IpAddr>) -> UdpSocket {
    udp((address.into(), 0))
}

/// Opens a TCP connection to this host: SYN, SYN with ACK, ACK.
fn connect() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let client = TcpStream::connect_timeout(&listener.local_addr().unwrap(), PATIENCE).unwrap();
    (client, listener.accept().unwrap().0)
}

fn port(socket: &UdpSocket) -> u16 {
    socket.local_addr().unwrap().port()
}

/// Sends UDP datagrams to these ports, 192.0.2.1 to 192.0.2.2, across a bridge.
fn send_over(bridge: &Bridge, ports: &[u16]) {
    let [from, to] = &bridge.ends;
    for port in ports {
        let builder = PacketBuilder::ethernet2(from.socket.address(), to.socket.address());
        let mut bytes = Vec::new();
        builder.ipv4([192, 0, 2, 1], [192, 0, 2, 2], 64).udp(9, *port).write(&mut bytes, b"x").unwrap();
        from.socket.send(&Frame { tag: None, bytes });
    }
}
