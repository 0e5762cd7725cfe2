//! What a program sends to a simulated kernel, and a simulated kernel to it.

use std::time::Duration;

use super::input::Input;
use tokio_nfqueue::simulated::{Kernel, TestPacket};

/// More messages take long and find no more.
const MOST: usize = 64;

/// Sends datagrams of any content to a simulated kernel, and packets through it.
pub fn requests(data: &[u8]) {
    let mut input = Input::new(data);
    let kernel = Kernel::new();
    let sockets = [true, false].map(|no_enobufs| kernel.raw_socket(no_enobufs));
    let mut sent = Vec::new();
    for _ in 0..MOST {
        if input.is_empty() {
            break;
        }
        match input.byte() % 8 {
            0..4 => {
                let socket = &sockets[usize::from(input.flag())];
                socket.send(input.bytes()).expect("it is shorter than the longest");
            }
            4 => {
                let packet =
                    TestPacket::raw(input.bytes().to_vec()).gso(input.short() % 64).to_queue(input.byte().into());
                sent.push(kernel.send(if input.flag() { packet.checksum_unfinished() } else { packet }));
            }
            5 => kernel.advance(Duration::from_millis(input.byte().into())),
            6 => kernel.take_interface_down(input.byte().into()),
            _ => sockets.iter().for_each(|socket| while socket.receive().is_ok() {}),
        }
    }
    // What the kernel held for the sockets is dropped, and nothing waits any more.
    drop(sockets);
    assert!(sent.iter().all(|packet| !packet.is_waiting()));
}
