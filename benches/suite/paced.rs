//! Packets at a steady rate. Each carries its time of sending, from which its latency is computed.
//!
//! The kernel timestamps arrivals (`SO_TIMESTAMPNS`). The sender reads the timestamps between its
//! sends. So no third thread competes for two cores, and the wake-up of a reader is not part of the
//! latency.

use std::{
    io,
    io::IoSliceMut,
    net::{Ipv4Addr, UdpSocket},
    num::NonZeroU64,
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::{
        socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt},
        time::TimeSpec,
    },
};
use rustix::time::{ClockId, clock_gettime};

use super::{support, traffic};

/// Bytes of UDP payload: time of sending, number, padding.
pub const PAYLOAD: usize = 64;
pub const NUMBER: std::ops::Range<usize> = 8..16;
/// At rates above this (packets per second), one system call sends several packets.
const SINGLES: u64 = 100_000;
/// The sender does not sleep in this time before a packet is due.
const AWAKE: Duration = Duration::from_micros(100);
/// How long to wait for late packets.
const PATIENCE: Duration = Duration::from_millis(50);

pub struct Paced {
    out: UdpSocket,
    back: UdpSocket,
    per_send: usize,
    interval: Duration,
    sent: u64,
    /// Arrivals since the start of the last [`Paced::run`].
    pub arrivals: Vec<Arrival>,
}

/// Times in nanoseconds of the real-time clock.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    pub number: u64,
    pub sent: u64,
    pub arrived: u64,
}

impl Arrival {
    pub fn latency_us(&self) -> f64 {
        self.arrived.saturating_sub(self.sent) as f64 / 1000.0
    }
}

impl Paced {
    /// Packets on loopback, at `rate` per second.
    pub fn new(rate: u64) -> Self {
        let back = support::udp((Ipv4Addr::LOCALHOST, traffic::PORT));
        setsockopt(&back, sockopt::ReceiveTimestampns, &true).expect("set SO_TIMESTAMPNS");
        let out = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind a UDP socket");
        out.connect(back.local_addr().expect("it has an address")).expect("connect a UDP socket");
        traffic::grow_send_buffer(&out);
        let per_send = rate.div_ceil(SINGLES) as usize;
        if per_send > 1 {
            setsockopt(&out, sockopt::UdpGsoSegment, &(PAYLOAD as i32)).expect("set UDP_SEGMENT");
        }
        rustix::thread::set_current_timer_slack(NonZeroU64::new(1)).expect("set the timer slack");
        let interval = Duration::from_nanos(1_000_000_000 * per_send as u64 / rate);
        Self { out, back, per_send, interval, sent: 0, arrivals: Vec::new() }
    }

    /// Sends for `time`, waits for packets that are still queued, and returns how many packets it
    /// sent.
    pub fn run(&mut self, time: Duration) -> u64 {
        self.arrivals.clear();
        let (begin, before) = (Instant::now(), self.sent);
        let mut due = begin;
        while due < begin + time {
            self.wait_until(due);
            self.send();
            due += self.interval;
        }
        let sent = self.sent - before;
        let mut quiet_since = Instant::now();
        while (self.arrivals.len() as u64) < sent && quiet_since.elapsed() < PATIENCE {
            if self.collect() {
                quiet_since = Instant::now();
            }
        }
        sent
    }

    /// Sends one packet, to wake the consumer.
    pub fn kick(&mut self) {
        self.send();
    }

    fn wait_until(&mut self, due: Instant) {
        loop {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            if left > 2 * AWAKE {
                thread::sleep(left - AWAKE);
            } else if !self.collect() {
                std::hint::spin_loop();
            }
        }
    }

    fn send(&mut self) {
        let mut payload = [0; 64 * PAYLOAD];
        let stamp = now().to_ne_bytes();
        let length = self.per_send * PAYLOAD;
        for packet in payload[..length].chunks_exact_mut(PAYLOAD) {
            packet[..8].copy_from_slice(&stamp);
            packet[NUMBER].copy_from_slice(&self.sent.to_ne_bytes());
            self.sent += 1;
        }
        match self.out.send(&payload[..length]) {
            // A full queue drops new packets. The hook's verdict causes `EPERM`.
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => {}
            Err(error) => panic!("send: {error}"),
        }
    }

    /// Receives one packet. Returns whether there was one.
    fn collect(&mut self) -> bool {
        let mut payload = [0; PAYLOAD];
        let mut slices = [IoSliceMut::new(&mut payload)];
        let mut space = cmsg_space!(TimeSpec);
        let arrived = match recvmsg::<()>(self.back.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_DONTWAIT)
        {
            Ok(message) => message.cmsgs().expect("room for the timestamp").find_map(|control| match control {
                ControlMessageOwned::ScmTimestampns(time) => Some(time),
                _ => None,
            }),
            Err(Errno::EAGAIN) => return false,
            Err(error) => panic!("receive: {}", io::Error::from(error)),
        };
        let arrived = arrived.expect("a timestamp");
        let number = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
        self.arrivals.push(Arrival {
            number: number(&payload[NUMBER]),
            sent: number(&payload[..8]),
            arrived: arrived.tv_sec() as u64 * 1_000_000_000 + arrived.tv_nsec() as u64,
        });
        true
    }
}

/// Nanoseconds of the real-time clock, which the kernel uses for timestamps.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Realtime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
