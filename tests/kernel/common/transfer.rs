//! A megabyte over TCP, which must arrive unchanged.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    thread::JoinHandle,
};

use super::PATIENCE;

/// Bytes of a transfer.
pub const AMOUNT: usize = 1 << 20;

fn data() -> Vec<u8> {
    (0..AMOUNT).map(|index| (index % 251) as u8).collect()
}

/// Sends a transfer.
pub fn send_transfer(mut stream: TcpStream) {
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&data()).unwrap();
}

/// Receives a transfer in a separate thread.
pub fn receive_transfer(listener: TcpListener) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut received = vec![0; AMOUNT];
        stream.read_exact(&mut received).unwrap();
        assert!(received == data(), "the data came as they were sent");
    })
}
