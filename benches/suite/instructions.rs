//! Instructions per packet, counted by valgrind in a process of its own, over a simulated kernel:
//! the same on an idle host as on a busy one.

use std::{net::SocketAddr, process::Command};

use tokio::runtime::Builder;
use tokio_nfqueue::{
    Queue,
    simulated::{self, TestPacket},
};

use super::summary::Book;

pub const SECTION: &str = "instructions";
pub const COUNT: &str = "instructions/packet";
const ONE: &str = "one at a time";
const BURSTS: &str = "in bursts of 64";
pub const ALL: [&str; 2] = [ONE, BURSTS];
/// Of the bench gate. They contain the simulated kernel, and the reading of each outcome.
pub const LIMITS: [f64; 2] = [11_900.0, 6_000.0];

const TASK: &str = "instructions";
const PACKETS: [u64; 2] = [1_280, 3_840];

/// Notes nothing if valgrind is not installed.
pub fn measure(way: &str, book: &mut Book) {
    let [few, many] = PACKETS.map(|packets| count(way, packets));
    if let (Some(few), Some(many)) = (few, many) {
        // Without what the start costs.
        book.note(SECTION, way, COUNT, (many - few) / (PACKETS[1] - PACKETS[0]) as f64);
    }
}

fn count(way: &str, packets: u64) -> Option<f64> {
    let program = std::env::current_exe().expect("this program's path");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(["--child", TASK, way, &packets.to_string()])
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "valgrind failed: {text}");
    let count = text.lines().find_map(|line| line.split_once("Collected :")).expect("valgrind tells the count").1;
    Some(count.trim().parse().expect("a number"))
}

pub fn is_task(task: &[String]) -> bool {
    task.first().is_some_and(|name| name == TASK)
}

/// Runs in the child.
pub fn run(task: &[String]) {
    let [_, way, packets] = task else { panic!("the task has two arguments") };
    let packets: usize = packets.parse().expect("a number");
    let burst = if way == BURSTS { 64 } else { 1 };
    let [client, server] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse::<SocketAddr>().unwrap());
    let packet = TestPacket::udp(client, server, &[0x45; 64]);
    let runtime = Builder::new_current_thread().enable_all().build().expect("start a runtime");
    runtime.block_on(async {
        let (kernel, mut queue) = simulated::queue(Queue::builder(0)).expect("a queue");
        for _ in 0..packets / burst {
            let sent = kernel.send_all(std::iter::repeat_n(packet.clone(), burst));
            for _ in 0..burst {
                let packet = queue.recv().await.expect("a packet").expect("no failure");
                packet.accept().submit().expect("it is open");
            }
            queue.sink().flush().await;
            assert!(sent.iter().all(|sent| sent.try_outcome().is_some_and(|outcome| outcome.accepted)));
        }
    });
}
