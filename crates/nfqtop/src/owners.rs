//! Which processes hold a socket: from `/proc/PID/fd`.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{kernel::printable, reader::Pause, snapshot::Holder};

/// How often all processes are searched though nothing seems to have changed: another process may
/// have got a copy of a socket, or a name may have changed.
const SEARCH_EVERY: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub(crate) struct Owners {
    /// By inode, the holders with the descriptor that each was found at.
    found: HashMap<u64, Vec<(Holder, PathBuf)>>,
    searched: Option<Instant>,
    pause: Pause,
    /// Processes of the last search whose descriptors this user may not see.
    hidden: usize,
}

impl Owners {
    /// Finds the holders of these sockets. All processes are searched if a socket is new, or if a
    /// holder has ended or closed it.
    pub(crate) fn update(&mut self, inodes: &HashSet<u64>) {
        self.found.retain(|inode, _| inodes.contains(inode));
        let is_held = |inode: u64, path: &Path| self::inode(fs::read_link(path).ok()) == Some(inode);
        let unchanged = inodes.iter().all(|inode| {
            let holders = self.found.get(inode);
            holders.is_some_and(|holders| holders.iter().all(|(_, path)| is_held(*inode, path)))
        });
        let recent = self.searched.is_some_and(|at| at.elapsed() < SEARCH_EVERY);
        if (unchanged && recent) || inodes.is_empty() || !self.pause.is_over() {
            return;
        }
        let start = Instant::now();
        self.search(inodes);
        self.searched = Some(start);
        self.pause.begin(start.elapsed());
    }

    /// The processes that hold a socket, by their pids.
    pub(crate) fn of(&self, inode: u64) -> Vec<Holder> {
        self.found.get(&inode).into_iter().flatten().map(|(holder, _)| holder.clone()).collect()
    }

    /// Why the holder of a socket may not have been found. `None` before the first search.
    pub(crate) fn missing(&self) -> Option<String> {
        self.searched?;
        Some(match self.hidden {
            0 => "no process that /proc shows holds the socket of some queues: it belongs to another namespace of \
                  pids, or is on its way to another process"
                .to_owned(),
            1 => "the descriptors of 1 process: root or CAP_SYS_PTRACE is needed".to_owned(),
            hidden => format!("the descriptors of {hidden} processes: root or CAP_SYS_PTRACE is needed"),
        })
    }

    fn search(&mut self, inodes: &HashSet<u64>) {
        // Those without a holder as well, so that they are not searched for at each refresh.
        self.found = inodes.iter().map(|inode| (*inode, Vec::new())).collect();
        self.hidden = 0;
        let Ok(processes) = fs::read_dir("/proc") else { return };
        let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        for pid in pids {
            match fs::read_dir(format!("/proc/{pid}/fd")) {
                Ok(descriptors) => self.search_process(pid, descriptors),
                Err(error) if error.kind() == ErrorKind::PermissionDenied => self.hidden += 1,
                // It has ended.
                Err(_) => {}
            }
        }
        for holders in self.found.values_mut() {
            holders.sort_by_key(|(holder, _)| holder.pid);
        }
    }

    fn search_process(&mut self, pid: u32, descriptors: fs::ReadDir) {
        let mut name = None;
        let mut hidden = false;
        for path in descriptors.filter_map(|entry| Some(entry.ok()?.path())) {
            let target = fs::read_link(&path);
            // Of a process of the same user in another user namespace.
            hidden |= target.as_ref().is_err_and(|error| error.kind() == ErrorKind::PermissionDenied);
            let holders = inode(target.ok()).and_then(|inode| self.found.get_mut(&inode));
            let Some(holders) = holders.filter(|holders| holders.iter().all(|(holder, _)| holder.pid != pid)) else {
                continue;
            };
            let name = name.get_or_insert_with(|| {
                let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
                printable(String::from_utf8_lossy(&name).trim_end_matches('\n'))
            });
            holders.push((Holder { pid, name: name.clone(), state: None }, path));
        }
        self.hidden += usize::from(hidden);
    }
}

/// The number in `socket:[...]`.
fn inode(target: Option<PathBuf>) -> Option<u64> {
    target?.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn this_process_holds_its_socket_until_it_closes_it() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let copy = socket.try_clone().unwrap();
        let inode = inode(fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).ok()).unwrap();
        let mut owners = Owners::default();
        // A process that another test starts has copies until it executes its program.
        let times = |owners: &Owners| owners.of(inode).iter().filter(|holder| holder.pid == std::process::id()).count();
        owners.update(&HashSet::from([inode]));
        assert_eq!(times(&owners), 1);
        drop((socket, copy));
        owners.pause = Pause::default();
        owners.update(&HashSet::from([inode]));
        assert_eq!(times(&owners), 0);
    }
}
