//! What the kernel reports about itself: its table of queues,
//! `/proc/net/netfilter/nfnetlink_queue`, and its release.

use std::{fs::File, io, os::unix::fs::FileExt, sync::OnceLock};

use rustix::io::Errno;

use super::sys::Owner;
use crate::types::{Error, ErrorKind, stats::Number};

/// The kernel's own counters of a queue, from its line in `/proc/net/netfilter/nfnetlink_queue`.
/// They start at [`bind`](crate::QueueBuilder::bind) and wrap at 2³².
///
/// Of a queue with several numbers they are the sum, except what cannot be added: that is of the
/// first number. [`VerdictSink::each`](crate::VerdictSink::each) tells the numbers apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelStats {
    /// The netlink port id of the socket that owns the queue. It is random, and not the process
    /// id. The program `nfqtop` shows the process.
    pub port_id: u32,
    /// Packets that wait for a verdict, including unread ones.
    pub queued: u32,
    /// Bytes of each packet that are copied; 0 in metadata mode.
    pub copy_range: u32,
    /// Packets dropped because the queue was full. With fail-open they are accepted, and counted
    /// nowhere.
    pub dropped_queue: u32,
    /// Packets dropped because the socket's receive buffer was full; without fail-open as many as
    /// [`Lost::packets`](crate::stats::Lost::packets). With fail-open they are accepted, and not
    /// counted here.
    pub dropped_socket: u32,
    /// The last packet id that the kernel has assigned; 0 before the first packet.
    pub last_id: u32,
}

impl KernelStats {
    /// The numbers that are not names, with a kind and a line of help: see
    /// [`Stats::iter`](crate::Stats::iter).
    pub fn iter(&self) -> impl Iterator<Item = Number> + use<> {
        let (counter, gauge) = (Number::counter, Number::gauge);
        [
            gauge("kernel.queued", self.queued.into(), "Packets that wait for a verdict in the kernel."),
            counter("kernel.dropped_queue", self.dropped_queue.into(), "Packets that found the queue full."),
            counter("kernel.dropped_socket", self.dropped_socket.into(), "Packets that found the receive buffer full."),
            counter("kernel.last_id", self.last_id.into(), "Ids that the kernel has assigned."),
        ]
        .into_iter()
    }

    /// Those of another number are added to these.
    pub(crate) fn add(&mut self, other: &Self) {
        self.queued += other.queued;
        self.dropped_queue = self.dropped_queue.wrapping_add(other.dropped_queue);
        self.dropped_socket = self.dropped_socket.wrapping_add(other.dropped_socket);
    }
}

/// The file, opened in a network namespace. Its content is that of this namespace, whichever thread
/// reads it.
#[derive(Debug)]
pub(crate) struct KernelTable(Result<File, Unopened>);

/// Why the file is not open.
#[derive(Debug)]
enum Unopened {
    Failed(io::Error),
    NoProc,
    OtherNamespace,
}

/// Whether `/proc` is missing. It belongs to the calling thread's mount namespace.
pub(crate) fn lacks_proc() -> bool {
    // Not `/proc` itself: the directory exists when nothing is mounted there.
    !std::fs::exists("/proc/thread-self").unwrap_or(true)
}

/// For the detail of an error.
pub(crate) const NO_PROC: &str = "/proc is not mounted";

impl KernelTable {
    /// That of the calling thread's network namespace. An error is reported when it is read.
    pub(crate) fn open() -> Self {
        Self(File::open("/proc/thread-self/net/netfilter/nfnetlink_queue").map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound && lacks_proc() {
                Unopened::NoProc
            } else {
                Unopened::Failed(source)
            }
        }))
    }

    /// The file, opened in another process.
    pub(crate) fn of(file: File) -> Self {
        Self(Ok(file))
    }

    /// That of another network namespace than the calling thread's, when no file was opened there.
    pub(crate) fn out_of_reach() -> Self {
        Self(Err(if lacks_proc() { Unopened::NoProc } else { Unopened::OtherNamespace }))
    }

    /// Whether the kernel has no such file, though `/proc` is mounted: the module has not been
    /// loaded.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(&self.0, Err(Unopened::Failed(source)) if source.kind() == io::ErrorKind::NotFound)
    }

    pub(crate) fn file(&self) -> Option<&File> {
        self.0.as_ref().ok()
    }

    /// None: the kernel is one in memory.
    #[cfg(feature = "test-util")]
    pub(crate) fn none() -> Self {
        Self(Err(Unopened::Failed(io::ErrorKind::NotFound.into())))
    }

    /// The line of a queue; `None` if the queue is not bound.
    pub(crate) fn read(&self, queue: u16) -> Result<Option<KernelStats>, Error> {
        const OPERATION: &str = "read /proc/net/netfilter/nfnetlink_queue";
        let failed = |source: io::Error| {
            let (missing, denied) =
                (source.kind() == io::ErrorKind::NotFound, source.kind() == io::ErrorKind::PermissionDenied);
            let error = Error::os(OPERATION, source);
            match error.kind() {
                _ if denied => error.with_kind(ErrorKind::NotPermitted).with_detail(UNREADABLE),
                _ if missing => error.with_kind(ErrorKind::Unsupported).with_detail("nfnetlink_queue is missing"),
                _ => error,
            }
        };
        let again = |source: &io::Error| {
            source.raw_os_error().map_or_else(|| source.kind().into(), io::Error::from_raw_os_error)
        };
        let file = self.0.as_ref().map_err(|unopened| match unopened {
            Unopened::Failed(source) => failed(again(source)),
            Unopened::NoProc => {
                let source = Errno::NOENT.into();
                Error::os(OPERATION, source).with_kind(ErrorKind::Unsupported).with_detail(NO_PROC)
            }
            Unopened::OtherNamespace => Error::new(ErrorKind::NotPermitted, OPERATION).with_detail(
                "the queue is in another network namespace, and the process that had it before had not opened the file",
            ),
        })?;
        let mut text = Vec::new();
        loop {
            let start = text.len();
            text.resize(start + 4096, 0);
            let read = file.read_at(&mut text[start..], start as u64).map_err(failed)?;
            text.truncate(start + read);
            // A file that another process has passed on may be any file.
            if read == 0 || text.len() > LONGEST_TABLE {
                break;
            }
        }
        Ok(String::from_utf8_lossy(&text).lines().find_map(|line| parse(line, queue)))
    }
}

/// More than the lines of 65 536 queues take, in bytes.
const LONGEST_TABLE: usize = 8 << 20;

/// The file's mode is 0440. It belongs to root of the user namespace that owns the network
/// namespace.
const UNREADABLE: &str =
    "only root and processes with CAP_DAC_READ_SEARCH may read this file; it is opened when the queue is bound";

/// The first two numbers of the running kernel's release.
fn release() -> (u32, u32) {
    static RELEASE: OnceLock<(u32, u32)> = OnceLock::new();
    *RELEASE.get_or_init(|| {
        let uname = rustix::system::uname();
        let text = uname.release().to_string_lossy();
        let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    })
}

/// Why the kernel takes no replaced payload of an IP packet in a network namespace with this owner,
/// if it takes none (`nfqnl_mangle`, since 7.1). It would drop the packet and acknowledge the
/// verdict.
pub(crate) fn payload_obstacle(owner: Owner) -> Option<&'static str> {
    // If the owner is unknown (no /proc), the verdict is sent.
    (release() >= (7, 1) && owner == Owner::Own).then_some(
        "Linux 7.1 and later take replaced payloads only in network namespaces that the initial user namespace owns",
    )
}

/// As `payload_obstacle`, for packets of the bridge family (`nfqnl_validate_write`, since 7.2).
pub(crate) fn bridge_payload_obstacle() -> Option<&'static str> {
    (release() >= (7, 2)).then_some("Linux 7.2 and later take no replaced payloads in the bridge family")
}

/// Queue, port id, queued, copy mode, copy range, dropped by the queue, dropped by the socket, last
/// id, 1 (`seq_show` in nfnetlink_queue.c).
fn parse(line: &str, queue: u16) -> Option<KernelStats> {
    let mut fields = line.split_ascii_whitespace();
    // Some kernels print the port id as a signed number.
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
    fn a_line_of_the_kernel_is_parsed() {
        let line = "    5 -4096     3 2 65531     7     8       99  1";
        let stats = parse(line, 5).unwrap();
        assert_eq!((stats.port_id, stats.queued, stats.copy_range), (-4096i32 as u32, 3, 65531));
        assert_eq!((stats.dropped_queue, stats.dropped_socket, stats.last_id), (7, 8, 99));
        assert_eq!(parse(line, 6), None);
        assert_eq!(parse("", 5), None);
        assert_eq!(parse("5 1 2", 5), None);
    }
}
