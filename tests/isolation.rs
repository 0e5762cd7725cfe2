//! The tests' own tools: namespaces, pairs of interfaces, deadlines.

#[path = "support/mod.rs"]
mod support;

use std::{fs, net::Ipv4Addr, panic, process::ExitCode, thread, time::Duration};

use support::{Namespace, RawQueue, VethOptions, isolated, test, test_multi, test_sync, udp, udp_marked, wait_until};

fn main() -> ExitCode {
    support::run(vec![
        test_sync("threads inherit the namespace", inherited),
        test("a runtime of one thread", runtime),
        test_multi("a runtime of two", runtime),
        test_sync("panics come through", panics),
        test_sync("pairs of interfaces", pairs),
        test_sync("links go down and up", links),
        test_sync("queues are listed", listed),
        test_sync("raw packets", raw),
    ])
}

fn namespace() -> String {
    fs::read_link("/proc/thread-self/ns/net").unwrap().display().to_string()
}

fn inherited() {
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

async fn runtime() {
    let here = namespace();
    // `block_on` runs on the test's own thread; workers and blocking threads are others.
    assert_eq!(tokio::spawn(async { namespace() }).await.unwrap(), here);
    assert_eq!(tokio::task::spawn_blocking(namespace).await.unwrap(), here);
    tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    tokio::time::sleep(Duration::from_millis(1)).await;
}

fn panics() {
    // Unlike `panic!`, this one prints nothing.
    let caught = panic::catch_unwind(|| isolated(|| panic::resume_unwind(Box::new("it was I"))));
    assert_eq!(caught.unwrap_err().downcast_ref(), Some(&"it was I"));
}

fn pairs() {
    for (index, offloads) in [(1, true), (2, false)] {
        let peer = support::veth_with(&VethOptions { index, mtu: 9000, offloads });
        assert!(support::ping(peer.far_v4.into(), Duration::from_secs(10)));
        assert!(support::ping(peer.far_v6.into(), Duration::from_secs(10)));
        peer.route_through_near();
        // There is a route back from anywhere on this side.
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

fn links() {
    let peer = support::veth();
    support::link_down(&peer.near);
    assert!(!support::link_flags(&peer.near).contains(nix::net::if_::InterfaceFlags::IFF_UP));
    support::link_up(&peer.near);
    wait_until("the peer answers again", || support::ping(peer.far_v4.into(), Duration::from_millis(100)));
}

fn listed() {
    assert_eq!(support::queue_line(5), None);
    let (first, second) = (RawQueue::bind(5).unwrap(), RawQueue::bind(6).unwrap());
    let lines = [5, 6].map(|queue| support::queue_line(queue).unwrap());
    assert_eq!((lines[0][0], lines[0][2..7].to_vec()), (5, vec![0, 2, 65531, 0, 0]));
    assert_ne!(lines[0][1], lines[1][1], "the sockets have different addresses");
    assert!(RawQueue::bind(5).is_err());
    drop(first);
    assert_eq!(support::queue_line(5), None);
    drop(second);
}

fn raw() {
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
