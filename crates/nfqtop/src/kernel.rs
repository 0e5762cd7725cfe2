//! What the kernel prints in `/proc`: its queues, and its netlink sockets. Text in, values out.

/// A line of `/proc/net/netfilter/nfnetlink_queue`: a queue that a socket has bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueueLine {
    pub(crate) number: u16,
    /// The netlink port id of the socket that has bound it.
    pub(crate) port: u32,
    /// Packets that wait for a verdict, unread ones included.
    pub(crate) length: u32,
    pub(crate) copy: Copy,
    /// Bytes of each packet that are copied.
    pub(crate) copy_range: u32,
    /// Packets that found the queue full. Wraps.
    pub(crate) queue_dropped: u32,
    /// Packets that found the socket's receive buffer full. Wraps.
    pub(crate) user_dropped: u32,
    /// The last id that a packet has got. Wraps.
    pub(crate) last_id: u32,
}

/// What of a packet the program gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Copy {
    /// The program has not set its mode; the kernel drops every packet.
    None,
    Metadata,
    Packet,
    /// A mode that this program does not know.
    Other,
}

impl Copy {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Metadata => "metadata",
            Self::Packet => "packet",
            Self::Other => "unknown",
        }
    }
}

impl QueueLine {
    /// Packets that had an id and are not in the queue any more, those lost to the receive buffer
    /// left out: they got a verdict, or were flushed. Wraps.
    pub(crate) fn left(&self) -> u32 {
        self.last_id.wrapping_sub(self.length).wrapping_sub(self.user_dropped)
    }
}

/// All lines that have the expected form (`seq_show` in nfnetlink_queue.c): queue, port id, length,
/// copy mode, copy range, dropped by the queue, dropped by the socket, last id, 1.
pub(crate) fn queues(text: &str) -> Vec<QueueLine> {
    text.lines().filter_map(queue).collect()
}

fn queue(line: &str) -> Option<QueueLine> {
    let mut fields = line.split_ascii_whitespace();
    // The port id is printed as a signed number.
    let mut next = || fields.next()?.parse::<i64>().ok().map(|number| number as u32);
    let (number, port, length, mode) = (u16::try_from(next()?).ok()?, next()?, next()?, next()?);
    let copy = match mode {
        0 => Copy::None,
        1 => Copy::Metadata,
        2 => Copy::Packet,
        _ => Copy::Other,
    };
    let (copy_range, queue_dropped, user_dropped, last_id) = (next()?, next()?, next()?, next()?);
    Some(QueueLine { number, port, length, copy, copy_range, queue_dropped, user_dropped, last_id })
}

/// A line of `/proc/net/netlink`: a netlink socket of netfilter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SocketLine {
    /// The netlink port id.
    pub(crate) port: u32,
    /// The number in `socket:[...]`, the target of `/proc/PID/fd/N`.
    pub(crate) inode: u64,
    /// What the program has not read, in bytes as the kernel accounts them.
    pub(crate) unread: u32,
}

/// NETLINK_NETFILTER
const NETFILTER: &str = "12";

/// The sockets of netfilter that have a port id (`netlink_native_seq_show` in af_netlink.c): sk,
/// protocol, port id, groups, rmem, wmem, dump, locks, drops, inode.
pub(crate) fn sockets(text: &str) -> Vec<SocketLine> {
    text.lines().filter_map(socket).collect()
}

fn socket(line: &str) -> Option<SocketLine> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    if fields.next()? != NETFILTER {
        return None;
    }
    let mut number = |skip| fields.nth(skip)?.parse::<i64>().ok();
    let (port, unread, inode) = (number(0)? as u32, number(1)? as u32, number(4)? as u64);
    (port != 0).then_some(SocketLine { port, inode, unread })
}

/// The state of a process in the text of `/proc/PID/stat`: `T` if it is stopped.
pub(crate) fn process_state(stat: &str) -> Option<char> {
    // The name stands in parentheses, and may contain some.
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Text from outside, fit for a terminal: without control characters.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_queues_are_parsed() {
        let text = "    5  -4096     3 2 65531     7     8       99  1\n\n    6  12 0 0 0 0 0 0 1\n70000 1 1 1 1 1 1 1 1\n7 1 2\n";
        let queues = queues(text);
        let expected = QueueLine {
            number: 5,
            port: -4096_i32 as u32,
            length: 3,
            copy: Copy::Packet,
            copy_range: 65531,
            queue_dropped: 7,
            user_dropped: 8,
            last_id: 99,
        };
        assert_eq!(queues[0], expected);
        assert_eq!(queues[0].left(), 88);
        assert_eq!((queues[1].number, queues[1].copy), (6, Copy::None));
        assert_eq!(queues.len(), 2, "lines of another form are skipped");
    }

    #[test]
    fn sockets_of_netfilter_are_parsed() {
        let text = "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n\
                    0000000000000000 0   1234       00000000 0        0        0     2        0        777     \n\
                    0000000000000000 12  0          00000000 0        0        0     2        0        778     \n\
                    0000000000000000 12  4294963200 00000000 2496     0        0     2        5        779     \n";
        assert_eq!(sockets(text), [SocketLine { port: -4096_i32 as u32, inode: 779, unread: 2496 }]);
    }

    #[test]
    fn the_state_of_a_process_with_a_strange_name_is_found() {
        assert_eq!(process_state("12 (a) S (b) T 1 2 3"), Some('T'));
        assert_eq!(process_state("12"), None);
    }

    #[test]
    fn escape_sequences_are_not_printed() {
        assert_eq!(printable("a\x1b[31mb"), "a?[31mb");
    }
}
