//! `capture`: the file has all packets, with their verdicts and waiting times.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{ErrorKind, Read},
    net::{IpAddr, UdpSocket},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::sys::signal::Signal;
use pcap_file::{
    DataLink, PcapError,
    pcapng::{
        Block, PcapNgReader,
        blocks::{enhanced_packet::EnhancedPacketOption, interface_description::InterfaceDescriptionOption},
    },
};
use tokio_nfqueue::edit::PacketView;

use super::{
    PORT, Program,
    talk::{LOOPBACKS, Talk},
};
use crate::support;

tests![
    sync capture_writes_packets_with_verdict_and_waiting_time,
    sync capture_is_complete_whenever_no_packets_come,
    sync capture_ends_when_the_file_cannot_be_written,
];

const DROPPED: u16 = 9001;

fn start(file: &TemporaryFile) -> Program {
    let arguments = ["--write", file.name(), "--port", "9000", "--drop-port", "9001"];
    let mut program = Program::start("capture", &arguments);
    program.until_ready();
    program
}

fn capture_writes_packets_with_verdict_and_waiting_time() {
    let file = TemporaryFile::new("verdicts");
    let since = SystemTime::now();
    let program = start(&file);
    let mut sent = Vec::new();
    for address in LOOPBACKS {
        let (client, server) = (support::udp((address, 0)), support::udp((address, PORT)));
        for number in 0..10_u8 {
            client.send_to(&[number], (address, DROPPED)).unwrap();
            sent.push((address, DROPPED, vec![number]));
            client.send_to(&[number; 100], (address, PORT)).unwrap();
            sent.push((address, PORT, vec![number; 100]));
            let from = receive(&server, &[number; 100]);
            server.send_to(b"reply", from).unwrap();
            sent.push((address, from.port(), b"reply".to_vec()));
            receive(&client, b"reply");
        }
    }
    let (status, output) = program.end(Signal::SIGTERM);
    assert!(status.success(), "{status}");
    assert_eq!(
        output,
        format!("wrote 60 packets to {}: 40 accepted, 20 dropped; 0 not written, 0 lost\n", file.name())
    );
    assert_eq!(file.0.metadata().unwrap().permissions().mode() & 0o777, 0o600);

    let packets = packets(&file.0).unwrap();
    let read = packets.iter().map(|packet| {
        let view = PacketView::new(&packet.bytes).unwrap();
        (view.destination_address(), view.destination_port().unwrap(), view.payload().unwrap().to_vec())
    });
    assert_eq!(read.collect::<Vec<_>>(), sent);
    let mut last = since.duration_since(UNIX_EPOCH).unwrap();
    for (packet, (_, port, _)) in packets.iter().zip(&sent) {
        assert_eq!(packet.original_len as usize, packet.bytes.len());
        let verdict = if *port == DROPPED { "dropped" } else { "accepted" };
        let waited = packet.comment.strip_prefix(verdict).and_then(|rest| rest.strip_prefix(" after "));
        let seconds = waited.and_then(|rest| rest.strip_suffix(" s")).expect(&packet.comment);
        assert!(seconds.parse::<f64>().is_ok(), "{}", packet.comment);
        assert!(last <= packet.time, "{last:?} {:?}", packet.time);
        last = packet.time;
    }
    assert!(UNIX_EPOCH + last <= SystemTime::now());
    compare_with_tshark(&file, &packets, &sent);
}

fn capture_is_complete_whenever_no_packets_come() {
    let file = TemporaryFile::new("killed");
    let program = start(&file);
    assert!(packets(&file.0).unwrap().is_empty());
    for address in LOOPBACKS {
        let mut talk = Talk::several(address, 1).remove(0);
        talk.passes(b"query");
        talk.replies(b"response");
    }
    // A text for which the program has taken long is sent again.
    let texts = |packets: Vec<CapturedPacket>| {
        let (mut seen, mut texts) = (BTreeSet::new(), Vec::new());
        for packet in packets {
            let view = PacketView::new(&packet.bytes).unwrap();
            let text = view.payload().unwrap();
            let segment = (view.source_address(), view.source_port(), view.tcp().unwrap().sequence_number);
            if !text.is_empty() && seen.insert(segment) {
                texts.push(text.to_vec());
            }
        }
        texts
    };
    let are_written = || packets(&file.0).is_ok_and(|packets| texts(packets).len() == 4);
    support::wait_until("the packets are written", are_written);
    program.end(Signal::SIGKILL);
    let packets = packets(&file.0).unwrap();
    assert!(packets.iter().all(|packet| packet.comment.starts_with("accepted after ")));
    assert_eq!(texts(packets), [&b"query"[..], b"response", b"query", b"response"]);
}

/// A pipe whose reader ends.
fn capture_ends_when_the_file_cannot_be_written() {
    let file = TemporaryFile::new("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &file.0, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let name = file.name().to_owned();
    let mut program = Program::start("capture", &["--write", &name, "--port", "9000"]);
    let mut reader = File::open(&file.0).unwrap();
    program.until_ready();
    reader.read_exact(&mut [0; 28]).unwrap();
    drop(reader);
    let sender = UdpSocket::bind((LOOPBACKS[0], 0)).unwrap();
    // The program learns of it when it writes, and ends with the packet after that.
    support::wait_until("the program ends", || {
        sender.send_to(b"text", (LOOPBACKS[0], PORT)).unwrap();
        program.0.try_wait().unwrap().is_some()
    });
    let (status, output) = program.wait();
    assert_eq!((status.code(), output.as_str()), (Some(1), ""));
    assert_eq!(support::queue_line(0), None, "the queue is unbound");
}

/// If it is installed. It says whether other programs read the file as it was meant.
fn compare_with_tshark(file: &TemporaryFile, packets: &[CapturedPacket], sent: &[(IpAddr, u16, Vec<u8>)]) {
    let fields = ["-T", "fields", "-e", "frame.time_epoch", "-e", "udp.dstport", "-e", "frame.comment"];
    let mut command = Command::new("tshark");
    command.args(["-r", file.name()]).args(fields).stdin(Stdio::null());
    let output = match support::start_process(command.stdout(Stdio::piped()).stderr(Stdio::piped())) {
        // The second one if this user may not search a folder of PATH.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => return,
        started => started.unwrap().wait_with_output().unwrap(),
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected = packets.iter().zip(sent).map(|(packet, (_, port, _))| {
        let (seconds, nanoseconds) = (packet.time.as_secs(), packet.time.subsec_nanos());
        format!("{seconds}.{nanoseconds:09}\t{port}\t{}\n", packet.comment)
    });
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected.collect::<String>());
}

/// The socket receives this datagram. Returns where it came from.
fn receive(socket: &UdpSocket, text: &[u8]) -> std::net::SocketAddr {
    let mut received = [0; 200];
    let (length, from) = socket.recv_from(&mut received).unwrap();
    assert_eq!(&received[..length], text);
    from
}

struct CapturedPacket {
    time: Duration,
    original_len: u32,
    bytes: Vec<u8>,
    comment: String,
}

/// What is in the file, which may be incomplete.
fn packets(path: &Path) -> Result<Vec<CapturedPacket>, PcapError> {
    let mut reader = PcapNgReader::new(File::open(path).unwrap())?;
    let mut packets = Vec::new();
    while let Some(block) = reader.next_block() {
        match block? {
            Block::InterfaceDescription(interface) => {
                assert_eq!((interface.linktype, interface.snaplen), (DataLink::RAW, 0));
                // The timestamps are in nanoseconds.
                assert!(interface.options.contains(&InterfaceDescriptionOption::IfTsResol(9)));
            }
            Block::EnhancedPacket(packet) => {
                let [EnhancedPacketOption::Comment(comment)] = &packet.options[..] else {
                    panic!("{:?}", packet.options);
                };
                packets.push(CapturedPacket {
                    time: packet.timestamp,
                    original_len: packet.original_len,
                    bytes: packet.data.to_vec(),
                    comment: comment.to_string(),
                });
            }
            other => panic!("{other:?}"),
        }
    }
    Ok(packets)
}

/// The name of a file, which is removed at the end of the test.
struct TemporaryFile(PathBuf);

impl TemporaryFile {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("capture-{name}-{}", std::process::id())))
    }

    fn name(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
