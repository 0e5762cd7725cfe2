//! The floor: the least work that any program must do. Raw netlink loops that accept every packet
//! and check nothing.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::net::{RecvFlags, SendFlags, recv, send, sockopt};
use tokio::io::{Interest, unix::AsyncFd};

use super::consumer::{Consumer, Contender, Job, Runner, Threads, Until};

pub const ONE: Contender =
    Contender { name: "floor: recv 1, verdict 1", make: |job| Box::new(Floor::new(job, Floor::one)), queues: 1 };
pub const BATCH: Contender =
    Contender { name: "floor: one batch", make: |job| Box::new(Floor::new(job, Floor::batch)), queues: 1 };
pub const PACKED: Contender =
    Contender { name: "floor: packed singles", make: |job| Box::new(Floor::new(job, Floor::packed)), queues: 1 };

pub const ALL: [Contender; 3] = [ONE, BATCH, PACKED];

/// A Tokio program without any crate for NFQUEUE, on each runtime.
pub const ASYNC: [Contender; 2] = [
    Contender {
        name: "raw AsyncFd loop, current_thread",
        make: |job| Box::new(Async::new(job, Threads::One)),
        queues: 1,
    },
    Contender {
        name: "raw AsyncFd loop, multi_thread",
        make: |job| Box::new(Async::new(job, Threads::Two)),
        queues: 1,
    },
];

/// The most packets that are received before their verdicts are sent.
const GATHERED: usize = 64;
const ACCEPT: u32 = 1;
/// Longer than any message.
const ROOM: usize = 72 * 1024;

// uapi/linux/netfilter/nfnetlink_queue.h
const VERDICT: u16 = 3 << 8 | 1;
const CONFIG: u16 = 3 << 8 | 2;
const VERDICT_BATCH: u16 = 3 << 8 | 3;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const FLAG_GSO: u32 = 4;

struct Floor {
    socket: Socket,
    buffer: Vec<u8>,
    messages: Vec<u8>,
    round: fn(&mut Self) -> usize,
}

impl Floor {
    fn new(job: &Job, round: fn(&mut Self) -> usize) -> Self {
        let mut socket = Socket::new(NETLINK_NETFILTER).expect("open a netlink socket");
        socket.bind_auto().expect("bind a netlink socket");
        socket.set_no_enobufs(true).expect("set NETLINK_NO_ENOBUFS");
        let half = job.receive_buffer / 2;
        if sockopt::set_socket_recv_buffer_size_force(&socket, half).is_err() {
            sockopt::set_socket_recv_buffer_size(&socket, half).expect("set SO_RCVBUF");
        }
        let mut floor = Self { socket, buffer: vec![0; ROOM], messages: Vec::new(), round };
        floor.configure(job);
        floor
    }

    fn configure(&mut self, job: &Job) {
        let flags = if job.gso { FLAG_GSO } else { 0 };
        let [a, b, c, d] = job.copy_range.to_be_bytes();
        // NFQA_CFG_CMD { BIND }, NFQA_CFG_PARAMS { range, COPY_PACKET } and padding, QUEUE_MAXLEN,
        // MASK, FLAGS
        let mut attributes = vec![8, 0, 1, 0, 1, 0, 0, 0, 9, 0, 2, 0, a, b, c, d, 2, 0, 0, 0];
        for (kind, value) in [(3, job.max_len), (4, FLAG_GSO), (5, flags)] {
            attributes.extend([8, 0, kind, 0]);
            attributes.extend(value.to_be_bytes());
        }
        push(&mut self.messages, CONFIG, REQUEST | ACK, &[&attributes]);
        self.socket.send_to(&self.messages, &SocketAddr::new(0, 0), 0).expect("send the configuration");
        self.messages.clear();
        let (answer, _) = self.socket.recv_from_full().expect("receive the reply");
        assert_eq!(answer.get(16..20), Some(&[0; 4][..]), "bind a queue with raw messages: {answer:?}");
    }

    fn one(&mut self) -> usize {
        self.one_with(&[])
    }

    /// `more` follows the verdict in the message.
    fn one_with(&mut self, more: &[u8]) -> usize {
        let id = self.receive(RecvFlags::empty()).expect("a blocking read brings a packet");
        push_verdict(&mut self.messages, VERDICT, id, more);
        self.send();
        1
    }

    fn batch(&mut self) -> usize {
        let mut last = self.receive(RecvFlags::empty()).expect("a blocking read brings a packet");
        let mut count = 1;
        while count < GATHERED
            && let Some(id) = self.receive(RecvFlags::DONTWAIT)
        {
            (last, count) = (id, count + 1);
        }
        push_verdict(&mut self.messages, VERDICT_BATCH, last, &[]);
        self.send();
        count
    }

    fn packed(&mut self) -> usize {
        let first = self.receive(RecvFlags::empty()).expect("a blocking read brings a packet");
        push_verdict(&mut self.messages, VERDICT, first, &[]);
        let mut count = 1;
        while count < GATHERED
            && let Some(id) = self.receive(RecvFlags::DONTWAIT)
        {
            push_verdict(&mut self.messages, VERDICT, id, &[]);
            count += 1;
        }
        self.send();
        count
    }

    /// The id of the next packet, `None` if there is none.
    fn receive(&mut self, flags: RecvFlags) -> Option<[u8; 4]> {
        match recv(&self.socket, &mut self.buffer[..], flags) {
            // Behind nlmsghdr, nfgenmsg and the header of the first attribute is the id.
            Ok(_) => Some(*self.buffer[24..].first_chunk().expect("the buffer is longer")),
            Err(rustix::io::Errno::AGAIN) => None,
            Err(error) => panic!("receive a packet: {error}"),
        }
    }

    fn send(&mut self) {
        send(&self.socket, &self.messages, SendFlags::empty()).expect("send verdicts");
        self.messages.clear();
    }
}

impl Consumer for Floor {
    fn consume(&mut self, until: &Arc<Until>) {
        while !until.over() {
            let packets = (self.round)(self);
            until.both(packets);
        }
    }
}

/// Reads until `EAGAIN`, and sends the verdict of each packet at once.
struct Async {
    /// The queue, while no task uses it. Dropped before the runtime.
    floor: Option<AsyncFd<Floor>>,
    runner: Runner,
}

impl Async {
    fn new(job: &Job, threads: Threads) -> Self {
        let runner = Runner::new(threads);
        let inside = runner.runtime.enter();
        // SAFETY: a floor has one socket from its start to its end.
        let floor = unsafe { AsyncFd::register(Floor::new(job, Floor::one)) }.expect("register a socket");
        drop(inside);
        Self { floor: Some(floor), runner }
    }
}

impl Consumer for Async {
    fn consume(&mut self, until: &Arc<Until>) {
        let (mut floor, until) = (self.floor.take().expect("no task uses it"), Arc::clone(until));
        self.floor = Some(self.runner.run(async move {
            let receive =
                |floor: &mut Floor| floor.receive(RecvFlags::DONTWAIT).ok_or(io::ErrorKind::WouldBlock.into());
            while !until.over() {
                let id = floor.async_io_mut(Interest::READABLE, receive).await.expect("receive a packet");
                push_verdict(&mut floor.get_mut().messages, VERDICT, id, &[]);
                // The kernel reads verdicts within the system call, so none waits.
                let send = |floor: &mut Floor| {
                    floor.send();
                    Ok(())
                };
                floor.async_io_mut(Interest::WRITABLE, send).await.expect("send a verdict");
                until.both(1);
            }
            floor
        }));
    }
}

impl AsRawFd for Floor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// As a C program that leaves the rest of a connection to rules: accepts each packet with a mark,
/// until `over`. A packet wakes it. `bound` is called when the queue is bound.
pub fn mark_all(job: &Job, mark: u32, bound: impl FnOnce(), mut over: impl FnMut() -> bool) {
    let mut floor = Floor::new(job, Floor::one);
    bound();
    let [a, b, c, d] = mark.to_be_bytes();
    while !over() {
        // NFQA_MARK
        floor.one_with(&[8, 0, 3, 0, a, b, c, d]);
    }
}

fn push_verdict(messages: &mut Vec<u8>, kind: u16, id: [u8; 4], more: &[u8]) {
    let mut header = [12, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    header[4..8].copy_from_slice(&ACCEPT.to_be_bytes());
    header[8..].copy_from_slice(&id);
    push(messages, kind, REQUEST, &[&header, more]);
}

fn push(messages: &mut Vec<u8>, kind: u16, flags: u16, attributes: &[&[u8]]) {
    let mut header = [0; 20];
    let length: usize = attributes.iter().map(|attributes| attributes.len()).sum();
    header[..4].copy_from_slice(&(20 + length as u32).to_ne_bytes());
    header[4..6].copy_from_slice(&kind.to_ne_bytes());
    header[6..8].copy_from_slice(&flags.to_ne_bytes());
    messages.extend_from_slice(&header);
    attributes.iter().for_each(|attributes| messages.extend_from_slice(attributes));
}
