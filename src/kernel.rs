//! The kernel's own account of its queues: `/proc/net/netfilter/nfnetlink_queue`.

use std::{fs::File, io, os::unix::fs::FileExt};

use crate::Error;

/// What the kernel says of a queue, from its line in `/proc/net/netfilter/nfnetlink_queue`. Counts are since
/// [`bind`](crate::QueueBuilder::bind) and wrap at 2³².
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelStats {
    /// The netlink port of the socket that owns the queue. A process's first such socket has the process id.
    pub port_id: u32,
    /// Packets that wait for a verdict, unread ones among them.
    pub queued: u32,
    /// Bytes of each packet that are copied; 0 where only metadata is.
    pub copy_range: u32,
    /// Packets dropped because the queue was full. With fail-open such packets pass, and are counted nowhere.
    pub dropped_queue: u32,
    /// Packets dropped because the socket's receive buffer was full; as [`Stats::lost`](crate::Stats::lost) without
    /// fail-open. With it such packets pass, and are counted nowhere here.
    pub dropped_socket: u32,
    /// The id given last.
    pub last_id: u32,
}

/// The file, opened in a network namespace. It goes on to tell of that one, whoever reads it from wherever.
#[derive(Debug)]
pub(crate) struct KernelTable(Option<File>);

impl KernelTable {
    /// The calling thread's network namespace's. That there is none shows when it is read.
    pub(crate) fn open() -> Self {
        Self(File::open("/proc/thread-self/net/netfilter/nfnetlink_queue").ok())
    }

    /// A queue's line; `None` if nobody owns the queue.
    pub(crate) fn read(&self, queue: u16) -> Result<Option<KernelStats>, Error> {
        let failed = |source| Error::os("read /proc/net/netfilter/nfnetlink_queue", source);
        let file = self.0.as_ref().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let mut text = Vec::new();
        loop {
            let start = text.len();
            text.resize(start + 4096, 0);
            let read = file.read_at(&mut text[start..], start as u64).map_err(failed)?;
            text.truncate(start + read);
            if read == 0 {
                break;
            }
        }
        Ok(String::from_utf8_lossy(&text).lines().find_map(|line| parse(line, queue)))
    }
}

/// Queue, port id, queued, copy mode, copy range, dropped by the queue, dropped by the socket, last id, 1
/// (`seq_show` in nfnetlink_queue.c).
fn parse(line: &str, queue: u16) -> Option<KernelStats> {
    let mut fields = line.split_ascii_whitespace();
    // The port id is printed signed by some kernels.
    let mut next = || fields.next()?.parse::<i64>().ok().map(|number| number as u32);
    if next()? != u32::from(queue) {
        return None;
    }
    let (port_id, queued, _mode, copy_range) = (next()?, next()?, next()?, next()?);
    Some(KernelStats { port_id, queued, copy_range, dropped_queue: next()?, dropped_socket: next()?, last_id: next()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_as_the_kernel_prints_it() {
        let line = "    5 -4096     3 2 65531     7     8       99  1";
        let stats = parse(line, 5).unwrap();
        assert_eq!((stats.port_id, stats.queued, stats.copy_range), (-4096i32 as u32, 3, 65531));
        assert_eq!((stats.dropped_queue, stats.dropped_socket, stats.last_id), (7, 8, 99));
        assert_eq!(parse(line, 6), None);
        assert_eq!(parse("", 5), None);
        assert_eq!(parse("5 1 2", 5), None);
    }
}
