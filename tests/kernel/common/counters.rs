//! What the kernel says about sockets and packets in `/proc`.

use std::fs;

use super::support;

/// The number of the descriptor of the netlink socket that owns a queue, in this namespace.
pub fn descriptor_of(queue: u16) -> i32 {
    let [_, port, ..] = support::queue_line(queue).expect("the queue is bound");
    // sk, protocol, port id, groups, memory, memory, dump, locks, drops, inode
    let sockets = fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
    let inode = sockets
        .lines()
        .map(|line| line.split_ascii_whitespace().collect::<Vec<_>>())
        .find(|fields| fields[1] == "12" && fields[2].parse() == Ok(port))
        .map(|fields| fields[9].to_owned())
        .expect("a netlink socket with this port id");
    let link = format!("socket:[{inode}]");
    let of_this_process = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let found = of_this_process.filter(|path| fs::read_link(path).is_ok_and(|to| to.as_os_str() == &*link));
    let numbers: Vec<i32> = found.map(|path| path.file_name().unwrap().to_str().unwrap().parse().unwrap()).collect();
    let [number] = numbers[..] else { panic!("{numbers:?}") };
    number
}

/// A counter of UDP in this network namespace, by its name in `/proc/net/snmp`.
pub fn udp_counter(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/snmp").expect("the counters of UDP");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp:"));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let mut pairs = names.split_ascii_whitespace().zip(values.split_ascii_whitespace());
    let found = pairs.find(|(found, _)| *found == name).map(|(_, value)| value.parse());
    found.expect("a counter").expect("a number")
}
