//! The process that owns the queue is stopped, and continues later.

use std::time::Duration;

use super::process::{Counted, Process};
use crate::common::{DEADLINE, Traffic, account, divert, eventually, udp_in};

tests![
    one a_stopped_process_loses_no_packet_that_the_queue_holds,
    one a_stopped_process_with_a_full_queue_loses_what_the_kernel_counts,
    one deadlines_that_expired_in_a_stopped_process_are_kept_when_it_goes_on,
];

/// Sends these numbers in two seconds.
async fn send_slowly(traffic: &Traffic, numbers: std::ops::Range<u32>) {
    let pause = Duration::from_secs(2) / (numbers.end - numbers.start);
    for number in numbers {
        traffic.send([number]);
        tokio::time::sleep(pause).await;
    }
}

async fn a_stopped_process_loses_no_packet_that_the_queue_holds() {
    let _divert = divert([udp_in().to_queue(0)]);
    let (mut owner, _) = Process::start("serve");
    let traffic = Traffic::new(200);
    traffic.send(0..50);
    owner.stop();
    send_slowly(&traffic, 50..200).await;
    assert_eq!(account(0).unwrap().waiting as usize + traffic.delivered().len(), 200);
    owner.resume();
    eventually("all are decided", || account(0).unwrap().waiting == 0).await;
    assert_eq!(owner.end(), Counted { received: 200, accepted: 200, expired: 0, lost: 0 });
}

async fn a_stopped_process_with_a_full_queue_loses_what_the_kernel_counts() {
    let divert = divert([udp_in().to_queue(0)]);
    let (mut owner, _) = Process::start("serve 50");
    let traffic = Traffic::new(200);
    owner.stop();
    traffic.send(0..150);
    eventually("the kernel has seen all packets", || account(0).unwrap().queue_full == 100).await;
    owner.resume();
    traffic.expect(0..50).await;
    traffic.send(150..200);
    traffic.expect(150..200).await;
    let kernel = account(0).unwrap();
    assert_eq!((kernel.queue_full, kernel.socket_full), (100, 0));
    assert_eq!(owner.end(), Counted { received: 100, accepted: 100, expired: 0, lost: 0 });
    drop(divert);
}

async fn deadlines_that_expired_in_a_stopped_process_are_kept_when_it_goes_on() {
    let _divert = divert([udp_in().to_queue(0)]);
    let (mut owner, _) = Process::start("hold");
    let traffic = Traffic::new(100);
    traffic.send(0..100);
    // It has received some of them, or all.
    owner.stop();
    tokio::time::sleep(2 * DEADLINE).await;
    owner.resume();
    traffic.expect(0..100).await;
    assert_eq!(owner.end(), Counted { received: 100, accepted: 100, expired: 100, lost: 0 });
}
