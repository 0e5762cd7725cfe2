//! Tools for the tests of queues: numbered datagrams over loopback, time limits, and the kernel's
//! own counters.
//!
//! Most tests queue at the input hook. There a packet no longer counts against its sender's buffer,
//! and an accepted packet is in the receiver's buffer when the send of the verdict returns. So
//! after `VerdictSink::flush` a packet that was not delivered will not be delivered.

// Every user of this module uses a different part of it.
#![allow(dead_code, unreachable_pub, unused_imports, unused_macros)]

mod counters;
mod load;
mod transfer;

use std::{
    collections::BTreeMap,
    fs,
    future::Future,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use futures::{FutureExt, Stream, StreamExt};
use libtest_mimic::Trial;
use rustix::thread::{CapabilitySet, CapabilitySets};
use tokio_nfqueue::{Error, FlushPolicy, Packet, Queue, QueueBuilder};

pub use self::{
    counters::{descriptor_of, udp_counter},
    load::Load,
    transfer::{AMOUNT, receive_transfer, send_transfer},
};
use crate::support;
pub use crate::support::{PATIENCE, SLOWNESS, lose_connections, many, random::Random, rules};
pub use nfqueue_divert::Divert;
pub use tokio_nfqueue::{Hook, Protocol, Rule};

/// The receivers' first port.
pub const PORT: u16 = 9000;
/// This number of small datagrams fits in one receiver's buffer, whatever the system's limit.
pub const ROOM: u32 = 200;

/// A deadline long enough that packets are handed out before it, on a slow machine as well as on
/// one that stops the test for more than a second.
pub const DEADLINE: Duration = Duration::from_secs(3);

/// Lists a module's tests: `tests![both accept, one drop]`; see [`both`], [`one`], [`multi`] and
/// [`sync`]. The names of the tests begin with the module's.
macro_rules! tests {
    ($($kind:ident $name:ident),* $(,)?) => {
        pub(crate) fn tests() -> Vec<libtest_mimic::Trial> {
            let name = |name| $crate::common::test_name(module_path!(), name);
            let tests = [$($crate::common::$kind(&name(stringify!($name)), $name)),*];
            tests.into_iter().flatten().collect()
        }
    };
}

/// Asserts the values of fields and names those that differ: `assert_fields!(stats,
/// decided.accepted: 2)`.
macro_rules! assert_fields {
    ($value:expr, $($($field:ident).+: $expected:expr),+ $(,)?) => {{
        let value = &$value;
        let mut wrong = Vec::new();
        $(
            let expected = $expected;
            if value.$($field).+ != expected {
                wrong.push(format!("{} is {:?}, not {expected:?}", stringify!($($field).+), value.$($field).+));
            }
        )+
        assert!(wrong.is_empty(), "{}; {value:?}", wrong.join(", "));
    }};
}

/// Runs what catches a panic of its own, whose message would look like that of a failed test.
pub fn without_panic_messages<T>(body: impl FnOnce() -> T) -> T {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let result = body();
    std::panic::set_hook(hook);
    result
}

/// Binds a queue that has no rules of its own, which needs no waiting.
pub fn bind_now(builder: QueueBuilder) -> Queue {
    builder.bind().now_or_never().expect("bound at once").expect("bind the queue")
}

/// The name of a test in the module with this path: `close::close_times_out`. In submodules too,
/// the name begins with the module directly below the crate.
pub fn test_name(module_path: &str, name: &str) -> String {
    let module = module_path.split("::").nth(1).expect("a module below the crate");
    format!("{module}::{name}")
}

/// A test in a current-thread and in a multi-thread runtime.
pub fn both<F: Future<Output = ()>>(name: &str, body: impl FnOnce() -> F + Copy + Send + 'static) -> Vec<Trial> {
    vec![support::test(name, body), support::test_multi(&format!("{name}::two_workers"), body)]
}

/// A test in a current-thread runtime, if the runtime makes no difference or the thread matters.
pub fn one<F: Future<Output = ()>>(name: &str, body: impl FnOnce() -> F + Send + 'static) -> Vec<Trial> {
    vec![support::test(name, body)]
}

/// A test in a multi-thread runtime.
pub fn multi<F: Future<Output = ()>>(name: &str, body: impl FnOnce() -> F + Send + 'static) -> Vec<Trial> {
    vec![support::test_multi(name, body)]
}

/// A test that creates its own runtimes.
pub fn sync(name: &str, body: impl FnOnce() + Send + 'static) -> Vec<Trial> {
    vec![support::test_sync(name, body)]
}

/// Awaits a future that must complete.
///
/// # Panics
/// After [`PATIENCE`].
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited {PATIENCE:?} in vain for {what}"),
    }
}

/// Waits until `condition` holds, while the runtime runs other tasks.
///
/// # Panics
/// After [`PATIENCE`].
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let holds = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon(what, holds).await;
}

/// Lets the kernel send as many ICMP errors as there are reasons for.
pub fn unlimited_icmp_errors() {
    for file in ["ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"] {
        fs::write(format!("/proc/sys/net/{file}"), "0").unwrap();
    }
    // The limit for all receivers together (`icmp_global_allow`).
    fs::write("/proc/sys/net/ipv4/icmp_ratemask", "0").unwrap();
}

/// Installs rules.
pub fn divert(rules: impl IntoIterator<Item = Rule>) -> Divert {
    Divert::builder().rules(rules).install().expect("install rules")
}

/// The condition of the usual rule: UDP at the input hook.
pub fn udp_in() -> Rule {
    Rule::new(Hook::Input).protocol(Protocol::Udp)
}

/// Binds a queue and sends all received UDP to it.
pub fn start(builder: QueueBuilder) -> (Queue, Divert) {
    let queue = bind_now(builder);
    let divert = divert([udp_in().to_queue(queue.queue_number())]);
    (queue, divert)
}

/// The next packet.
pub async fn next(stream: &mut (impl Stream<Item = Result<Packet, Error>> + Unpin)) -> Packet {
    let item = soon("a packet", stream.next()).await;
    item.expect("the stream continues").expect("a packet and no error")
}

/// Sends numbers and takes their packets, in portions that fit in any buffer.
pub async fn hold(
    stream: &mut (impl Stream<Item = Result<Packet, Error>> + Unpin),
    traffic: &Traffic,
    numbers: impl IntoIterator<Item = u32>,
) -> Vec<Packet> {
    let numbers: Vec<u32> = numbers.into_iter().collect();
    let mut held = Vec::new();
    for portion in numbers.chunks(100) {
        traffic.send(portion.iter().copied());
        for _ in portion {
            held.push(next(stream).await);
        }
    }
    held
}

/// The number that a packet carries: the last four bytes.
pub fn number(packet: &Packet) -> u32 {
    u32::from_be_bytes(*packet.payload().last_chunk().expect("a number"))
}

/// Numbered datagrams over loopback, and their receivers.
pub struct Traffic {
    pub sender: UdpSocket,
    receivers: Vec<tokio::net::UdpSocket>,
}

impl Traffic {
    /// With receivers whose buffers hold the numbers from 0 to `count`.
    pub fn new(count: u32) -> Self {
        let receivers = (0..count.div_ceil(ROOM).max(1) as u16).map(|index| {
            let socket = support::udp((Ipv4Addr::LOCALHOST, PORT + index));
            socket.set_nonblocking(true).expect("set non-blocking");
            tokio::net::UdpSocket::from_std(socket).expect("register a receiver")
        });
        Self { receivers: receivers.collect(), sender: support::udp((Ipv4Addr::LOCALHOST, 0)) }
    }

    /// The receiver of a number.
    pub fn to(&self, number: u32) -> SocketAddr {
        let index = (number / ROOM) as usize % self.receivers.len();
        (Ipv4Addr::LOCALHOST, PORT + index as u16).into()
    }

    pub fn send(&self, numbers: impl IntoIterator<Item = u32>) {
        self.send_from(&self.sender, numbers);
    }

    pub fn send_from(&self, sender: &UdpSocket, numbers: impl IntoIterator<Item = u32>) {
        for number in numbers {
            sender.send_to(&number.to_be_bytes(), self.to(number)).expect("send a datagram");
        }
    }

    /// Sends each number from an address of its own. The hash that spreads packets over queues
    /// covers the addresses, and its seed is random: 40 numbers reach two queues for sure.
    pub fn send_from_many(&self, numbers: impl IntoIterator<Item = u32>) {
        for number in numbers {
            self.send_from(&support::udp((Ipv4Addr::new(127, 0, 1, number as u8), 0)), [number]);
        }
    }

    /// What has been delivered and not yet taken. Does not wait.
    pub fn delivered(&self) -> Vec<u32> {
        let mut numbers = Vec::new();
        for receiver in &self.receivers {
            // Not `try_recv`, which returns nothing before the runtime has noticed the datagram.
            let receiver = rustix::fd::AsFd::as_fd(receiver);
            let mut datagram = [0; 4];
            while rustix::net::recv(receiver, &mut datagram, rustix::net::RecvFlags::DONTWAIT).is_ok() {
                numbers.push(u32::from_be_bytes(datagram));
            }
        }
        numbers
    }

    /// Waits for these numbers, in any order, and checks that no others have been delivered by
    /// then.
    pub async fn expect(&self, numbers: impl IntoIterator<Item = u32>) {
        let mut balance = BTreeMap::<u32, i32>::new();
        let mut missing = 0;
        for number in numbers {
            *balance.entry(number).or_default() -= 1;
            missing += 1;
        }
        let deadline = Instant::now() + PATIENCE;
        let mut come = 0;
        loop {
            for number in self.delivered() {
                *balance.entry(number).or_default() += 1;
                come += 1;
            }
            if come >= missing || Instant::now() > deadline {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        balance.retain(|_, balance| *balance != 0);
        assert!(balance.is_empty(), "wrongly delivered (-1: not at all): {balance:?}");
    }

    /// Checks that nothing has been delivered.
    #[track_caller]
    pub fn expect_nothing(&self) {
        assert_eq!(self.delivered(), [] as [u32; 0], "nothing should have been delivered");
    }
}

/// The kernel's counters of a queue in `/proc`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// Packets in the queue.
    pub waiting: u64,
    /// Dropped because the queue was full.
    pub queue_full: u64,
    /// Dropped because the receive buffer was full.
    pub socket_full: u64,
    /// The last packet's id.
    pub last_id: u64,
}

/// The kernel's counters of a queue; `None` if it is not bound.
pub fn account(queue: u16) -> Option<Account> {
    let [_, _, waiting, _, _, queue_full, socket_full, last_id, _] = support::queue_line(queue)?;
    Some(Account { waiting, queue_full, socket_full, last_id })
}

/// Waits until so many packets have been queued since the queue was bound: on a busy machine a
/// datagram may come to the queue after the call that sends it has returned (`ksoftirqd`).
#[track_caller]
pub fn queued(queue: u16, count: u64) {
    support::wait_until("the packets are queued", || account(queue).is_some_and(|account| account.last_id >= count));
}

/// Waits until the queue is not bound. Another thread may have to unbind a dropped queue.
pub async fn freed(queue: u16) {
    eventually("the queue is free", || account(queue).is_none()).await;
}

/// Takes all capabilities from the calling thread, permanently.
pub fn give_up_capabilities() {
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, none).expect("give capabilities up");
}

/// A policy by which verdicts are sent by `flush` and `confirm`. The timer thread, which keeps the
/// capabilities that the calling thread has given up, would send them only after a second.
pub fn not_by_the_timer() -> FlushPolicy {
    FlushPolicy::fixed(20, Duration::from_secs(1))
}

/// Runs `body` while the calling thread has no effective `CAP_NET_ADMIN`.
pub fn without_net_admin<T>(body: impl FnOnce() -> T) -> T {
    struct Restore(CapabilitySets);
    impl Drop for Restore {
        fn drop(&mut self) {
            rustix::thread::set_capabilities(None, self.0).expect("raise a capability again");
        }
    }
    let held = rustix::thread::capabilities(None).expect("read capabilities");
    let _restore = Restore(held);
    let effective = held.effective - CapabilitySet::NET_ADMIN;
    rustix::thread::set_capabilities(None, CapabilitySets { effective, ..held }).expect("lower a capability");
    body()
}

/// Whether the kernel takes replaced payloads here: Linux 7.1 and later only in network namespaces
/// that the initial user namespace owns (`nfqnl_mangle`). The user namespace of this process owns
/// those of the tests.
pub fn replaces_payloads() -> bool {
    kernel_release() < (7, 1) || in_the_initial_user_namespace()
}

/// Whether it takes replaced payloads in the bridge family: Linux 7.2 and later do not
/// (`nfqnl_validate_write`).
pub fn replaces_bridge_payloads() -> bool {
    kernel_release() < (7, 2) && replaces_payloads()
}

pub fn in_the_initial_user_namespace() -> bool {
    // PROC_USER_INIT_INO, 0xeffffffd
    let link = fs::read_link("/proc/self/ns/user").expect("the user namespace");
    link.as_os_str() == "user:[4026531837]"
}

/// The first two numbers of the kernel's release.
pub fn kernel_release() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The id of this process's root in the parent user namespace.
pub fn outer_id(map: &str) -> u32 {
    let map = fs::read_to_string(format!("/proc/self/{map}")).expect("the map of the user namespace");
    let outer = map.split_ascii_whitespace().nth(1).expect("an outer id");
    outer.parse().expect("a number")
}
