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
    types::{Error, ErrorKind},
    wire::record::{MAGIC, QueueRecord, Record, TableRecord, Unreadable},
};

/// A queue that another process has passed on.
#[derive(Debug)]
pub(crate) struct PassedQueue {
    pub(crate) record: QueueRecord,
    pub(super) socket: OwnedFd,
    pub(super) table: Option<File>,
}

/// A table that another process has passed on.
#[derive(Debug)]
#[cfg_attr(not(feature = "divert"), expect(dead_code))]
pub(crate) struct PassedTable {
    pub(crate) record: TableRecord,
    pub(crate) socket: OwnedFd,
}

/// What another process has passed on.
#[derive(Debug)]
pub(crate) struct Passed {
    pub(crate) queues: Vec<PassedQueue>,
    pub(crate) tables: Vec<PassedTable>,
}

/// A file in memory with the record.
pub(crate) fn packed(record: &Record) -> Result<OwnedFd, Error> {
    let write = || -> io::Result<OwnedFd> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let create = |flags| rustix::fs::memfd_create("tokio-nfqueue", flags);
        // A system may require it (`vm.memfd_noexec`); kernels before 6.3 do not know it.
        let file = File::from(create(flags | MemfdFlags::NOEXEC_SEAL).or_else(|_| create(flags))?);
        file.write_all_at(&record.encode(), 0)?;
        // The same for whoever reads it, and whenever.
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
    let mut record = None;
    for descriptor in descriptors {
        rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC).map_err(|errno| os(errno.into()))?;
        if let Some(cookie) = netlink_cookie(&descriptor) {
            sockets.push((cookie, descriptor));
        } else {
            let file = File::from(descriptor);
            let mut begin = [0; MAGIC.len()];
            match file.read_exact_at(&mut begin, 0) {
                Ok(()) if begin == MAGIC => record = Some(read_record(&file)?),
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
    let mut passed = Passed { queues: Vec::new(), tables: Vec::new() };
    for record in record.queues {
        let socket = socket(record.cookie)?;
        passed.queues.push(PassedQueue { record, socket, table: None });
    }
    for record in record.tables {
        let socket = socket(record.cookie)?;
        passed.tables.push(PassedTable { record, socket });
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

/// More than the packets of a full queue take.
const LONGEST_RECORD: u64 = 8 << 30;
const PIECE: usize = 64 * 1024;
