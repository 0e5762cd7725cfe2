//! The metadata of packets.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::{Duration, SystemTime},
};

use nix::{
    mount::{MsFlags, mount},
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
    sys::socket::{setsockopt, sockopt},
};
use tokio_nfqueue::{Family, Packet, Queue, QueueBuilder};

use crate::{
    common::{self, Hook, Protocol, Rule, Traffic, divert, hold, next, soon, start},
    support,
};

tests![
    one each_hook_reports_its_interfaces,
    one a_forwarded_packet_has_two_interfaces,
    one ipv6_metadata_is_reported,
    one the_mark_of_the_sender_is_reported,
    one a_timestamp_is_reported_if_the_kernel_took_one,
    one user_and_group_ids_are_reported_on_request,
    one user_and_group_at_input_are_those_of_the_receiver,
    one the_class_of_a_control_group_is_reported,
    one a_short_copy_range_truncates,
    one metadata_mode_has_no_payload,
    one unfinished_checksums_are_reported,
    one a_payload_outlives_its_packet,
    both sent_super_packets_are_not_segmented,
    both received_super_packets_are_not_segmented,
    one super_packets_are_reported_on_loopback,
    both without_gso_no_packet_is_longer_than_the_mtu,
];

fn index(name: &str) -> u32 {
    if_nametoindex(name).unwrap()
}

async fn each_hook_reports_its_interfaces() {
    let hooks = [Hook::Output, Hook::Postrouting, Hook::Prerouting, Hook::Input];
    let mut queues: Vec<Queue> = (0..4).map(|number| common::bind_now(Queue::builder(number))).collect();
    let rule = |(number, hook)| Rule::new(hook).protocol(Protocol::Udp).to_queue(number);
    let _divert = divert((0..).zip(hooks).map(rule));
    let traffic = Traffic::new(1);
    traffic.send([7]);
    let lo = index("lo");
    for (number, (queue, hook)) in (0..).zip(queues.iter_mut().zip(hooks)) {
        let packet = next(queue).await;
        assert_eq!((packet.hook(), packet.family(), packet.hw_protocol()), (hook, Family::Ipv4, 0x0800));
        assert_eq!((common::number(&packet), packet.id().get(), packet.queue_number()), (7, 1, number));
        let local = Ipv4Addr::LOCALHOST.into();
        assert_eq!(packet.addresses(), Some((local, local)));
        assert_eq!((packet.mark(), packet.uid(), packet.gid()), (0, None, None));
        assert_eq!((packet.original_len(), packet.is_truncated(), packet.is_gso()), (Some(32), false, false));
        let arrived = matches!(hook, Hook::Prerouting | Hook::Input);
        let expected = if arrived { (Some(lo), None) } else { (None, Some(lo)) };
        assert_eq!((packet.interface_in(), packet.interface_out()), expected, "{hook:?}");
        assert_eq!(packet.interface_name(lo).unwrap(), "lo");
        assert!(packet.interface_name(0x7fff_ffff).is_err());
        packet.accept().submit().unwrap();
    }
    traffic.expect([7]).await;
}

async fn a_forwarded_packet_has_two_interfaces() {
    let from = support::veth();
    let to = support::veth_with(&support::VethOptions { index: 1, ..Default::default() });
    support::forwarding();
    from.route_through_near();
    to.route_through_near();
    let mut queue = Queue::builder(0).bind().await.unwrap();
    let _divert = divert([Rule::new(Hook::Forward).protocol(Protocol::Udp).to_queue(0)]);
    let receiver = to.run(|| support::udp((to.far_v4, 9000)));
    let sender = from.run(|| support::udp((from.far_v4, 0)));
    sender.send_to(&[1, 2, 3, 4], (to.far_v4, 9000)).unwrap();
    let packet = next(&mut queue).await;
    assert_eq!(packet.hook(), Hook::Forward);
    assert_eq!(packet.interface_in(), Some(index(&from.near)));
    assert_eq!(packet.interface_out(), Some(index(&to.near)));
    assert_eq!(packet.interface_name(packet.interface_out().unwrap()).unwrap(), to.near);
    assert_eq!((packet.physical_in(), packet.physical_out()), (None, None));
    assert_eq!(packet.addresses(), Some((from.far_v4.into(), to.far_v4.into())));
    // Ethernet, and not all zeros.
    assert!(matches!(packet.hardware_address(), Some(address) if address.len() == 6 && address != [0; 6]));
    packet.accept().submit().unwrap();
    queue.sink().flush().await;
    assert_eq!(receiver.recv(&mut [0; 8]).unwrap(), 4);
}

async fn ipv6_metadata_is_reported() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let receiver = support::udp("[::1]:9000");
    receiver.send_to(b"it", "[::1]:9000").unwrap();
    let packet = next(&mut queue).await;
    assert_eq!((packet.hook(), packet.family(), packet.hw_protocol()), (Hook::Input, Family::Ipv6, 0x86dd));
    let local = Ipv6Addr::LOCALHOST.into();
    assert_eq!(packet.addresses(), Some((local, local)));
    assert_eq!(packet.original_len(), Some(50));
    packet.accept().submit().unwrap();
}

async fn the_mark_of_the_sender_is_reported() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(1);
    support::set_mark(&traffic.sender, 0xdead_beef);
    let packet = hold(&mut queue, &traffic, [0]).await.remove(0);
    assert_eq!(packet.mark(), 0xdead_beef);
    assert!(packet.has_mark(0x0000_00ef, 0xff) && !packet.has_mark(0x10, 0xff));
    assert_eq!(packet.mark_with(0x1200, 0xff00), 0xdead_12ef);
    // NFQA_MARK
    assert_eq!(packet.attribute(3), Some(&0xdead_beef_u32.to_be_bytes()[..]));
    assert!(packet.attributes().any(|(number, value)| number == 3 && value == 0xdead_beef_u32.to_be_bytes()));
    assert_eq!(packet.attribute(999), None);
}

async fn a_timestamp_is_reported_if_the_kernel_took_one() {
    const TOLERANCE: Duration = Duration::from_secs(3600);
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(1);
    // The kernel takes timestamps while a socket requests them, and starts with a delay.
    let socket = support::udp("127.0.0.1:0");
    setsockopt(&socket, sockopt::ReceiveTimestamp, &true).unwrap();
    let stamped = async {
        loop {
            let packet = hold(&mut queue, &traffic, [0]).await.remove(0);
            if let Some(time) = packet.timestamp() {
                return time;
            }
        }
    };
    let time = soon("a packet with a time stamp", stamped).await;
    let now = SystemTime::now();
    assert!(time > now - TOLERANCE && time < now + TOLERANCE, "{time:?} is not about {now:?}");
}

async fn user_and_group_ids_are_reported_on_request() {
    for on in [true, false] {
        let mut queue = Queue::builder(0).uid_gid(on).bind().await.unwrap();
        let _divert = divert([Rule::new(Hook::Output).protocol(Protocol::Udp).to_queue(0)]);
        let traffic = Traffic::new(1);
        let packet = hold(&mut queue, &traffic, [0]).await.remove(0);
        // The kernel sends the ids of the initial user namespace.
        let expected = on.then(|| (common::outer_id("uid_map"), common::outer_id("gid_map")));
        assert_eq!(packet.uid().zip(packet.gid()), expected);
    }
}

/// A socket of this user and group.
fn udp_of(id: u32, address: Ipv4Addr) -> UdpSocket {
    let open = move || {
        // Of the thread alone.
        let (user, group) = (rustix::thread::Uid::from_raw(id), rustix::thread::Gid::from_raw(id));
        rustix::thread::set_thread_res_gid(group, group, group).unwrap();
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        support::udp((address, 0))
    };
    std::thread::spawn(open).join().unwrap()
}

async fn user_and_group_at_input_are_those_of_the_receiver() {
    if common::outer_id("uid_map") != 0 || !nix::unistd::geteuid().is_root() {
        return eprintln!("not tried, for there is only one user");
    }
    let peer = support::veth();
    let sender = peer.run(|| udp_of(1000, peer.far_v4));
    let receiver = udp_of(2000, peer.near_v4);
    sender.connect(receiver.local_addr().unwrap()).unwrap();
    // The kernel finds the socket of an established connection before the input hook, and an
    // unconnected one behind it.
    for (connected, expected) in [(false, None), (true, Some((2000, 2000)))] {
        if connected {
            receiver.connect(sender.local_addr().unwrap()).unwrap();
        }
        let mut queue = Queue::builder(0).uid_gid(true).bind().await.unwrap();
        let divert = divert([Rule::new(Hook::Input).protocol(Protocol::Udp).to_queue(0)]);
        sender.send(b"it").unwrap();
        let packet = next(&mut queue).await;
        assert_eq!(packet.uid().zip(packet.gid()), expected, "connected: {connected}");
        packet.accept().confirm().await.unwrap();
        queue.close().await.unwrap();
        divert.close().unwrap();
    }
    // Of a packet of this host, they are those of the sender.
    let mut queue = Queue::builder(0).uid_gid(true).bind().await.unwrap();
    let _divert = divert([Rule::new(Hook::Output).protocol(Protocol::Udp).to_queue(0)]);
    receiver.send(b"reply").unwrap();
    let packet = next(&mut queue).await;
    assert_eq!(packet.uid().zip(packet.gid()), Some((2000, 2000)));
    packet.accept().submit().unwrap();
}

async fn the_class_of_a_control_group_is_reported() {
    const CLASS: u32 = 0x0010_0002;
    let mut queue = Queue::builder(0).bind().await.unwrap();
    let _divert = divert([Rule::new(Hook::Output).protocol(Protocol::Udp).to_queue(0)]);
    let traffic = Traffic::new(2);
    let classified = match std::thread::spawn(|| classified(CLASS)).join().unwrap() {
        Ok(socket) => socket,
        Err(error) => {
            // Root on a kernel with the controller must be able to create the group.
            let possible = nix::unistd::geteuid().is_root()
                && common::outer_id("uid_map") == 0
                && fs::read_to_string("/proc/cgroups").is_ok_and(|text| text.contains("net_cls\t0"));
            assert!(!possible, "{error}");
            eprintln!("not tried, for there can be no net_cls control group: {error}");
            return;
        }
    };
    traffic.send_from(&classified, [0]);
    let class = next(&mut queue).await.cgroup_class_id();
    // Linux 6.1 does not have the attribute.
    let expected = (common::kernel_release() >= (6, 12) || class.is_some()).then_some(CLASS);
    assert_eq!(class, expected);
    traffic.send([1]);
    assert_eq!(next(&mut queue).await.cgroup_class_id(), None);
}

/// A socket of a thread in a class of the control group `net_cls`, which is mounted only for that
/// thread. The mounts of the calling thread change.
fn classified(class: u32) -> io::Result<UdpSocket> {
    const PLACE: &str = "/tmp";
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    mount(Some("net_cls"), PLACE, Some("cgroup"), MsFlags::empty(), Some("net_cls"))?;
    let group = format!("{PLACE}/nfqueue-{}", std::process::id());
    fs::create_dir(&group)?;
    fs::write(format!("{group}/net_cls.classid"), class.to_string())?;
    // Moves this thread into the group and back.
    fs::write(format!("{group}/tasks"), "0")?;
    let socket = support::udp((Ipv4Addr::LOCALHOST, 0));
    fs::write(format!("{PLACE}/tasks"), "0")?;
    fs::remove_dir(&group)?;
    Ok(socket)
}

async fn a_short_copy_range_truncates() {
    let (mut queue, _divert) = start(Queue::builder(0).copy_range(40));
    let traffic = Traffic::new(1);
    for (length, original, truncated) in [(1000, 1028, true), (13, 41, true), (12, 40, false), (4, 32, false)] {
        traffic.sender.send_to(&vec![7; length], traffic.to(0)).unwrap();
        let packet = next(&mut queue).await;
        assert_eq!(packet.payload().len(), original.min(40));
        assert_eq!((packet.original_len(), packet.is_truncated()), (Some(original), truncated));
        assert!(packet.addresses().is_some());
        packet.drop().submit().unwrap();
    }
}

async fn metadata_mode_has_no_payload() {
    let (mut queue, _divert) = start(Queue::builder(0).copy_metadata());
    let traffic = Traffic::new(1);
    traffic.send([5]);
    let packet = next(&mut queue).await;
    assert_eq!((packet.payload(), packet.original_len(), packet.is_truncated()), (&[][..], None, true));
    assert_eq!((packet.hook(), packet.hw_protocol(), packet.id().get()), (Hook::Input, 0x0800, 1));
    assert_eq!((packet.interface_in(), packet.addresses()), (Some(index("lo")), None));
    packet.accept().submit().unwrap();
    traffic.expect([5]).await;
}

async fn unfinished_checksums_are_reported() {
    // A local sender leaves the checksum to the interface. Without GSO, the kernel finishes it
    // before it queues the packet.
    for gso in [true, false] {
        let mut queue = Queue::builder(0).gso(gso).bind().await.unwrap();
        let _divert = divert([Rule::new(Hook::Output).protocol(Protocol::Udp).to_queue(0)]);
        let traffic = Traffic::new(1);
        let packet = hold(&mut queue, &traffic, [7]).await.remove(0);
        assert_eq!(packet.is_checksum_ready(), !gso);
        if !gso {
            let (ip, payload) = etherparse::IpHeaders::from_slice(packet.payload()).unwrap();
            let (udp, data) = etherparse::UdpHeader::from_slice(payload.payload).unwrap();
            assert_eq!(udp.calc_checksum_ipv4(ip.ipv4().unwrap().0, data).unwrap(), udp.checksum);
        }
        packet.accept().submit().unwrap();
        traffic.expect([7]).await;
    }
}

async fn a_payload_outlives_its_packet() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(200);
    let mut payloads = Vec::new();
    for packet in hold(&mut queue, &traffic, 0..200).await {
        payloads.push(packet.payload_bytes());
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..200).await;
    drop(queue);
    for (number, payload) in (0_u32..).zip(payloads) {
        assert!(payload.ends_with(&number.to_be_bytes()) && payload.len() == 32);
    }
}

/// Sends a megabyte over TCP through a queue; returns the results of `look` for all packets.
async fn transfer<T>(
    mut queue: Queue,
    listener: TcpListener,
    connect: impl FnOnce(SocketAddr) -> TcpStream + Send + 'static,
    look: impl Fn(&Packet) -> T,
) -> Vec<T> {
    let address = listener.local_addr().unwrap();
    let sender = std::thread::spawn(move || common::send_transfer(connect(address)));
    let receiver = common::receive_transfer(listener);
    let mut seen = Vec::new();
    let serve = async {
        loop {
            let packet = next(&mut queue).await;
            seen.push(look(&packet));
            packet.accept().submit().unwrap();
        }
    };
    tokio::select! {
        () = serve => {}
        () = common::eventually("the transfer", || receiver.is_finished()) => {}
    }
    receiver.join().unwrap();
    // The closing handshake does not matter, and may be delayed by a queue that no task reads.
    drop(queue);
    common::freed(0).await;
    sender.join().unwrap();
    seen
}

fn gso_and_length(packet: &Packet) -> (bool, usize) {
    (packet.is_gso(), packet.payload().len())
}

async fn sent(builder: QueueBuilder) -> Vec<(bool, usize)> {
    let peer = support::veth_with(&support::VethOptions { index: 0, ..Default::default() });
    let queue = builder.bind().await.unwrap();
    let _divert = divert([Rule::new(Hook::Output).protocol(Protocol::Tcp).to_queue(0)]);
    let listener = peer.run(|| TcpListener::bind((peer.far_v4, 9000)).unwrap());
    transfer(queue, listener, |address| TcpStream::connect(address).unwrap(), gso_and_length).await
}

async fn received(builder: QueueBuilder) -> Vec<(bool, usize)> {
    // The interface of the other call may not have been removed yet.
    let peer = support::veth_with(&support::VethOptions { index: 1, ..Default::default() });
    let queue = builder.bind().await.unwrap();
    let _divert = divert([Rule::new(Hook::Input).protocol(Protocol::Tcp).to_queue(0)]);
    let listener = TcpListener::bind((peer.near_v4, 9000)).unwrap();
    let namespace = peer.namespace.try_clone();
    let connect = move |address| namespace.run(|| TcpStream::connect(address).unwrap());
    transfer(queue, listener, connect, gso_and_length).await
}

async fn sent_super_packets_are_not_segmented() {
    let seen = sent(Queue::builder(0)).await;
    assert!(seen.iter().any(|(gso, length)| *gso && *length > 1500), "{seen:?}");
}

async fn received_super_packets_are_not_segmented() {
    let seen = received(Queue::builder(0).gso(true)).await;
    assert!(seen.iter().any(|(gso, length)| *gso && *length > 1500), "{seen:?}");
}

async fn super_packets_are_reported_on_loopback() {
    support::set_mtu("lo", 1500);
    let (queue, listener) = (Queue::builder(0).bind().await.unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let _divert = divert([Rule::new(Hook::Input).protocol(Protocol::Tcp).to_queue(0)]);
    let seen = transfer(queue, listener, |address| TcpStream::connect(address).unwrap(), gso_and_length).await;
    assert!(seen.iter().any(|(gso, length)| *gso && *length > 1500), "{seen:?}");
}

async fn without_gso_no_packet_is_longer_than_the_mtu() {
    for seen in [sent(Queue::builder(0).gso(false)).await, received(Queue::builder(0).gso(false)).await] {
        assert!(seen.iter().all(|(gso, length)| !*gso && *length <= 1500), "{seen:?}");
        assert!(seen.len() >= common::AMOUNT / 1500);
    }
}
