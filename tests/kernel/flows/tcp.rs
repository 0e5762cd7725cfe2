//! Connections of TCP.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use tokio::task::spawn_blocking;
use tokio_nfqueue::{Hook, Protocol, Queue, Rule, divert::Match};

use super::{Decision, LOOPBACKS, bind, confirm, queue_is_empty, table};
use crate::common::{next, soon};

tests![
    both accepted_at_its_first_packet,
    both accepted_later,
    both rejected_at_its_first_packet,
    both rejected_later_resets_both_sides,
    both dropped_at_its_first_packet,
    both dropped_later,
];

fn from_and_to(port: u16) -> Vec<Rule> {
    let rule = || Rule::new(Hook::Output).protocol(Protocol::Tcp);
    vec![rule().destination_port(port).to_queue(0), rule().source_port(port).to_queue(0)]
}

fn listen(index: usize) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((LOOPBACKS[index], 0)).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn connect(to: SocketAddr) -> tokio::task::JoinHandle<io::Result<TcpStream>> {
    spawn_blocking(move || TcpStream::connect_timeout(&to, crate::common::PATIENCE))
}

/// Sends through the connection in both directions.
async fn talk(mut client: TcpStream, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let (mut server, _) = listener.accept().unwrap();
    let talked = spawn_blocking(move || {
        client.write_all(b"question").unwrap();
        server.read_exact(&mut [0; 8]).unwrap();
        server.write_all(b"answer").unwrap();
        client.read_exact(&mut [0; 6]).unwrap();
        (client, server)
    });
    soon("the conversation", talked).await.unwrap()
}

async fn accepted_at_its_first_packet() {
    for index in 0..2 {
        let (listener, address) = listen(index);
        let mut queue = bind();
        let _divert = table(from_and_to(address.port())).install().unwrap();
        let client = connect(address).await;
        confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
        let (client, server) = talk(soon("the connection", client).await.unwrap().unwrap(), &listener).await;
        drop((client, server));
        queue_is_empty(&mut queue);
        assert_eq!(queue.stats().received.packets, 1);
    }
}

/// Opens a connection whose packets, three or so, are accepted one by one: each side sends its own
/// again if that takes a second.
async fn open(queue: &mut Queue, index: usize) -> (TcpStream, TcpStream) {
    let (listener, address) = listen(index);
    let client = connect(address).await;
    let both = async move {
        let client = client.await.unwrap().unwrap();
        (client, spawn_blocking(move || listener.accept().unwrap().0).await.unwrap())
    };
    let mut both = Box::pin(soon("the connection", both));
    let ends = loop {
        tokio::select! {
            packet = next(queue) => confirm(packet.accept()).await.unwrap(),
            ends = &mut both => break ends,
        }
    };
    while let Ok(again) = queue.try_recv() {
        confirm(again.accept()).await.unwrap();
    }
    ends
}

fn all_tcp() -> Vec<Rule> {
    vec![Rule::new(Hook::Output).protocol(Protocol::Tcp).to_queue(0)]
}

async fn accepted_later() {
    for index in 0..2 {
        let mut queue = bind();
        let _divert = table(all_tcp()).install().unwrap();
        let (mut client, mut server) = open(&mut queue, index).await;
        client.write_all(b"question").unwrap();
        confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
        server.read_exact(&mut [0; 8]).unwrap();
        server.write_all(b"answer").unwrap();
        client.read_exact(&mut [0; 6]).unwrap();
        queue_is_empty(&mut queue);
    }
}

async fn rejected_at_its_first_packet() {
    for index in 0..2 {
        let (_listener, address) = listen(index);
        let mut queue = bind();
        let _divert = table(all_tcp()).install().unwrap();
        let client = connect(address).await;
        confirm(next(&mut queue).await.reject().for_flow()).await.unwrap();
        let error = soon("the refusal", client).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        queue_is_empty(&mut queue);
    }
}

async fn rejected_later_resets_both_sides() {
    for index in 0..2 {
        let mut queue = bind();
        let _divert = table(all_tcp()).install().unwrap();
        let (mut client, mut server) = open(&mut queue, index).await;
        client.write_all(b"question").unwrap();
        confirm(next(&mut queue).await.reject().for_flow()).await.unwrap();
        let error = client.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        // The server has got nothing, and is reset when it sends.
        server.write_all(b"answer").unwrap();
        let error = server.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        queue_is_empty(&mut queue);
    }
}

async fn dropped_at_its_first_packet() {
    let (_listener, address) = listen(0);
    let mut queue = bind();
    let syn = Rule::new(Hook::Output).protocol(Protocol::Tcp).when(Match::tcp_syn()).priority(-1).count();
    let sent = crate::common::divert([syn]);
    let divert = table(all_tcp()).install().unwrap();
    let client = connect(address).await;
    confirm(next(&mut queue).await.drop().for_flow()).await.unwrap();
    crate::common::eventually("the segment is sent again", || sent.counters().unwrap()[0].packets >= 2).await;
    queue_is_empty(&mut queue);
    assert_eq!(queue.stats().received.packets, 1);
    divert.forget_flows().unwrap();
    confirm(next(&mut queue).await.reject().for_flow()).await.unwrap();
    let error = soon("the refusal", client).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}

async fn dropped_later() {
    let mut queue = bind();
    let _divert = table(all_tcp()).install().unwrap();
    let (mut client, mut server) = open(&mut queue, 0).await;
    client.write_all(b"question").unwrap();
    confirm(Decision::Drop.for_flow(next(&mut queue).await)).await.unwrap();
    server.write_all(b"answer").unwrap();
    for stream in [&mut client, &mut server] {
        stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        assert_eq!(stream.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
    queue_is_empty(&mut queue);
}
