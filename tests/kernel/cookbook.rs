//! The programs of the guide's pages that need a kernel, from the files that the pages show, and
//! the tables of these pages.

// The pages show these files, so they are written for readers there.
#[path = "../../src/guide/programs/containers.rs"]
#[allow(unreachable_pub)]
mod containers;
#[path = "../../src/guide/programs/one_queue_a_core.rs"]
#[allow(unreachable_pub)]
mod one_queue_a_core;
#[path = "../../src/guide/programs/own_traffic.rs"]
#[allow(unreachable_pub)]
mod own_traffic;
#[path = "../../src/guide/programs/rewriting.rs"]
#[allow(unreachable_pub)]
mod rewriting;
#[path = "../../src/guide/programs/sni.rs"]
#[allow(unreachable_pub)]
mod sni;
mod where_rewriting_works;

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    thread,
    time::Duration,
};

use libtest_mimic::Trial;
use tokio::{
    sync::oneshot,
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};
use tokio_nfqueue::{Error, Hook, NetworkNamespace};

use self::where_rewriting_works::Host;
use crate::{
    common::{
        self, PATIENCE, PORT, account, eventually,
        rules::{self, NetfilterProtoFamily, Place},
        soon, udp_in,
    },
    edit::arrival::drop_unless_established,
    support::{self, VethOptions},
};

pub(crate) fn tests() -> Vec<Trial> {
    let name = |name: &str| common::test_name(module_path!(), name);
    let mut tests = programs();
    if !common::replaces_payloads() {
        return tests;
    }
    tests.extend(common::both(&name("a_service_that_has_moved_is_reached_at_its_old_address"), moved));
    let addresses = "a_queue_sees_the_addresses_that_the_guide_says_before_and_behind_translation";
    tests.extend(common::one(&name(addresses), where_rewriting_works::addresses));
    for (host, v6) in
        [Host::Client, Host::Server, Host::Router].into_iter().flat_map(|host| [(host, false), (host, true)])
    {
        let version = if v6 { 6 } else { 4 };
        let name = name(&format!("rewritten_packets_arrive_as_documented: {host:?}, IPv{version}"));
        tests.extend(common::one(&name, move || where_rewriting_works::everywhere(v6, host)));
    }
    tests
}

fn programs() -> Vec<Trial> {
    tests![
        both a_filter_that_asks_the_network_does_not_wait_for_itself,
        both each_pair_of_hosts_has_one_worker,
        both a_container_is_filtered_from_the_host,
        both tls_is_blocked_by_the_name_of_the_server,
    ];
    tests()
}

/// A program that was started, until it is stopped.
struct Running {
    stop: oneshot::Sender<()>,
    program: JoinHandle<Result<(), Error>>,
}

impl Running {
    async fn stop(self) {
        self.stop.send(()).unwrap();
        soon("the program's end", self.program).await.unwrap().unwrap();
    }
}

/// Starts a program with the future that stops it.
macro_rules! start {
    (|$stopped:ident| $start:expr) => {{
        let (stop, stopped) = oneshot::channel::<()>();
        let $stopped = async { drop(stopped.await) };
        Running { stop, program: tokio::spawn($start.await.unwrap()) }
    }};
}

/// Sends again what the program has dropped because the service was slow, until it has arrived.
async fn until<T>(mut arrived: JoinHandle<T>, mut send: impl FnMut()) -> T {
    let repeated = async {
        loop {
            send();
            // The program waits so long for the service.
            if let Ok(arrived) = timeout(Duration::from_secs(2), &mut arrived).await {
                break arrived.unwrap();
            }
        }
    };
    soon("what has been sent", repeated).await
}

async fn a_filter_that_asks_the_network_does_not_wait_for_itself() {
    let peer = support::veth();
    // Says yes, to packets that contain a y.
    let service = peer.run(|| support::udp((peer.far_v4, 9500)));
    let asked = service.local_addr().unwrap();
    let service = thread::spawn(move || {
        let mut packet = [0; 2000];
        loop {
            let (length, from) = service.recv_from(&mut packet).unwrap();
            match packet[..length].last().unwrap() {
                b'.' => return,
                last => service.send_to(&[*last], from).unwrap(),
            };
        }
    });
    let program = start!(|stopped| own_traffic::start(asked, stopped));
    let receiver = peer.run(|| support::udp((peer.far_v4, PORT)));
    let to = receiver.local_addr().unwrap();
    let sender = support::udp((peer.near_v4, 0));
    let from = sender.local_addr().unwrap();
    let arrived = spawn_blocking(move || {
        let mut arrived = BTreeSet::new();
        while arrived.len() < 2 {
            let mut text = [0; 20];
            let length = receiver.recv(&mut text).unwrap();
            arrived.insert(String::from_utf8_lossy(&text[..length]).into_owned());
        }
        (receiver, arrived)
    });
    let send = || {
        for text in ["first: y", "second: n", "third: y"] {
            sender.send_to(text.as_bytes(), to).unwrap();
        }
    };
    let (receiver, arrived) = until(arrived, send).await;
    // They are decided at the same time, in any order.
    assert_eq!(arrived, ["first: y", "third: y"].map(str::to_owned).into());
    // What arrives is asked about as well.
    let answer = spawn_blocking(move || sender.recv(&mut [0; 20]).unwrap());
    let answer = until(answer, || _ = receiver.send_to(b"the answer: y", from).unwrap()).await;
    assert_eq!(answer, "the answer: y".len());
    eventually("all is decided", || account(0).unwrap().waiting == 0).await;
    program.stop().await;
    support::udp((peer.near_v4, 0)).send_to(b".", asked).unwrap();
    service.join().unwrap();
}

async fn each_pair_of_hosts_has_one_worker() {
    const HOSTS: u8 = 20;
    assert!(one_queue_a_core::cores() > 0);
    for fanout in [false, true] {
        let (stop, stopped) = oneshot::channel::<()>();
        let (rule, end) = (udp_in().fanout(fanout), async { drop(stopped.await) });
        let program = tokio::spawn(one_queue_a_core::start(rule, 2, end).await.unwrap());
        let server = support::udp((Ipv4Addr::LOCALHOST, PORT));
        let to = server.local_addr().unwrap();
        let traffic = spawn_blocking(move || {
            for host in 0..HOSTS {
                // Several ports of each.
                for _ in 0..3 {
                    let client = support::udp((Ipv4Addr::new(127, 0, 1, host), 0));
                    client.send_to(b"question", to).unwrap();
                    let (_, from) = server.recv_from(&mut [0; 20]).unwrap();
                    server.send_to(b"answer", from).unwrap();
                    client.recv(&mut [0; 20]).unwrap();
                }
            }
        });
        soon("the traffic", traffic).await.unwrap();
        stop.send(()).unwrap();
        let counts = soon("the end", program).await.unwrap().unwrap();
        let total: u64 = counts.iter().flat_map(|counts| counts.values()).sum();
        assert_eq!(total, u64::from(HOSTS) * 6);
        if !fanout {
            // A question and an answer for each port, all at one worker.
            for count in counts.iter().flat_map(|counts| counts.values()) {
                assert_eq!(*count, 6);
            }
            assert!(counts.iter().all(|counts| !counts.is_empty()), "one worker has all of {HOSTS} hosts");
        }
    }
}

async fn a_container_is_filtered_from_the_host() {
    let peer = support::veth();
    // The first process of the container is a thread here.
    let (path, namespace) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let first = peer.spawn(move || {
        let id = rustix::thread::gettid().as_raw_nonzero();
        path.send(PathBuf::from(format!("/proc/self/task/{id}/ns/net"))).unwrap();
        let _ = ended.recv();
    });
    let listen = |port| TcpListener::bind((peer.far_v4, port)).unwrap();
    let _listeners = peer.run(|| [listen(PORT), listen(PORT + 1)]);
    let container = NetworkNamespace::open(namespace.recv().unwrap()).unwrap();
    let program = start!(|stopped| containers::start(container, PORT, stopped));
    assert_eq!(support::queue_line(0), None, "nothing in the host's namespace");
    assert!(peer.run(|| support::queue_line(0)).is_some());

    let connect = |port| {
        let to = SocketAddr::from((peer.far_v4, port));
        spawn_blocking(move || TcpStream::connect_timeout(&to, PATIENCE).map(drop).map_err(|error| error.kind()))
    };
    assert_eq!(connect(PORT).await.unwrap(), Ok(()));
    assert_eq!(connect(PORT + 1).await.unwrap(), Err(ErrorKind::ConnectionRefused));
    program.stop().await;
    assert_eq!(connect(PORT + 1).await.unwrap(), Ok(()));
    drop(end);
    first.join().unwrap();
}

async fn tls_is_blocked_by_the_name_of_the_server() {
    let peer = support::veth();
    let listener = peer.run(|| TcpListener::bind((peer.far_v4, PORT)).unwrap());
    let server = listener.local_addr().unwrap();
    // Reads the hello, and answers with its length.
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut bytes = vec![0; 2000];
                while let Ok(length @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..length]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    let program = start!(|stopped| sni::start("blocked.example".to_owned(), PORT, stopped));
    let talk = |name: &'static str| {
        spawn_blocking(move || -> std::io::Result<()> {
            let mut stream = TcpStream::connect(server)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let hello = client_hello(name);
            // The name is in two segments.
            let middle = hello.len() - name.len() / 2 - 10;
            stream.write_all(&hello[..middle])?;
            let mut echo = vec![0; hello.len()];
            stream.read_exact(&mut echo[..middle])?;
            stream.write_all(&hello[middle..])?;
            stream.read_exact(&mut echo[middle..])?;
            assert_eq!(echo, hello);
            // Later packets do not come to the queue.
            for _ in 0..10 {
                stream.write_all(b"data")?;
                stream.read_exact(&mut echo[..4])?;
            }
            Ok(())
        })
    };
    talk("allowed.example").await.unwrap().unwrap();
    for name in ["blocked.example", "www.blocked.example"] {
        assert_eq!(talk(name).await.unwrap().unwrap_err().kind(), ErrorKind::ConnectionReset, "{name}");
    }
    talk("notblocked.example").await.unwrap().unwrap();
    program.stop().await;
}

/// A record with a ClientHello.
fn client_hello(name: &str) -> Vec<u8> {
    let with_length = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes(), bytes].concat();
    let names = with_length(&[&[0], &*with_length(name.as_bytes())].concat());
    // server_name, and supported_versions behind it
    let extensions = [&[0, 0], &*with_length(&names), &[0, 43, 0, 3, 2, 3, 4]].concat();
    let body = [&[3, 3], &[7; 32][..], &[0, 0, 2, 0x13, 1, 1, 0], &with_length(&extensions)].concat();
    let hello = [&[1, 0], &*with_length(&body)].concat();
    [&[22, 3, 1], &*with_length(&hello)].concat()
}

async fn moved() {
    let clients = support::veth();
    let servers = support::veth_with(&VethOptions { index: 1, ..VethOptions::default() });
    clients.route_through_near();
    servers.route_through_near();
    support::forwarding();
    // Replies that connection tracking does not know do not pass.
    let place = Place { hook: Hook::Forward.number().into(), priority: 10 };
    rules::install(NetfilterProtoFamily::Inet, "stateful", Some(place), drop_unless_established(None)).unwrap();
    for (client, old, new) in [
        (IpAddr::from(clients.far_v4), IpAddr::from([10, 9, 1, 77]), IpAddr::from(servers.far_v4)),
        (clients.far_v6.into(), "fd09:0:0:1::77".parse().unwrap(), servers.far_v6.into()),
    ] {
        let program = start!(|stopped| rewriting::Moved { port: PORT, old, new }.start(stopped));
        let server = servers.run(|| support::udp((new, PORT)));
        let client = clients.run(|| support::udp((client, 0)));
        let replies = spawn_blocking(move || {
            for _ in 0..3 {
                client.send_to(b"question", (old, PORT)).unwrap();
                let (_, from) = server.recv_from(&mut [0; 20]).unwrap();
                server.send_to(b"a longer answer", from).unwrap();
                let (length, from) = client.recv_from(&mut [0; 20]).unwrap();
                assert_eq!((length, from), (b"a longer answer".len(), SocketAddr::new(old, PORT)));
            }
        });
        soon("the replies", replies).await.unwrap();
        program.stop().await;
    }
}
