//! Reads a [`Snapshot`] of the calling thread's network namespace.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, ErrorKind, Read},
    rc::Rc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    kernel::{self, QueueLine},
    owners::Owners,
    rule_source::RuleSource,
    rules::RuleSet,
    snapshot::{Holder, Snapshot, Unreadable},
};

const QUEUES: &str = "/proc/thread-self/net/netfilter/nfnetlink_queue";
const SOCKETS: &str = "/proc/thread-self/net/netlink";

#[derive(Debug)]
pub(crate) struct Reader {
    start: Instant,
    owners: Owners,
    rule_source: RuleSource,
    rules: Option<Rc<RuleSet>>,
    /// Why rules could not be read, when they were read last.
    rules_unreadable: Vec<Unreadable>,
    rules_pause: Pause,
    /// How many packets had left each queue, when it was read last.
    left: HashMap<u16, u32>,
    text: String,
}

impl Reader {
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            owners: Owners::default(),
            rule_source: RuleSource::default(),
            rules: None,
            rules_unreadable: Vec::new(),
            rules_pause: Pause::default(),
            left: HashMap::new(),
            text: String::new(),
        }
    }

    pub(crate) fn read(&mut self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        let queues = self.queues(&mut snapshot);
        // The time of what changes fastest.
        snapshot.at = self.start.elapsed();
        snapshot.unix_time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        match self.file(SOCKETS) {
            Ok(text) => snapshot.sockets = kernel::sockets(text).into_iter().map(|line| (line.port, line)).collect(),
            Err(error) => unreadable(&mut snapshot, "owners", format!("{SOCKETS}: {error}")),
        }
        self.holders(&mut snapshot, queues.as_deref().unwrap_or_default());
        snapshot.queues = queues;
        self.rules(&mut snapshot);
        snapshot
    }

    fn queues(&mut self, snapshot: &mut Snapshot) -> Option<Vec<QueueLine>> {
        match self.file(QUEUES) {
            Ok(text) => Some(kernel::queues(text)),
            Err(error) if error.kind() == ErrorKind::NotFound && std::fs::exists(SOCKETS).unwrap_or(false) => {
                let why = "the kernel has no nfnetlink_queue, or its module is not loaded: no queue is bound";
                unreadable(snapshot, "queues", why.to_owned());
                Some(Vec::new())
            }
            Err(error) => {
                let needed = match error.kind() {
                    ErrorKind::PermissionDenied => ": root or CAP_DAC_READ_SEARCH is needed",
                    ErrorKind::NotFound => ": is /proc mounted?",
                    _ => "",
                };
                unreadable(snapshot, "queues", format!("/proc/net/netfilter/nfnetlink_queue: {error}{needed}"));
                None
            }
        }
    }

    fn holders(&mut self, snapshot: &mut Snapshot, queues: &[QueueLine]) {
        let inode = |line: &QueueLine| snapshot.sockets.get(&line.port).map(|socket| socket.inode);
        let wanted: HashSet<u64> = queues.iter().filter_map(inode).collect();
        self.owners.update(&wanted);
        let mut holders: HashMap<u64, Vec<Holder>> =
            wanted.iter().map(|inode| (*inode, self.owners.of(*inode))).collect();
        let mut found = true;
        let mut left = HashMap::with_capacity(queues.len());
        for line in queues {
            let Some(holders) = inode(line).and_then(|inode| holders.get_mut(&inode)) else { continue };
            found &= !holders.is_empty();
            if line.length > 0 && self.left.get(&line.number) == Some(&line.left()) {
                for holder in holders {
                    let stat = self.file(&format!("/proc/{}/stat", holder.pid)).ok();
                    holder.state = stat.and_then(kernel::process_state);
                }
            }
            left.insert(line.number, line.left());
        }
        self.left = left;
        if !found && let Some(why) = self.owners.missing() {
            unreadable(snapshot, "owners", why);
        }
        snapshot.holders = holders;
    }

    fn rules(&mut self, snapshot: &mut Snapshot) {
        if self.rules_pause.is_over() {
            let (start, at) = (Instant::now(), self.start.elapsed());
            let (rules, unreadable) = self.rule_source.read();
            self.rules = rules.map(|rules| {
                let mut set = RuleSet { rules, complete: unreadable.is_empty(), at };
                if let Some(earlier) = &self.rules {
                    set.set_rates(earlier);
                }
                Rc::new(set)
            });
            self.rules_unreadable = unreadable;
            self.rules_pause.begin(start.elapsed());
        }
        snapshot.rules = self.rules.clone();
        snapshot.unreadable.extend_from_slice(&self.rules_unreadable);
    }

    fn file(&mut self, path: &str) -> io::Result<&str> {
        self.text.clear();
        File::open(path)?.read_to_string(&mut self.text)?;
        Ok(&self.text)
    }
}

fn unreadable(snapshot: &mut Snapshot, what: &'static str, why: String) {
    snapshot.unreadable.push(Unreadable { what, why });
}

/// A pause after work that may take long, so that it takes a small part of the time.
#[derive(Debug, Default)]
pub(crate) struct Pause(Option<Instant>);

impl Pause {
    /// The work takes at most one part in so many.
    const PARTS: u32 = 300;

    pub(crate) fn begin(&mut self, work: Duration) {
        self.0 = Some(Instant::now() + work * Self::PARTS);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.0.is_none_or(|end| Instant::now() >= end)
    }
}
