//! The tools of the tests: namespaces, pairs of interfaces, time limits.

use std::{fs, net::Ipv4Addr, panic, thread, time::Duration};

use crate::support::{self, Namespace, RawQueue, VethOptions, isolated, udp, udp_marked, wait_until};

tests![
    sync threads_inherit_the_namespace,
    both runtime_threads_are_in_the_namespace,
    sync panics_are_propagated,
    sync pairs_of_interfaces_carry_traffic,
    sync links_go_down_and_up,
    sync queues_are_listed,
    sync raw_packets_are_delivered,
];

fn namespace() -> String {
    fs::read_link("/proc/thread-self/ns/net").unwrap().display().to_string()
}

fn threads_inherit_the_namespace() {
    let here = namespace();
    assert_ne!(here, fs::read_link("/proc/self/ns/net").unwrap().display().to_string());
    assert_eq!(thread::spawn(namespace).join().unwrap(), here);
    let other = Namespace::new();
    let there = other.run(namespace);
    assert_ne!(there, here);
    assert_eq!(other.spawn(namespace).join().unwrap(), there);
    assert_ne!(isolated(namespace), here);
    assert_eq!(namespace(), here);
}

async fn runtime_threads_are_in_the_namespace() {
    let here = namespace();
    // `block_on` runs on the test's own thread; workers and blocking threads are others.
    assert_eq!(tokio::spawn(async { namespace() }).await.unwrap(), here);
    assert_eq!(tokio::task::spawn_blocking(namespace).await.unwrap(), here);
    tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    tokio::time::sleep(Duration::from_millis(1)).await;
}

fn panics_are_propagated() {
    // Unlike `panic!`, this one prints nothing.
    let caught = panic::catch_unwind(|| isolated(|| panic::resume_unwind(Box::new("it was I"))));
    assert_eq!(caught.unwrap_err().downcast_ref(), Some(&"it was I"));
}

fn pairs_of_interfaces_carry_traffic() {
    for (index, offloads) in [(1, true), (2, false)] {
        let peer = support::veth_with(&VethOptions { index, mtu: 9000, offloads });
        assert!(support::ping(peer.far_v4.into(), Duration::from_secs(10)));
        assert!(support::ping(peer.far_v6.into(), Duration::from_secs(10)));
        peer.route_through_near();
        // The peer has a route back to every address on this side.
        assert!(peer.run(|| support::ping(peer.near_v4.into(), Duration::from_secs(10))));

        let (from, to) = (udp((peer.near_v4, 0)), peer.run(|| udp((peer.far_v4, 0))));
        assert_eq!(from.send_to(&[7; 8900], to.local_addr().unwrap()).unwrap(), 8900);
        assert_eq!(to.recv(&mut [0; 9000]).unwrap(), 8900);
        support::set_mtu(&peer.near, 1400);
        rustix::net::sockopt::set_ip_mtu_discover(&from, rustix::net::sockopt::Ipv4PathMtuDiscovery::DO).unwrap();
        let error = from.send_to(&[7; 8900], to.local_addr().unwrap()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::MSGSIZE.raw_os_error()));
    }
}

fn links_go_down_and_up() {
    let peer = support::veth();
    support::link_down(&peer.near);
    assert!(!support::link_flags(&peer.near).contains(nix::net::if_::InterfaceFlags::IFF_UP));
    support::link_up(&peer.near);
    wait_until("the peer replies again", || support::ping(peer.far_v4.into(), Duration::from_millis(100)));
}

fn queues_are_listed() {
    assert_eq!(support::queue_line(5), None);
    let (first, second) = (RawQueue::bind(5).unwrap(), RawQueue::bind(6).unwrap());
    let lines = [5, 6].map(|queue| support::queue_line(queue).unwrap());
    assert_eq!((lines[0][0], lines[0][2..7].to_vec()), (5, vec![0, 2, 65531, 0, 0]));
    assert_ne!(lines[0][1], lines[1][1], "the sockets have different addresses");
    assert!(RawQueue::bind(5).is_err());
    support::drop_now(first);
    assert_eq!(support::queue_line(5), None);
    drop(second);
}

fn raw_packets_are_delivered() {
    let to = udp_marked("127.0.0.1:0", 3);
    let port = to.local_addr().unwrap().port().to_be_bytes();
    // IPv4 header, then UDP without a checksum.
    let packet = [
        &[0x45, 0, 0, 30, 0, 0, 0, 0, 64, 17, 0, 0, 127, 0, 0, 1, 127, 0, 0, 1][..],
        &[0x10, 0, port[0], port[1], 0, 10, 0, 0],
        b"hi",
    ]
    .concat();
    support::send_raw_ipv4(&support::raw_ipv4(), &packet, Ipv4Addr::LOCALHOST).unwrap();
    let mut buffer = [0; 10];
    let (length, from) = to.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from.port()), (&b"hi"[..], 0x1000));
}
