//! What is passed to another process: descriptors, one of which is a file in memory with the
//! record.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
};

use rustix::{
    fs::{MemfdFlags, SealFlags},
    net::{AddressFamily, netlink, sockopt},
};

use super::{
    exchange::{HAND_OVER, TAKE_OVER, unreadable},
    kernel::KernelTable,
};
use crate::{
    record::{MAGIC, PartRecord, QueueRecord, Record, Unreadable},
    types::{Error, ErrorKind},
};

/// A queue that another process has passed on.
#[derive(Debug)]
pub(crate) struct PassedQueue {
    pub(crate) record: QueueRecord,
    pub(super) socket: OwnedFd,
    pub(super) table: Option<File>,
}

/// What else another process has passed on.
#[derive(Debug)]
#[cfg_attr(not(feature = "divert"), expect(dead_code))]
pub(crate) struct PassedPart {
    pub(crate) record: PartRecord,
    pub(crate) socket: OwnedFd,
}

/// What another process has passed on.
#[derive(Debug)]
pub(crate) struct Passed {
    pub(crate) queues: Vec<PassedQueue>,
    pub(crate) parts: Vec<PassedPart>,
}

/// A file in memory with the record.
pub(crate) fn packed(record: &Record) -> Result<OwnedFd, Error> {
    let write = || -> io::Result<OwnedFd> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let create = |flags| rustix::fs::memfd_create("tokio-nfqueue", flags);
        // A system may require it (`vm.memfd_noexec`); kernels before 6.3 refuse it.
        let file = File::from(create(flags | MemfdFlags::NOEXEC_SEAL).or_else(|_| create(flags))?);
        let bytes = record.encode();
        check_length(bytes.len())?;
        file.write_all_at(&bytes, 0)?;
        // So that no process with the descriptor can change it while another one reads it.
        rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file.into())
    };
    write().map_err(|source| Error::os(HAND_OVER, source))
}

/// Assigns descriptors, in any order, to what the record among them describes.
pub(crate) fn unpacked(descriptors: Vec<OwnedFd>) -> Result<Passed, Error> {
    let os = |source| Error::os(TAKE_OVER, source);
    let mut sockets = Vec::new();
    let mut files = Vec::new();
    let mut record: Option<Record> = None;
    for descriptor in descriptors {
        rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC).map_err(|errno| os(errno.into()))?;
        if let Some(cookie) = netlink_cookie(&descriptor) {
            sockets.push((cookie, descriptor));
        } else {
            let file = File::from(descriptor);
            let mut begin = [0; MAGIC.len()];
            match file.read_exact_at(&mut begin, 0) {
                Ok(()) if begin == MAGIC => {
                    let found = read_record(&file)?;
                    record = Some(match record {
                        None => found,
                        Some(other) => merged(other, found),
                    });
                }
                _ => files.push(file),
            }
        }
    }
    let record = record.ok_or_else(|| unreadable(Unreadable::Malformed))?;
    let mut socket = |cookie: u64| {
        let at = sockets.iter().position(|(other, _)| *other == cookie);
        let at = at.ok_or_else(|| {
            Error::new(ErrorKind::Malformed, TAKE_OVER)
                .with_detail("a socket of the record is not among the descriptors")
        })?;
        Ok(sockets.swap_remove(at).1)
    };
    let mut passed = Passed { queues: Vec::new(), parts: Vec::new() };
    for record in record.queues {
        let socket = socket(record.cookie)?;
        passed.queues.push(PassedQueue { record, socket, table: None });
    }
    for record in record.parts {
        let socket = socket(record.cookie)?;
        passed.parts.push(PassedPart { record, socket });
    }
    for file in files {
        // Each network namespace has its own table of queues.
        let shows = |queue: &PassedQueue, file: &File| {
            let table = file.try_clone().map(KernelTable::of).ok()?;
            Some(table.read(queue.record.queue).ok()??.port_id == queue.record.port_id)
        };
        let queue = passed.queues.iter_mut().find(|queue| queue.table.is_none() && shows(queue, &file) == Some(true));
        if let Some(queue) = queue {
            queue.table = Some(file);
        }
    }
    Ok(passed)
}

/// Several queues may have been kept separately. And of a queue that is handed over again and
/// again, a descriptor store may still have an older record: the newer one holds, and so it does
/// for the parts that go along.
fn merged(mut all: Record, other: Record) -> Record {
    let same = |queue: &QueueRecord| all.queues.iter().find(|known| known.cookie == queue.cookie);
    let newer = other.queues.iter().any(|queue| same(queue).is_some_and(|known| is_newer(queue, known)));
    for queue in other.queues {
        match all.queues.iter_mut().find(|known| known.cookie == queue.cookie) {
            Some(known) if newer => *known = queue,
            Some(_) => {}
            None => all.queues.push(queue),
        }
    }
    for part in other.parts {
        match all.parts.iter_mut().find(|known| known.cookie == part.cookie) {
            Some(known) if newer => *known = part,
            Some(_) => {}
            None => all.parts.push(part),
        }
    }
    all
}

/// Of two records of one socket: its messages and packets are counted, and the numbers wrap.
fn is_newer(record: &QueueRecord, known: &QueueRecord) -> bool {
    let steps = (record.sequence.wrapping_sub(known.sequence) as i32, record.next.wrapping_sub(known.next) as i32);
    steps > (0, 0)
}

/// The kernel's unique number of a netlink socket for netfilter.
fn netlink_cookie(descriptor: &OwnedFd) -> Option<u64> {
    let netlink = sockopt::socket_domain(descriptor) == Ok(AddressFamily::NETLINK)
        && sockopt::socket_protocol(descriptor) == Ok(Some(netlink::NETFILTER));
    if netlink { sockopt::socket_cookie(descriptor).ok() } else { None }
}

fn read_record(file: &File) -> Result<Record, Error> {
    let length = file.metadata().map_err(|source| Error::os(TAKE_OVER, source))?.len();
    if length > LONGEST_RECORD {
        return Err(unreadable(Unreadable::Malformed));
    }
    let mut bytes = Vec::new();
    loop {
        let start = bytes.len();
        bytes.resize(start + PIECE, 0);
        let read = file.read_at(&mut bytes[start..], start as u64).map_err(|source| Error::os(TAKE_OVER, source))?;
        bytes.truncate(start + read);
        if read == 0 {
            return Record::decode(&bytes).map_err(unreadable);
        }
        if bytes.len() as u64 > LONGEST_RECORD {
            return Err(unreadable(Unreadable::Malformed));
        }
    }
}

/// A successor would refuse a longer record.
fn check_length(bytes: usize) -> io::Result<()> {
    if bytes as u64 > LONGEST_RECORD { Err(rustix::io::Errno::FBIG.into()) } else { Ok(()) }
}

/// In bytes. What a record holds beside some hundred bytes a queue are packets that have been
/// received and not handed out: fewer than the receive buffers hold, which are rarely longer than a
/// few MiB. A file in memory may be longer than the memory that its sender has spent on it.
const LONGEST_RECORD: u64 = 256 << 20;
const PIECE: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::net::{SocketType, socket};

    use super::*;

    fn netlink() -> (u64, OwnedFd) {
        let socket = socket(AddressFamily::NETLINK, SocketType::RAW, Some(netlink::NETFILTER)).unwrap();
        (netlink_cookie(&socket).unwrap(), socket)
    }

    fn record(cookies: &[u64], sequence: u32, next: u32) -> OwnedFd {
        let queue = |(queue, cookie): (u16, &u64)| QueueRecord {
            cookie: *cookie,
            queue,
            next,
            sequence,
            ..QueueRecord::example()
        };
        packed(&Record { queues: (0..).zip(cookies).map(queue).collect(), parts: Vec::new() }).unwrap()
    }

    fn copy(fd: &OwnedFd) -> OwnedFd {
        fd.as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn queues_that_were_kept_separately_are_all_found() {
        let [(one, first), (two, second)] = [netlink(), netlink()];
        let passed = unpacked(vec![record(&[one], 1, 1), first, second, record(&[two], 2, 2)]).unwrap();
        let cookies: Vec<u64> = passed.queues.iter().map(|queue| queue.record.cookie).collect();
        assert_eq!(cookies, [one, two]);
    }

    #[test]
    fn a_record_that_is_too_long_is_neither_written_nor_read() {
        assert!(check_length(LONGEST_RECORD as usize).is_ok() && check_length(LONGEST_RECORD as usize + 1).is_err());

        // A file that takes no memory.
        let (_, socket) = netlink();
        let memory = rustix::fs::memfd_create("record", MemfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&memory, &crate::record::header()).unwrap();
        rustix::fs::ftruncate(&memory, LONGEST_RECORD + 1).unwrap();
        let error = unpacked(vec![memory, socket]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed);
    }

    #[test]
    fn of_two_records_of_a_queue_the_newer_holds() {
        let [(one, first), (two, second)] = [netlink(), netlink()];
        for (old, new) in [((7, 7), (8, 7)), ((7, 7), (7, 8)), ((u32::MAX, 5), (0, 6)), ((5, u32::MAX), (6, 1))] {
            for swapped in [false, true] {
                let mut kept = [record(&[one], old.0, old.1), record(&[one, two], new.0, new.1)];
                if swapped {
                    kept.reverse();
                }
                let passed = unpacked([copy(&first), copy(&second)].into_iter().chain(kept).collect()).unwrap();
                let found = passed.queues.iter().map(|queue| (queue.record.sequence, queue.record.next));
                assert_eq!(found.collect::<Vec<_>>(), [new, new], "{old:?} {swapped}");
            }
        }
    }
}
