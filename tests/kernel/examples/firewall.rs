//! `firewall`: a service allows and denies connections; it is slow, down, wrong, or a person.

use std::{
    fs,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

use super::{PORT, Program, path};
use crate::{
    common,
    support::{self, PATIENCE, Peer},
};

tests![
    sync firewall_asks_once_about_each_connection,
    sync firewall_asks_again_when_a_port_is_used_again,
    sync firewall_says_who_wants_the_connection,
    sync firewall_denies_at_the_deadline_and_takes_a_late_answer,
    sync firewall_allows_at_the_deadline_and_takes_a_late_answer,
    sync firewall_drops_by_default_while_the_service_is_down,
    sync firewall_accepts_by_default_while_the_service_is_down,
    sync firewall_survives_wrong_answers,
    sync firewall_disconnects_a_service_that_does_not_read,
    sync firewall_bounds_open_questions,
    sync firewall_asks_a_person_at_a_terminal,
];

/// A deadline, in milliseconds, that is awaited. Mostly it is long enough for the firewall to ask
/// before: a packet that the deadline decides unread is not asked about.
const LATE: &str = "1000";

/// A firewall, and the socket of its service.
struct Firewall {
    program: Program,
    socket: PathBuf,
}

impl Firewall {
    fn start(name: &str, options: &[&str]) -> Self {
        let socket = std::env::temp_dir().join(format!("firewall-{name}-{}", std::process::id()));
        let _ = fs::remove_file(&socket);
        let port = PORT.to_string();
        let common = ["--socket", socket.to_str().unwrap(), "--port", &port];
        let mut program = Program::start("firewall", &[&common[..], options].concat());
        program.until_ready();
        Self { program, socket }
    }

    fn listen(&self) -> UnixListener {
        UnixListener::bind(&self.socket).unwrap()
    }

    /// Ends it. Returns the numbers of its line: questions, allowed, denied, unanswered; packets
    /// after the deadline, packets at once; wrong answers.
    fn end(self) -> [u32; 7] {
        let (status, output) = self.program.end(Signal::SIGTERM);
        assert!(status.success(), "{status}");
        assert_eq!(output.lines().count(), 1, "{output}");
        assert_eq!(support::queue_line(0), None, "the queue is unbound");
        let _ = fs::remove_file(&self.socket);
        let mut numbers = output.split(|c: char| !c.is_ascii_digit()).filter_map(|text| text.parse().ok());
        [(); 7].map(|()| numbers.next().unwrap_or_else(|| panic!("{output}")))
    }
}

/// The service's side of the connection.
struct Service(BufReader<UnixStream>);

impl Service {
    fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    /// The next question: its number, and the rest.
    fn question(&mut self) -> (u64, String) {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        let (id, rest) = line.strip_prefix("ask ").unwrap().split_once(' ').unwrap();
        (id.parse().unwrap(), rest.strip_suffix('\n').unwrap().to_owned())
    }

    fn send(&mut self, text: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(text.as_ref()).unwrap();
    }

    fn answer(&mut self, id: u64, allow: bool) {
        self.send(format!("{} {id}\n", if allow { "allow" } else { "deny" }));
    }

    /// The firewall closes the connection.
    fn expect_end(mut self) {
        let mut rest = String::new();
        match self.0.read_to_string(&mut rest) {
            Ok(_) => assert_eq!(rest, ""),
            // If it has not read all.
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }
}

/// The firewall connects and asks.
fn accept_question(listener: &UnixListener) -> (Service, u64) {
    let mut service = Service::accept(listener);
    let (id, _) = service.question();
    (service, id)
}

/// A client here, and a server in the other namespace.
struct Udp {
    client: UdpSocket,
    server: UdpSocket,
}

impl Udp {
    fn new(peer: &Peer, server: &UdpSocket) -> Self {
        let client = support::udp((peer.near_v4, 0));
        client.connect((peer.far_v4, PORT)).unwrap();
        Self { client, server: server.try_clone().unwrap() }
    }

    fn receives(&self, text: &[u8]) {
        let mut datagram = [0; 100];
        let (length, from) = self.server.recv_from(&mut datagram).unwrap();
        assert_eq!(&datagram[..length], text);
        assert_eq!(from, self.client.local_addr().unwrap());
    }

    fn passes(&self, text: &[u8]) {
        self.client.send(text).unwrap();
        self.receives(text);
    }

    /// Sends until this has happened, more often than once only if it takes longer than [`LATE`].
    fn send_until<T>(&self, text: &[u8], happens: impl FnOnce() -> T) -> T {
        let (end, ended) = mpsc::channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                loop {
                    self.client.send(text).unwrap();
                    if ended.recv_timeout(Duration::from_secs(2)) != Err(RecvTimeoutError::Timeout) {
                        break;
                    }
                }
            });
            let result = happens();
            // The thread ends; after a panic too.
            drop(end);
            result
        })
    }

    /// What it sends is rejected, by an ICMP error. If the kernel does that without the firewall,
    /// because the connection is denied, it tells the sender at once as well.
    fn is_rejected(&self, text: &[u8]) {
        loop {
            match self.client.send(text) {
                Ok(_) => break,
                // That of an earlier packet. This one has not been sent.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
                    break;
                }
            }
        }
        self.expect_error();
    }

    /// What it sends is rejected, when the firewall has read the answer.
    fn becomes_rejected(&self) {
        self.client.set_nonblocking(true).unwrap();
        support::wait_until("the connection is rejected", || {
            // It may fail with the error of an earlier packet.
            let _ = self.client.send(b"later");
            self.client.recv(&mut [0; 100]).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
        });
    }

    fn expect_error(&self) {
        assert_eq!(self.client.recv(&mut [0; 100]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
}

fn server(peer: &Peer) -> UdpSocket {
    peer.run(|| support::udp((peer.far_v4, PORT)))
}

/// The packets that the kernel holds for the firewall, and how many have come.
fn queued(waiting: u64, packets: u64) {
    support::wait_until("the packets are in the queue, or decided", || {
        support::queue_line(0).is_some_and(|line| (line[2], line[7]) == (waiting, packets))
    });
}

/// Waits until no packet is held for the firewall. Returns how many have come.
fn decided() -> u64 {
    let mut packets = 0;
    support::wait_until("the packets are decided", || {
        let line = support::queue_line(0).expect("the firewall's queue");
        packets = line[7];
        line[2] == 0
    });
    packets
}

/// User and name, as the firewall sees them: the kernel sends the user of the initial user
/// namespace.
fn this_process() -> (u32, String) {
    let name = fs::read_to_string("/proc/self/comm").unwrap();
    (common::outer_id("uid_map"), name.trim_end().to_owned())
}

fn firewall_asks_once_about_each_connection() {
    let peer = support::veth();
    let firewall = Firewall::start("once", &["--deadline", "60000"]);
    let listener = firewall.listen();
    let mut service = None;
    for far in [IpAddr::from(peer.far_v4), peer.far_v6.into()] {
        let server = SocketAddr::new(far, PORT);
        let (tcp, udp) = peer.run(|| (TcpListener::bind(server).unwrap(), support::udp(server)));
        for allow in [true, false] {
            let client = thread::scope(|scope| {
                // In the thread, the network namespace is the same.
                let connecting = scope.spawn(|| TcpStream::connect(server));
                let service = service.get_or_insert_with(|| Service::accept(&listener));
                let (id, question) = service.question();
                assert!(question.starts_with("tcp ") && question.contains(&format!(" {server} ")), "{question}");
                service.answer(id, allow);
                connecting.join().unwrap()
            });
            if allow {
                let (mut client, (mut accepted, _)) = (client.unwrap(), tcp.accept().unwrap());
                for text in [b"first", b"again"] {
                    client.write_all(text).unwrap();
                    let mut received = [0; 5];
                    accepted.read_exact(&mut received).unwrap();
                    assert_eq!(&received, text);
                    accepted.write_all(text).unwrap();
                    client.read_exact(&mut received).unwrap();
                }
            } else {
                assert_eq!(client.unwrap_err().kind(), ErrorKind::ConnectionRefused);
            }

            let client =
                support::udp((if far.is_ipv4() { peer.near_v4.into() } else { IpAddr::from(peer.near_v6) }, 0));
            client.connect(server).unwrap();
            client.send(b"first").unwrap();
            client.send(b"second").unwrap();
            let service = service.as_mut().unwrap();
            let (id, question) = service.question();
            assert!(question.starts_with(&format!("udp {} {server} ", client.local_addr().unwrap())), "{question}");
            service.answer(id, allow);
            let flow = Udp { client, server: udp.try_clone().unwrap() };
            if allow {
                flow.receives(b"first");
                flow.receives(b"second");
                flow.passes(b"third");
            } else {
                flow.expect_error();
                flow.is_rejected(b"third");
            }
        }
    }
    assert_eq!(firewall.end(), [8, 4, 4, 0, 0, 0, 0]);
}

/// Another program may have the port by then.
fn firewall_asks_again_when_a_port_is_used_again() {
    let peer = support::veth();
    let firewall = Firewall::start("port", &["--deadline", "60000"]);
    let listener = firewall.listen();
    let mut service = None;
    for far in [IpAddr::from(peer.far_v4), peer.far_v6.into()] {
        let server = SocketAddr::new(far, PORT);
        let tcp = peer.run(|| TcpListener::bind(server).unwrap());
        let mut client_address = None;
        for allow in [true, true, false] {
            let client = Socket::new(Domain::for_address(server), Type::STREAM, None).unwrap();
            if let Some(address) = client_address {
                client.bind(&SocketAddr::into(address)).unwrap();
            }
            // It closes with a reset, so that the port is free at once.
            client.set_linger(Some(Duration::ZERO)).unwrap();
            let connected = thread::scope(|scope| {
                let connecting = scope.spawn(|| client.connect_timeout(&server.into(), PATIENCE));
                let service = service.get_or_insert_with(|| Service::accept(&listener));
                let (id, question) = service.question();
                assert!(question.starts_with("tcp "), "{question}");
                service.answer(id, allow);
                connecting.join().unwrap()
            });
            if allow {
                connected.unwrap();
                client_address = client.local_addr().unwrap().as_socket();
                let (mut accepted, from) = tcp.accept().unwrap();
                assert_eq!(Some(from), client_address);
                drop(client);
                assert_eq!(accepted.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
            } else {
                assert_eq!(connected.unwrap_err().kind(), ErrorKind::ConnectionRefused);
            }
        }
    }
    assert_eq!(firewall.end(), [6, 4, 2, 0, 0, 0, 0]);
}

fn firewall_says_who_wants_the_connection() {
    let peer = support::veth();
    let server = server(&peer);
    let firewall = Firewall::start("who", &["--deadline", "60000"]);
    let listener = firewall.listen();
    let flow = Udp::new(&peer, &server);
    flow.client.send(b"text").unwrap();
    let (_, question) = Service::accept(&listener).question();
    let (from, to) = (flow.client.local_addr().unwrap(), flow.client.peer_addr().unwrap());
    let (user, name) = this_process();
    assert_eq!(question, format!("udp {from} {to} {user} {name}"));
    // The service has gone.
    queued(0, 1);
    assert_eq!(firewall.end(), [1, 0, 0, 1, 0, 1, 0]);
}

fn firewall_denies_at_the_deadline_and_takes_a_late_answer() {
    let peer = support::veth();
    let server = server(&peer);
    let firewall = Firewall::start("late-deny", &["--deadline", LATE]);
    let listener = firewall.listen();
    let flow = Udp::new(&peer, &server);
    let (mut service, id) = flow.send_until(b"first", || accept_question(&listener));
    let packets = decided();
    // It need not wait any more.
    flow.client.send(b"early").unwrap();
    queued(0, packets + 1);
    service.answer(id, true);
    // It reads the answers in their order.
    let other = Udp::new(&peer, &server);
    let (id, _) = other.send_until(b"other", || service.question());
    service.answer(id, false);
    other.becomes_rejected();
    loop {
        let begun = Instant::now();
        flow.client.send(b"second").unwrap();
        decided();
        // Otherwise it may have been the deadline.
        if begun.elapsed() < Duration::from_secs(1) {
            break;
        }
    }
    flow.receives(b"second");
    let [questions, allowed, denied, unanswered, after_deadline, at_once, wrong] = firewall.end();
    assert_eq!([questions, allowed, denied, unanswered, wrong], [2, 1, 1, 0, 0]);
    // The first two; on a busy machine also those of the other connection.
    assert!(after_deadline >= 1 && after_deadline + at_once >= 2, "{after_deadline}, {at_once}");
}

fn firewall_allows_at_the_deadline_and_takes_a_late_answer() {
    let peer = support::veth();
    let server = server(&peer);
    let firewall = Firewall::start("late-allow", &["--deadline", LATE, "--default", "allow"]);
    let listener = firewall.listen();
    let flow = Udp::new(&peer, &server);
    let (mut service, id) = flow.send_until(b"first", || accept_question(&listener));
    (0..decided()).for_each(|_| flow.receives(b"first"));
    // Still the same question, and they need not wait.
    flow.passes(b"second");
    flow.passes(b"third");
    service.answer(id, false);
    flow.becomes_rejected();
    let [questions, allowed, denied, unanswered, after_deadline, at_once, wrong] = firewall.end();
    assert_eq!([questions, allowed, denied, unanswered, wrong], [1, 0, 1, 0, 0]);
    assert!(after_deadline >= 1 && after_deadline + at_once >= 3, "{after_deadline}, {at_once}");
}

fn firewall_drops_by_default_while_the_service_is_down() {
    let peer = support::veth();
    let server = server(&peer);
    let tcp = peer.run(|| TcpListener::bind((peer.far_v4, PORT)).unwrap());
    let firewall = Firewall::start("down-deny", &["--deadline", "60000"]);
    let flow = Udp::new(&peer, &server);
    flow.client.send(b"dropped").unwrap();
    queued(0, 1);
    let to = peer.far_v4;
    let connecting = thread::spawn(move || TcpStream::connect((to, PORT)));
    support::wait_until("the SYN is dropped", || {
        support::queue_line(0).is_some_and(|line| line[2] == 0 && line[7] >= 2)
    });

    // Up: both are asked about. TCP sends its SYN again.
    let listener = firewall.listen();
    flow.client.send(b"asked").unwrap();
    let mut service = Service::accept(&listener);
    for _ in 0..2 {
        let (id, _) = service.question();
        service.answer(id, true);
    }
    flow.receives(b"asked");
    let _connection = (connecting.join().unwrap().unwrap(), tcp.accept().unwrap());

    // Down again, with an open question.
    let other = Udp::new(&peer, &server);
    other.client.send(b"dropped").unwrap();
    service.question();
    drop((service, listener));
    fs::remove_file(&firewall.socket).unwrap();
    support::wait_until("it is dropped", || support::queue_line(0).is_some_and(|line| line[2] == 0));
    // What has been allowed stays.
    flow.passes(b"text");

    // And up.
    let listener = firewall.listen();
    other.client.send(b"asked").unwrap();
    let mut service = Service::accept(&listener);
    let (id, _) = service.question();
    service.answer(id, true);
    other.receives(b"asked");
    let [questions, allowed, denied, unanswered, after_deadline, at_once, wrong] = firewall.end();
    assert_eq!([questions, allowed, denied, unanswered, after_deadline, wrong], [4, 3, 0, 1, 0, 0]);
    // The first datagram, the SYN and the open question. A slow machine may send the SYN again.
    assert!(at_once >= 3, "{at_once}");
}

fn firewall_accepts_by_default_while_the_service_is_down() {
    let peer = support::veth();
    let server = server(&peer);
    let tcp = peer.run(|| TcpListener::bind((peer.far_v4, PORT)).unwrap());
    let firewall = Firewall::start("down-allow", &["--default", "allow", "--deadline", "60000"]);
    let flow = Udp::new(&peer, &server);
    flow.passes(b"passes");
    let mut connection = (TcpStream::connect((peer.far_v4, PORT)).unwrap(), tcp.accept().unwrap().0);

    // Up: both are asked about, and denied.
    let listener = firewall.listen();
    flow.client.send(b"asked").unwrap();
    let mut service = Service::accept(&listener);
    let (id, question) = service.question();
    assert!(question.starts_with("udp"), "{question}");
    service.answer(id, false);
    flow.expect_error();
    connection.0.write_all(b"asked").unwrap();
    let (id, question) = service.question();
    assert!(question.starts_with("tcp"), "{question}");
    service.answer(id, false);
    connection.0.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(connection.0.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);

    // Down again, with an open question.
    let other = Udp::new(&peer, &server);
    other.client.send(b"open").unwrap();
    service.question();
    drop((service, listener));
    other.receives(b"open");
    other.passes(b"passes");
    // What has been denied stays.
    flow.is_rejected(b"text");
    let [questions, allowed, denied, unanswered, after_deadline, at_once, wrong] = firewall.end();
    assert_eq!([questions, allowed, denied, unanswered, after_deadline, wrong], [3, 0, 2, 1, 0, 0]);
    // Two datagrams of the other connection, one of the first, the SYN and an acknowledgement.
    assert!(at_once >= 5, "{at_once}");
}

fn firewall_survives_wrong_answers() {
    let peer = support::veth();
    let server = server(&peer);
    let firewall = Firewall::start("wrong", &["--deadline", "60000"]);
    let listener = firewall.listen();
    let flow = Udp::new(&peer, &server);
    flow.client.send(b"first").unwrap();
    let mut service = Service::accept(&listener);
    let (id, _) = service.question();
    for wrong in
        ["", "allow", "allow x", "allow -1", "allow 99", "deny 99", "yes", "ALLOW 0", "allow 18446744073709551616"]
    {
        service.send(format!("{wrong}\n"));
    }
    service.send([0xff, 0xfe, b'\n']);
    // In two parts, and twice.
    service.send("all");
    service.send(format!("ow {id}\nallow {id}\n"));
    flow.receives(b"first");

    // A line that does not end.
    let other = Udp::new(&peer, &server);
    other.client.send(b"first").unwrap();
    service.question();
    service.send([b'a'; 65]);
    service.expect_end();
    // A new connection to the service.
    other.client.send(b"second").unwrap();
    let mut service = Service::accept(&listener);
    let (id, _) = service.question();
    service.answer(id, true);
    other.receives(b"second");
    assert_eq!(firewall.end(), [3, 2, 0, 1, 0, 1, 11]);
}

fn firewall_disconnects_a_service_that_does_not_read() {
    let peer = support::veth();
    let server = server(&peer);
    let firewall = Firewall::start("unread", &["--deadline", "60000", "--questions", "1000"]);
    let listener = firewall.listen();
    let ask = || _ = Udp::new(&peer, &server).client.send(b"text").unwrap();
    ask();
    let mut service = Service::accept(&listener);
    listener.set_nonblocking(true).unwrap();
    support::wait_until("the firewall connects again", || {
        ask();
        listener.accept().is_ok()
    });
    let mut questions = String::new();
    service.0.read_to_string(&mut questions).unwrap();
    let [asked, allowed, denied, unanswered, after_deadline, at_once, wrong] = firewall.end();
    // And what the second service was asked, which has gone at once.
    assert!(questions.lines().count() <= asked as usize, "{asked} questions:\n{questions}");
    assert_eq!([allowed, denied, unanswered, after_deadline, wrong], [0, 0, asked, 0, 0]);
    assert!(at_once > 0, "what has waited is decided");
}

fn firewall_bounds_open_questions() {
    let peer = support::veth();
    let server = server(&peer);
    let firewall = Firewall::start("bounds", &["--deadline", "60000", "--questions", "2"]);
    let listener = firewall.listen();
    let flows: Vec<Udp> = (0..4).map(|_| Udp::new(&peer, &server)).collect();
    flows[..2].iter().for_each(|flow| _ = flow.client.send(b"text").unwrap());
    let mut service = Service::accept(&listener);
    let questions = [service.question(), service.question()];
    flows[2].client.send(b"dropped").unwrap();
    queued(2, 3);
    // Of one connection, 16 packets wait.
    (1..16).for_each(|_| _ = flows[0].client.send(b"text").unwrap());
    (16..20).for_each(|_| _ = flows[0].client.send(b"dropped").unwrap());
    queued(17, 22);
    for (id, _) in questions {
        service.answer(id, true);
    }
    for _ in 0..17 {
        let mut datagram = [0; 10];
        let length = server.recv(&mut datagram).unwrap();
        assert_eq!(&datagram[..length], b"text");
    }
    // There is a place for another question.
    flows[3].client.send(b"last").unwrap();
    let (id, _) = service.question();
    service.answer(id, true);
    flows[3].receives(b"last");
    assert_eq!(firewall.end(), [3, 3, 0, 0, 0, 5, 0]);
}

fn firewall_asks_a_person_at_a_terminal() {
    let peer = support::veth();
    let server = server(&peer);
    let firewall = Firewall::start("prompt", &["--deadline", "60000"]);
    let mut command = Command::new(path("firewall"));
    command.arg("prompt").arg("--socket").arg(&firewall.socket);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut prompt = Program(support::start_process(&mut command).unwrap());
    prompt.until_ready();
    let mut keyboard = prompt.0.stdin.take().unwrap();
    let mut expect = |flow: &Udp| {
        let ((user, name), to) = (this_process(), flow.client.peer_addr().unwrap());
        let expected = format!("{name} (uid {user}) wants {to} (udp) [y/n]? ");
        let mut screen = vec![0; expected.len()];
        prompt.0.stdout.as_mut().unwrap().read_exact(&mut screen).unwrap();
        assert_eq!(String::from_utf8(screen).unwrap(), expected);
    };
    let [allowed, denied] = [(); 2].map(|()| Udp::new(&peer, &server));
    allowed.client.send(b"text").unwrap();
    expect(&allowed);
    keyboard.write_all(b"what?\n").unwrap();
    expect(&allowed);
    keyboard.write_all(b"y\n").unwrap();
    allowed.receives(b"text");
    denied.client.send(b"text").unwrap();
    expect(&denied);
    keyboard.write_all(b"n\n").unwrap();
    denied.expect_error();
    let (status, output) = prompt.end(Signal::SIGINT);
    assert!(status.success(), "{status}");
    assert_eq!(output, "\n1 connections allowed, 1 denied\n");
    assert!(!firewall.socket.exists());
    assert_eq!(firewall.end(), [2, 1, 1, 0, 0, 0, 0]);
}
