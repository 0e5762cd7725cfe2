//! What was read of a network namespace at one time.

use std::{collections::HashMap, rc::Rc, time::Duration};

use crate::{
    kernel::{QueueLine, SocketLine},
    rules::RuleSet,
};

#[derive(Debug, Clone, Default)]
pub(crate) struct Snapshot {
    /// Since the program started.
    pub(crate) at: Duration,
    /// Since 1970, in seconds.
    pub(crate) unix_time: f64,
    /// `None` if they cannot be read.
    pub(crate) queues: Option<Vec<QueueLine>>,
    /// By port id.
    pub(crate) sockets: HashMap<u32, SocketLine>,
    /// The processes that hold a socket, by its inode.
    pub(crate) holders: HashMap<u64, Vec<Holder>>,
    /// `None` if no rules can be read.
    pub(crate) rules: Option<Rc<RuleSet>>,
    pub(crate) unreadable: Vec<Unreadable>,
}

/// A process that holds a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// In the namespace of pids that `/proc` shows.
    pub(crate) pid: u32,
    pub(crate) name: String,
    /// As in `/proc/PID/stat`; read only if no packet has left its queue lately.
    pub(crate) state: Option<char>,
}

impl Holder {
    pub(crate) fn is_stopped(&self) -> bool {
        matches!(self.state, Some('T' | 't'))
    }
}

/// What could not be read, and why.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Unreadable {
    pub(crate) what: &'static str,
    pub(crate) why: String,
}
