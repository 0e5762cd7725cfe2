//! Late packets of an older connection, for which connection tracking has no entry any more: it
//! counts them to the newer connection with the same addresses and ports.

use std::fs;

use tokio_nfqueue::{Protocol, Queue, divert::FlowTuple};

use super::{
    attack_more::{COOKIE_ACK, COOKIE_ECHO, INIT, INIT_ACK, SCTP, initiation, sctp},
    bind, come, confirm, pass, queue_is_empty,
    segments::{ACK, FIN, Hosts, RST, RST_ACK, SYN, SYN_ACK, forwarded, opened, pass_segment, queued, tcp},
    table,
};
use crate::common::{lose_connections, next};

tests![
    one a_late_packet_of_an_older_connection_accepts_no_newer_one,
    one a_late_packet_of_an_older_client_accepts_no_newer_connection,
    one an_old_heartbeat_accepts_no_newer_association,
    one each_of_the_first_packets_accepts_its_connection,
    one forgetting_keeps_that_a_syn_has_begun_a_connection,
    one a_heartbeat_takes_the_entry_of_an_accepted_association,
];

/// How the entry of the older connection ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Reset,
    Closed,
    Lost,
}

impl End {
    /// Of a connection of which nothing but the handshake has been sent.
    async fn comes(self, hosts: &Hosts, queue: &mut Queue) {
        match self {
            Self::Reset => {
                hosts.client(RST, (1001, 0), b"");
                pass_segment(queue, RST).await;
            }
            Self::Closed => {
                hosts.client(FIN | ACK, (1001, 5001), b"");
                pass(queue).await;
                hosts.server(FIN | ACK, (5001, 1002), b"");
                pass(queue).await;
                hosts.client(ACK, (1002, 5002), b"");
                pass(queue).await;
            }
            Self::Lost => lose_connections(),
        }
    }
}

async fn a_late_packet_of_an_older_connection_accepts_no_newer_one() {
    let hosts = Hosts::new();
    for end in [End::Reset, End::Closed, End::Lost] {
        for late in [ACK, RST_ACK] {
            hosts.another_port();
            let mut queue = bind();
            let divert = table([tcp()]).install().unwrap();
            opened(&hosts, &mut queue).await;
            end.comes(&hosts, &mut queue).await;
            hosts.client(SYN, (90_000, 0), b"");
            pass_segment(&mut queue, SYN).await;
            hosts.server(late, (5002, 1002), b"");
            confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
            // Conntrack may have taken the reset for the end of the new connection.
            hosts.client(SYN, (90_000, 0), b"");
            pass_segment(&mut queue, SYN).await;
            hosts.server(SYN_ACK, (70_000, 90_001), b"");
            pass_segment(&mut queue, SYN_ACK).await;
            hosts.client(ACK, (90_001, 70_001), b"new");
            pass_segment(&mut queue, ACK).await;
            hosts.arrived();
            divert.close().unwrap();
        }
    }
}

/// Between the server's answer and the third packet.
async fn a_late_packet_of_an_older_client_accepts_no_newer_connection() {
    let hosts = Hosts::new();
    for end in [End::Reset, End::Closed, End::Lost] {
        for late in [ACK, FIN | ACK] {
            hosts.another_port();
            let mut queue = bind();
            let divert = table([tcp()]).install().unwrap();
            opened(&hosts, &mut queue).await;
            end.comes(&hosts, &mut queue).await;
            hosts.client(SYN, (90_000, 0), b"");
            pass_segment(&mut queue, SYN).await;
            hosts.server(SYN_ACK, (70_000, 90_001), b"");
            pass_segment(&mut queue, SYN_ACK).await;
            hosts.client(late, (1001, 5001), b"");
            confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
            hosts.client(ACK, (90_001, 70_001), b"");
            pass_segment(&mut queue, ACK).await;
            hosts.server(ACK, (70_001, 90_001), b"new");
            pass_segment(&mut queue, ACK).await;
            hosts.arrived();
            divert.close().unwrap();
        }
    }
}

/// It is not compared with the verification tags of the association.
async fn an_old_heartbeat_accepts_no_newer_association() {
    let hosts = sctp_hosts();
    for of_client in [true, false] {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([forwarded(Protocol::Other(SCTP)).to_queue(0)]).install().unwrap();
        let (mine, yours) = (0x1111, 0x2222);
        sctp(&hosts, true, 0, INIT, &initiation(mine));
        pass(&mut queue).await;
        sctp(&hosts, of_client, 0x5555, HEARTBEAT, &[0; 8]);
        if let Some(late) = come(&mut queue).await {
            confirm(late.accept().for_flow()).await.unwrap();
        }
        sctp(&hosts, false, mine, INIT_ACK, &initiation(yours));
        pass(&mut queue).await;
        divert.close().unwrap();
    }
}

async fn each_of_the_first_packets_accepts_its_connection() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    let segments = [
        (true, SYN, (1000, 0)),
        (false, SYN_ACK, (5000, 1001)),
        (true, ACK, (1001, 5001)),
        (false, ACK, (5001, 1001)),
        (true, ACK, (1001, 5001)),
    ];
    for accepted_by in 0..segments.len() {
        hosts.another_port();
        for (index, (of_client, flags, numbers)) in segments.into_iter().enumerate() {
            if of_client {
                hosts.client(flags, numbers, b"");
            } else {
                hosts.server(flags, numbers, b"");
            }
            if index <= accepted_by {
                let packet = next(&mut queue).await;
                let verdict = if index == accepted_by { packet.accept().for_flow() } else { packet.accept() };
                confirm(verdict).await.unwrap();
            } else {
                queue_is_empty(&mut queue);
            }
        }
    }
}

/// By either call, between the SYN and its answer.
async fn forgetting_keeps_that_a_syn_has_begun_a_connection() {
    let hosts = Hosts::new();
    for all in [false, true] {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([tcp()]).install().unwrap();
        opened(&hosts, &mut queue).await;
        hosts.client(ACK, (1001, 5001), b"old");
        let old = queued(&mut queue, ACK).await;
        hosts.client(SYN, (90_000, 0), b"");
        confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
        let [client, server] = hosts.addresses();
        if all {
            divert.forget_flows().unwrap();
        } else {
            assert!(divert.forget_flow(FlowTuple::tcp(client, server)).unwrap());
        }
        confirm(old.accept().for_flow()).await.unwrap();
        hosts.server(SYN_ACK, (70_000, 90_001), b"");
        pass_segment(&mut queue, SYN_ACK).await;
        hosts.arrived();
        divert.close().unwrap();
    }
}

/// A limit, which the guide names: an association begins on a further path with a heartbeat, and
/// conntrack takes over its tags.
async fn a_heartbeat_takes_the_entry_of_an_accepted_association() {
    let hosts = sctp_hosts();
    // Three seconds otherwise.
    fs::write("/proc/sys/net/netfilter/nf_conntrack_sctp_timeout_cookie_wait", "60").unwrap();
    let mut queue = bind();
    let _divert = table([forwarded(Protocol::Other(SCTP)).to_queue(0)]).install().unwrap();
    let (mine, yours) = (0x1111, 0x2222);
    sctp(&hosts, true, 0, INIT, &initiation(mine));
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    sctp(&hosts, false, mine, INIT_ACK, &initiation(yours));
    sctp(&hosts, true, yours, COOKIE_ECHO, b"cook");
    sctp(&hosts, false, mine, COOKIE_ACK, b"");
    queue_is_empty(&mut queue);
    // Of another association.
    sctp(&hosts, true, 0x8888, DATA, &[0; 16]);
    pass(&mut queue).await;
    sctp(&hosts, true, 0x8888, HEARTBEAT, &[0; 8]);
    sctp(&hosts, false, 0x7777, HEARTBEAT_ACK, &[0; 8]);
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [4, 3]);
}

/// Their SCTP has no checksums.
fn sctp_hosts() -> Hosts {
    let hosts = Hosts::new();
    fs::write("/proc/sys/net/netfilter/nf_conntrack_checksum", "0").unwrap();
    hosts
}

const DATA: u8 = 0;
const HEARTBEAT: u8 = 4;
const HEARTBEAT_ACK: u8 = 5;
