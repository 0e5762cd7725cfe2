//! A verdict that accepts a connection at one place holds at the later ones.

use tokio_nfqueue::{Hook, Protocol, Rule};

use super::{
    bind, confirm, queue_is_empty,
    replies::bridging,
    segments::{SYN, SYN_ACK, tcp},
    table,
};
use crate::{common::next, support};

tests![
    one an_accept_of_a_bridged_connection_holds_at_a_later_place,
    one an_accept_holds_when_the_sender_has_closed_its_socket,
];

/// Its packets come to `Postrouting` without the interface by which they have come.
async fn an_accept_of_a_bridged_connection_holds_at_a_later_place() {
    let Some(bridging) = bridging() else { return };
    let later = || Rule::new(Hook::Postrouting).protocol(Protocol::Udp).destination_port(9).drop();
    for (rules, port) in [vec![tcp()], vec![tcp(), later()]].into_iter().zip(40_000..) {
        let mut queue = bind();
        let divert = table(rules).install().unwrap();
        bridging.segment(0, port, SYN, (1000, 0));
        confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
        bridging.segment(1, port, SYN_ACK, (5000, 1001));
        assert_eq!([0, 1].map(|end| bridging.arrived(end)), [1, 1]);
        queue_is_empty(&mut queue);
        divert.close().unwrap();
    }
}

async fn an_accept_holds_when_the_sender_has_closed_its_socket() {
    let peer = support::veth();
    let server = peer.run(|| support::udp((peer.far_v4, 7000)));
    for later in [false, true] {
        let mut queue = bind();
        let mut rules = vec![Rule::new(Hook::Output).protocol(Protocol::Udp).destination_port(7000).to_queue(0)];
        if later {
            rules.push(Rule::new(Hook::Postrouting).protocol(Protocol::Udp).destination_port(9).drop());
        }
        let divert = table(rules).install().unwrap();
        let socket = support::udp((peer.near_v4, 0));
        let address = socket.local_addr().unwrap();
        socket.send_to(b"a", (peer.far_v4, 7000)).unwrap();
        let packet = next(&mut queue).await;
        drop(socket);
        confirm(packet.accept().for_flow()).await.unwrap();
        support::udp(address).send_to(b"b", (peer.far_v4, 7000)).unwrap();
        for expected in [b"a", b"b"] {
            let mut data = [0; 9];
            let (length, _) = server.recv_from(&mut data).unwrap();
            assert_eq!(&data[..length], expected);
        }
        queue_is_empty(&mut queue);
        divert.close().unwrap();
    }
}
