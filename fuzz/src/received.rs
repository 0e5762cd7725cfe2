//! The whole way from the socket to the tasks, over a simulated kernel that sends anything.

use std::{cell::LazyCell, time::Duration};

use super::{edits::view, input::Input};
use tokio_nfqueue::{
    Action, Packet, Queue, QueueBuilder, TryRecvError,
    simulated::{self, TestPacket},
};

/// More steps take long and find no more.
const MOST_STEPS: usize = 64;
/// The mark of the last packet.
const LAST: u32 = 0x1a57_1a57;

thread_local! {
    static RUNTIME: LazyCell<tokio::runtime::Runtime> = const {
        LazyCell::new(|| tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime"))
    };
}

/// Puts datagrams of any content into the socket of a queue, between packets of the kernel.
pub fn received(data: &[u8]) {
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            run(&mut Input::new(data));
            // The queue's driver ends.
            for _ in 0..4 {
                tokio::task::yield_now().await;
            }
        });
    });
}

fn run(input: &mut Input<'_>) {
    let (kernel, mut queue) = simulated::queue(builder(input)).expect("the simulated kernel binds a queue");
    let [client, server] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse().expect("an address"));
    // From now on the clock stands still: deadlines pass only when it is moved.
    kernel.advance(Duration::ZERO);
    let mut held = Vec::new();
    let mut forged = 0;
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        match input.byte() % 16 {
            0..8 => {
                let datagram = input.bytes();
                forged += datagram.len();
                kernel.forge(0, datagram);
            }
            8 => _ = kernel.send(TestPacket::udp(client, server, input.take(8))),
            9 | 10 => held.extend(next(&mut queue)),
            11 => {
                if let Some(packet) = next(&mut queue) {
                    decide(packet, input);
                }
            }
            12 => {
                if !held.is_empty() {
                    let at = usize::from(input.byte()) % held.len();
                    decide(held.swap_remove(at), input);
                }
            }
            13 => kernel.advance(Duration::from_millis(input.short().into())),
            // EINTR, EAGAIN, ENOBUFS: not the end of a queue.
            14 => kernel.fail_receives([4, 11, 105][usize::from(input.byte() % 3)], 1),
            _ => _ = (queue.stats(), queue.sink().kernel_stats(), queue.sink().advice()),
        }
    }
    // The queue continues when the system call no longer fails.
    kernel.fail_receives(11, 0);
    let last = kernel.send(TestPacket::udp(client, server, b"last").mark(LAST));
    let mut found = false;
    while let Some(packet) = next(&mut queue) {
        found |= packet.mark() == LAST;
        held.push(packet);
    }
    if !found {
        // Its id lay in a gap behind a message without a readable id, so it got the default action.
        kernel.advance(Duration::from_secs(1));
        assert!(!last.is_waiting(), "the last packet was neither received nor decided");
    }
    let stats = queue.stats();
    // A held packet keeps a buffer of 8 KiB, 32 KiB or 72 KiB allocated.
    let bound = (held.len() + 1) * (80 << 10) + forged;
    assert!(stats.held.bytes <= bound, "{} bytes are held by {} packets", stats.held.bytes, held.len());
    drop(held);
}

fn builder(input: &mut Input<'_>) -> QueueBuilder {
    let options = input.byte();
    let mut builder = Queue::builder(0).conntrack(options & 1 != 0).gso(options & 2 != 0);
    if options & 4 != 0 {
        builder = builder.copy_range(u32::from(input.short()).clamp(1, nfqueue_proto::wire::MAX_PAYLOAD as u32));
    }
    if options & 8 != 0 {
        builder = builder.deadline(Duration::from_millis(u64::from(input.short()) + 1), Action::Accept);
    }
    builder
}

fn next(queue: &mut Queue) -> Option<Packet> {
    match queue.try_recv() {
        Ok(packet) => Some(look(packet)),
        Err(TryRecvError::Empty) => None,
        Err(error) => panic!("the queue has ended: {error}"),
    }
}

/// Reads everything that a packet has.
fn look(packet: Packet) -> Packet {
    let all = packet.attributes().map(|(_, value)| value.len()).sum::<usize>();
    assert!(packet.payload().len() <= all);
    assert_eq!(packet.payload(), &packet.payload_bytes()[..]);
    let _ = (packet.id(), packet.is_expired(), packet.original_len(), packet.is_truncated(), packet.family());
    let _ = (packet.hook(), packet.hw_protocol(), packet.mark(), packet.priority(), packet.timestamp());
    let _ = (packet.interface_in(), packet.interface_out(), packet.physical_in(), packet.physical_out());
    let _ = (packet.hardware_address(), packet.uid(), packet.gid(), packet.security_context(), packet.vlan());
    let _ = (packet.layer2_header(), packet.cgroup_class_id(), packet.conntrack(), packet.connection_state());
    let _ = (packet.is_checksum_ready(), packet.is_gso(), packet.is_checksum_unverified(), packet.addresses());
    let _ = format!("{packet:?}");
    if let Ok(packet) = packet.view() {
        view(&packet);
    }
    packet
}

/// Any verdict. The kernel refuses some, as it refuses those for packets that it does not have.
fn decide(packet: Packet, input: &mut Input<'_>) {
    let edit = packet.edit();
    let verdict = match input.byte() % 8 {
        0 => packet.accept(),
        1 => packet.drop(),
        2 => packet.accept().mark(input.word()),
        3 => packet.requeue(input.byte().into()),
        4 => packet.repeat(),
        5 => packet.accept().connection_mark(input.word(), u32::MAX),
        6 => match edit {
            Ok(mut edit) => {
                edit.set_ttl(input.byte());
                let _ = edit.replace_payload(input.bytes());
                packet.accept().payload(edit.finish())
            }
            Err(_) => return,
        },
        _ => return,
    };
    let _ = verdict.submit();
}
