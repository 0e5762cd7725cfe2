//! A steady load of numbered datagrams, as much as the buffers can bear.

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

/// How long a sender waits before it looks again whether there is room.
const PAUSE: Duration = Duration::from_micros(50);
/// Packets on their way at most: what fits in every buffer, and is more than all tasks hold.
const WINDOW: u32 = 300;

/// Sends numbers, never too many at a time, and collects what is delivered.
pub struct Load {
    done: Arc<AtomicU32>,
    sender: JoinHandle<()>,
    receiver: JoinHandle<Vec<u32>>,
}

impl Load {
    /// Every third packet is expected to be dropped, and each such to be counted in `done`.
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
                // A timeout ends it, and the numbers tell what is missing.
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

    /// Waits for the end, and sees to it that exactly the right ones were delivered.
    pub async fn finish(self, count: u32) {
        // Both end by themselves when there is no progress for a while.
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
