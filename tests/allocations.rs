//! Memory is bounded: in the steady state, receiving and deciding packets allocates nothing per
//! packet. (What the simulated kernel allocates for its packets is not counted.)

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    time::Duration,
};

use tokio_nfqueue::{
    FlushPolicy, Queue,
    simulated::{self, TestPacket},
};

/// Counts the allocations of threads that want it.
struct Counting;

thread_local! {
    static COUNTED: Cell<Option<u64>> = const { Cell::new(None) };
}

// SAFETY: it only passes on to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNTED.set(COUNTED.get().map(|count| count + 1));
        // SAFETY: the caller's duties are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(body: impl FnOnce()) -> u64 {
    COUNTED.set(Some(0));
    body();
    COUNTED.take().expect("it was counted")
}

#[tokio::test]
async fn the_steady_state_allocates_nothing_per_packet() {
    const PACKETS: usize = 64;
    const ROUNDS: u64 = 30;
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1_u8)))), 1, "it counts");
    let policy = FlushPolicy::fixed(1000, Duration::from_secs(1));
    let (kernel, mut queue) = simulated::queue(Queue::builder(0).flush_policy(policy)).unwrap();
    kernel.advance(Duration::ZERO);
    let [client, server] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse().unwrap());
    for length in [10, 1400, 5000] {
        let payload = vec![7; length];
        let mut count = 0;
        for round in 0..2 * ROUNDS {
            let sent = kernel.send_all((0..PACKETS).map(|_| TestPacket::udp(client, server, &payload)));
            let of_round = allocations(|| {
                for number in 0..PACKETS {
                    let packet = queue.try_recv().unwrap();
                    assert_eq!(packet.payload().len(), 28 + length);
                    let verdict = if number % 3 == 0 { packet.drop() } else { packet.accept().mark(number as u32) };
                    verdict.submit().unwrap();
                }
            });
            // The first rounds fill the pools.
            if round >= ROUNDS {
                count += of_round;
            }
            queue.sink().flush().await;
            assert!(sent.iter().all(|sent| !sent.is_waiting()));
        }
        let packets = ROUNDS * PACKETS as u64;
        eprintln!("{length} bytes: {count} allocations for {packets} packets");
        assert!(count <= packets / 10, "{length} bytes: {count} allocations for {packets} packets");
    }
}
