//! TCP: other bytes of the same number.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use tokio::task;
use tokio_nfqueue::{Error, ErrorKind, Hook, Protocol, Queue, Rule, edit::Edit};

use super::{
    route, second,
    setup::{Case, Editor, PORT, Path, Seen},
};
use crate::common::{self, PATIENCE, many};

const BYTES: usize = many(3 << 20) as usize;
const OTHER_PORT: u16 = 9001;

fn pattern(index: usize) -> u8 {
    (index * 31 + index / 997) as u8
}

fn substitute(edit: &mut Edit) -> Result<(), Error> {
    edit.payload_mut()?.iter_mut().for_each(|byte| *byte ^= 0x5a);
    Ok(())
}

/// The direction of a transfer.
enum Direction {
    ToServer,
    ToClient,
}

/// Sends many bytes over a connection, and asserts that they arrive edited.
fn transfer(path: &Path, listen: SocketAddr, connect: SocketAddr, direction: &Direction) {
    transfer_through(path, listen, || TcpStream::connect(connect).unwrap(), direction);
}

/// As [`transfer`], over the connection that `connect` makes.
fn transfer_through(path: &Path, listen: SocketAddr, connect: impl FnOnce() -> TcpStream, direction: &Direction) {
    let listener = path.peer.run(|| TcpListener::bind(listen).unwrap());
    thread::scope(|scope| {
        let server = scope.spawn(|| run(listener.accept().unwrap().0, matches!(direction, Direction::ToClient)));
        run(connect(), matches!(direction, Direction::ToServer));
        server.join().unwrap();
    });
}

fn run(mut stream: TcpStream, sends: bool) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    if sends {
        let data: Vec<u8> = (0..BYTES).map(pattern).collect();
        stream.write_all(&data).unwrap();
    } else {
        let mut data = Vec::with_capacity(BYTES);
        stream.read_to_end(&mut data).unwrap();
        assert_eq!(data.len(), BYTES);
        let wrong = data.iter().enumerate().position(|(index, byte)| *byte != pattern(index) ^ 0x5a);
        assert_eq!(wrong, None, "the first wrong byte");
    }
}

pub(crate) async fn substituted_out(case: Case) {
    let path = Path::new(case);
    let rule = Rule::new(Hook::Output).protocol(Protocol::Tcp).destination_port(PORT);
    let editor = Editor::start(case, [rule], substitute);
    let server = (path.far, PORT).into();
    transfer(&path, server, server, &Direction::ToServer);
    let seen = editor.stop().await;
    assert_super_packets(&seen, case.gso);
    // Without GSO, the kernel finishes checksums before it queues.
    assert_eq!(seen.unfinished > 0, case.gso, "{seen:?}");
    path.assert_checksums();
}

/// With offloads, super-packets with unfinished checksums arrive and are delivered as such.
pub(crate) async fn substituted_in(case: Case) {
    let path = Path::new(case);
    let rule = Rule::new(Hook::Input).protocol(Protocol::Tcp).source_port(PORT);
    let editor = Editor::start(case, [rule], substitute);
    let server = (path.far, PORT).into();
    transfer(&path, server, server, &Direction::ToClient);
    assert_super_packets(&editor.stop().await, case.gso && case.offloads);
    path.assert_checksums();
}

/// To another address and port; both directions are queued and edited.
pub(crate) async fn redirected(case: Case) {
    let path = Path::new(case);
    let (asked, server_address) = (path.far, second(path.far));
    path.add_address(false, server_address);
    let rules = [
        Rule::new(Hook::Output).protocol(Protocol::Tcp).destination_port(PORT),
        Rule::new(Hook::Prerouting).protocol(Protocol::Tcp).source_port(OTHER_PORT),
    ];
    let editor = Editor::start(case, rules, move |edit| {
        substitute(edit)?;
        if edit.view().destination_port() == Some(PORT) {
            edit.set_destination_address(server_address)?;
            edit.set_destination_port(OTHER_PORT)
        } else {
            edit.set_source_address(asked)?;
            edit.set_source_port(PORT)
        }
    });
    transfer(&path, (server_address, OTHER_PORT).into(), (asked, PORT).into(), &Direction::ToServer);
    assert_super_packets(&editor.stop().await, case.gso);
    path.assert_checksums();
}

/// To the second address of the far side, through its first one.
pub(crate) async fn routed(case: Case) {
    let path = Path::new(case);
    let server = SocketAddr::from((path.accept_routes(false), PORT));
    let rule = Rule::new(Hook::Output).protocol(Protocol::Tcp).destination_port(PORT);
    if case.gso {
        return routed_super_packets(&path, server, rule).await;
    }
    let editor = Editor::start(case, [rule], substitute);
    transfer_through(&path, server, || route::connect(path.far, server), &Direction::ToServer);
    editor.stop().await;
    path.assert_checksums();
}

/// The kernel would compute the checksums of the segments with the next hop, so the edit is
/// refused.
async fn routed_super_packets(path: &Path, server: SocketAddr, rule: Rule) {
    let _listener = path.peer.run(|| TcpListener::bind(server).unwrap());
    let mut queue = Queue::builder(0).gso(true).bind().await.unwrap();
    let divert = common::divert([rule.to_queue(0)]);
    let hop = path.far;
    let client = task::spawn_blocking(move || route::connect(hop, server).write_all(&[7; 60_000]));
    loop {
        let packet = common::next(&mut queue).await;
        let refused = packet.edit().err();
        assert_eq!(refused.is_some(), packet.is_gso(), "{refused:?}");
        packet.accept().submit().unwrap();
        if let Some(error) = refused {
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains("TCP super-packet with a route"), "{error}");
            break;
        }
    }
    // The remaining packets are not queued.
    drop(divert);
    client.await.unwrap().unwrap();
}

#[track_caller]
fn assert_super_packets(seen: &Seen, expected: bool) {
    assert_eq!(seen.super_packets > 0, expected, "{seen:?}");
}
