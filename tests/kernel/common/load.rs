//! A steady load of numbered datagrams, limited by the buffers.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio_nfqueue::{Packet, Verdict};

use super::{PATIENCE, PORT, number, support};

/// How long the sender sleeps before it checks again whether it may send.
const PAUSE: Duration = Duration::from_micros(50);
/// The largest number of packets under way: fits in every buffer, and is more than all tasks hold.
const WINDOW: u32 = 300;

/// Sends numbers with a limited number under way, and collects what is delivered.
pub struct Load {
    done: Arc<AtomicU32>,
    sender: JoinHandle<()>,
    receiver: JoinHandle<Vec<u32>>,
}

impl Load {
    /// Every third packet is expected to be dropped, and then to be counted in `done`.
    pub fn start(count: u32) -> Self {
        let done = Arc::new(AtomicU32::new(0));
        let (from, to) = (support::udp((Ipv4Addr::LOCALHOST, 0)), support::udp((Ipv4Addr::LOCALHOST, PORT)));
        let sender = std::thread::spawn({
            let done = Arc::clone(&done);
            move || {
                let mut patience = Instant::now() + PATIENCE;
                for number in 0..count {
                    while number - done.load(SeqCst) >= WINDOW {
                        assert!(Instant::now() < patience, "{number} sent, {} done", done.load(SeqCst));
                        std::thread::sleep(PAUSE);
                    }
                    from.send_to(&number.to_be_bytes(), (Ipv4Addr::LOCALHOST, PORT)).unwrap();
                    patience = Instant::now() + PATIENCE;
                }
            }
        });
        let receiver = std::thread::spawn({
            let done = Arc::clone(&done);
            move || {
                let mut numbers = Vec::new();
                let mut datagram = [0; 4];
                let expected = accepted(count).count();
                // It ends after a timeout, and the numbers show what is missing.
                while numbers.len() < expected && to.recv(&mut datagram).is_ok() {
                    numbers.push(u32::from_be_bytes(datagram));
                    done.fetch_add(1, SeqCst);
                }
                numbers
            }
        });
        Self { done, sender, receiver }
    }

    pub fn decide(&self) -> impl Fn(Packet) -> Verdict + Clone + Send + 'static {
        let done = Arc::clone(&self.done);
        move |packet| {
            if number(&packet) % 3 == 2 {
                done.fetch_add(1, SeqCst);
                packet.drop()
            } else {
                packet.accept()
            }
        }
    }

    /// Waits until all datagrams are processed, and checks that exactly the right ones were
    /// delivered.
    pub async fn finish(self, count: u32) {
        // Both threads end if there is no progress for some time.
        while !self.sender.is_finished() || !self.receiver.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.sender.join().unwrap();
        let mut numbers = self.receiver.join().unwrap();
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(accepted(count)), "the wrong ones were delivered");
    }
}

fn accepted(count: u32) -> impl Iterator<Item = u32> {
    (0..count).filter(|number| number % 3 != 2)
}
