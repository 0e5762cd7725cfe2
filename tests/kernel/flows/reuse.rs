//! A verdict for a connection does not hold for another connection on the same addresses and ports.

use tokio_nfqueue::{Packet, Queue, Verdict};

use super::{
    bind, confirm, queue_is_empty,
    segments::{ACK, Hosts, RST, RST_ACK, SYN, SYN_ACK, accept_in_the_middle, opened, pass_segment, queued, tcp},
    table,
};

tests![
    one a_connection_on_reused_ports_inherits_no_accept,
    one a_syn_never_takes_the_shortcut,
    one a_verdict_for_the_old_connection_does_not_accept_the_new_one,
    one a_connection_on_reused_ports_can_be_accepted,
    one of_two_syns_the_later_verdict_holds_if_it_sets_a_priority,
    one an_older_packet_does_not_accept_a_connection_whose_entry_is_gone,
    one a_connection_in_the_middle_is_accepted_by_its_second_packet,
    one a_denied_connection_stays_denied_after_a_reset_and_a_syn,
    one a_denied_connection_stays_denied_when_its_entry_is_gone,
    one a_denied_connection_stays_denied_for_packets_that_conntrack_calls_invalid,
];

/// A connection that is accepted by its first packet, and used.
async fn accepted(hosts: &Hosts, queue: &mut Queue) {
    hosts.client(SYN, (1000, 0), b"");
    confirm(queued(queue, SYN).await.accept().for_flow()).await.unwrap();
    hosts.server(SYN_ACK, (5000, 1001), b"");
    hosts.client(ACK, (1001, 5001), b"");
    hosts.client(ACK, (1001, 5001), b"request");
    hosts.server(ACK, (5001, 1008), b"response");
    assert_eq!(hosts.arrived(), [3, 2]);
    queue_is_empty(queue);
}

/// How the firewall sees the end of the old connection.
const ENDS: [Option<u8>; 3] = [None, Some(RST), Some(RST_ACK)];

async fn a_connection_on_reused_ports_inherits_no_accept() {
    let hosts = Hosts::new();
    for end in ENDS {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([tcp()]).install().unwrap();
        accepted(&hosts, &mut queue).await;
        if let Some(flags) = end {
            hosts.server(flags, (5009, 1008), b"");
            assert_eq!(hosts.arrived(), [0, 1]);
        }
        // The next connection is accepted packet by packet.
        hosts.client(SYN, (90_000, 0), b"");
        pass_segment(&mut queue, SYN).await;
        hosts.server(SYN_ACK, (70_000, 90_001), b"");
        pass_segment(&mut queue, SYN_ACK).await;
        hosts.client(ACK, (90_001, 70_001), b"");
        pass_segment(&mut queue, ACK).await;
        hosts.client(ACK, (90_001, 70_001), b"request");
        confirm(queued(&mut queue, ACK).await.drop()).await.unwrap();
        assert_eq!(hosts.arrived(), [2, 1], "{end:?}");
        divert.close().unwrap();
    }
}

async fn a_syn_never_takes_the_shortcut() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    accepted(&hosts, &mut queue).await;
    // From either side, with any other flags and data.
    hosts.client(SYN, (90_000, 0), b"data");
    confirm(queued(&mut queue, SYN).await.drop()).await.unwrap();
    hosts.server(SYN, (90_000, 0), b"");
    confirm(queued(&mut queue, SYN).await.drop()).await.unwrap();
    assert_eq!(hosts.arrived(), [0, 0]);
    // A connection of which only the client's packets are seen.
    hosts.another_port();
    hosts.client(SYN, (1000, 0), b"");
    confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
    for _ in 0..2 {
        hosts.client(SYN, (1000, 0), b"");
        pass_segment(&mut queue, SYN).await;
    }
    assert_eq!(hosts.arrived(), [3, 0]);
}

/// Packets of both connections wait at once.
async fn a_verdict_for_the_old_connection_does_not_accept_the_new_one() {
    let hosts = Hosts::new();
    for new_first in [true, false] {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([tcp()]).install().unwrap();
        opened(&hosts, &mut queue).await;
        hosts.client(ACK, (1001, 5001), b"request");
        let old = queued(&mut queue, ACK).await;
        hosts.server(RST, (5001, 0), b"");
        pass_segment(&mut queue, RST).await;
        hosts.client(SYN, (90_000, 0), b"");
        let new = queued(&mut queue, SYN).await;
        if new_first {
            confirm(new.accept()).await.unwrap();
            confirm(old.accept().for_flow()).await.unwrap();
        } else {
            confirm(old.accept().for_flow()).await.unwrap();
            confirm(new.accept()).await.unwrap();
        }
        assert_eq!(hosts.arrived(), [2, 1]);
        hosts.server(SYN_ACK, (70_000, 90_001), b"");
        pass_segment(&mut queue, SYN_ACK).await;
        hosts.client(ACK, (90_001, 70_001), b"request");
        confirm(queued(&mut queue, ACK).await.drop()).await.unwrap();
        assert_eq!(hosts.arrived(), [0, 1], "{new_first}");
        divert.close().unwrap();
    }
}

async fn a_connection_on_reused_ports_can_be_accepted() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    accepted(&hosts, &mut queue).await;
    let mut end = (5009, 1008);
    for round in 1..4 {
        hosts.server(RST_ACK, end, b"");
        end = (70_001, 90_000 * round + 8);
        hosts.client(SYN, (90_000 * round, 0), b"");
        confirm(queued(&mut queue, SYN).await.accept().for_flow()).await.unwrap();
        hosts.server(SYN_ACK, (70_000, 90_000 * round + 1), b"");
        hosts.client(ACK, (90_000 * round + 1, 70_001), b"request");
        assert_eq!(hosts.arrived(), [2, 2]);
        queue_is_empty(&mut queue);
    }
}

/// Of the two connections, the one that was accepted alone inherits nothing.
async fn of_two_syns_the_later_verdict_holds_if_it_sets_a_priority() {
    let hosts = Hosts::new();
    for (priority, answered) in
        [(0, false), (5, false), (0x00ff_ffff, false), (0x0100_0001, false), (0, true), (0x00ff_ffff, true)]
    {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([tcp()]).install().unwrap();
        opened(&hosts, &mut queue).await;
        hosts.client(SYN, (20_000, 0), b"");
        let for_flow = queued(&mut queue, SYN).await;
        hosts.client(SYN, (30_000, 0), b"");
        let alone = queued(&mut queue, SYN).await;
        confirm(for_flow.accept().for_flow()).await.unwrap();
        if answered {
            hosts.server(SYN_ACK, (50_000, 20_001), b"");
        }
        confirm(alone.accept().priority(priority)).await.unwrap();
        assert_eq!(hosts.arrived(), [2, u64::from(answered)]);
        hosts.server(SYN_ACK, (50_000, 30_001), b"");
        assert_eq!(hosts.arrived(), [0, 0], "{priority:#x} {answered}: the answer has passed");
        confirm(queued(&mut queue, SYN_ACK).await.accept()).await.unwrap();
        hosts.client(ACK, (30_001, 50_001), b"request");
        confirm(queued(&mut queue, ACK).await.drop()).await.unwrap();
        assert_eq!(hosts.arrived(), [0, 1]);
        divert.close().unwrap();
    }
}

/// The client resets: conntrack believes it, although the segment is dropped.
async fn a_denied_connection_stays_denied_after_a_reset_and_a_syn() {
    type Deny = fn(Packet) -> Verdict;
    let hosts = Hosts::new();
    // A rejected segment with data is answered with a reset.
    let cases: [(Deny, [u64; 2]); 2] = [(|packet| packet.drop(), [0, 0]), (|packet| packet.reject(), [3, 4])];
    for (deny, resets) in cases {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([tcp()]).install().unwrap();
        opened(&hosts, &mut queue).await;
        hosts.client(ACK, (1001, 5001), b"bad");
        confirm(deny(queued(&mut queue, ACK).await).for_flow()).await.unwrap();
        hosts.arrived();
        hosts.client(RST, (1001, 0), b"");
        hosts.client(SYN, (1001, 0), b"");
        for _ in 0..3 {
            hosts.client(ACK, (1001, 5001), b"bad");
            hosts.server(ACK, (5001, 1001), b"data");
        }
        assert_eq!(hosts.arrived(), resets);
        queue_is_empty(&mut queue);
        divert.close().unwrap();
    }
}

async fn a_denied_connection_stays_denied_when_its_entry_is_gone() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    std::fs::write("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close", "1").unwrap();
    opened(&hosts, &mut queue).await;
    hosts.client(ACK, (1001, 5001), b"bad");
    confirm(queued(&mut queue, ACK).await.drop().for_flow()).await.unwrap();
    hosts.client(RST, (1001, 0), b"");
    // If this is too short, less is tested.
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    hosts.server(ACK, (5001, 1001), b"data");
    hosts.client(ACK, (1001, 5001), b"bad");
    hosts.server(ACK, (5001, 1001), b"data");
    assert_eq!(hosts.arrived(), [0, 0]);
    queue_is_empty(&mut queue);
}

/// Far outside of the window.
async fn a_denied_connection_stays_denied_for_packets_that_conntrack_calls_invalid() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    opened(&hosts, &mut queue).await;
    hosts.client(ACK, (1001, 5001), b"bad");
    confirm(queued(&mut queue, ACK).await.drop().for_flow()).await.unwrap();
    hosts.client(ACK, (0x7000_0000, 0x7000_0000), b"bad");
    hosts.server(ACK, (0x7000_0000, 0x7000_0000), b"data");
    assert_eq!(hosts.arrived(), [0, 0]);
    queue_is_empty(&mut queue);
}

/// A packet of an older connection waits while the client's SYN passes and the server refuses it:
/// connection tracking then has no entry.
async fn an_older_packet_does_not_accept_a_connection_whose_entry_is_gone() {
    let hosts = Hosts::new();
    for again in [false, true] {
        hosts.another_port();
        let mut queue = bind();
        let divert = table([tcp()]).install().unwrap();
        hosts.client(ACK, (901, 801), b"older");
        let older = queued(&mut queue, ACK).await;
        hosts.client(SYN, (1000, 0), b"");
        pass_segment(&mut queue, SYN).await;
        let mut waits = None;
        if again {
            hosts.client(SYN, (1000, 0), b"");
            waits = Some(queued(&mut queue, SYN).await);
        }
        // Connection tracking removes the entry before the verdict.
        hosts.server(RST_ACK, (0, 1001), b"");
        confirm(queued(&mut queue, RST_ACK).await.drop()).await.unwrap();
        confirm(older.accept().for_flow()).await.unwrap();
        if let Some(syn) = waits {
            confirm(syn.accept()).await.unwrap();
        }
        hosts.server(SYN_ACK, (5000, 1001), b"");
        pass_segment(&mut queue, SYN_ACK).await;
        hosts.client(ACK, (1001, 5001), b"");
        pass_segment(&mut queue, ACK).await;
        hosts.client(ACK, (1001, 5001), b"request");
        pass_segment(&mut queue, ACK).await;
        assert_eq!(hosts.arrived(), [4 + u64::from(again), 1]);
        divert.close().unwrap();
    }
}

/// Connection tracking has not seen the beginning.
async fn a_connection_in_the_middle_is_accepted_by_its_second_packet() {
    let hosts = Hosts::new();
    let mut queue = bind();
    let _divert = table([tcp()]).install().unwrap();
    accept_in_the_middle(&mut queue, || hosts.client(ACK, (1001, 5001), b"request")).await;
    hosts.client(ACK, (1008, 5001), b"request");
    hosts.server(ACK, (5001, 1015), b"response");
    queue_is_empty(&mut queue);
    assert_eq!(hosts.arrived(), [3, 1]);
}
