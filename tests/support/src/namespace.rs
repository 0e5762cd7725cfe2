//! User and network namespaces.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    panic::resume_unwind,
    sync::OnceLock,
    thread,
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    unistd::{getgid, getuid},
};
use rustix::thread::CapabilitySet;

/// Makes it possible to create network namespaces. Call it first thing in `main`, while there is
/// one thread.
///
/// With the capabilities (root) it does nothing. Otherwise the process moves into its own user
/// namespace, in which it is root. Later calls return the result of the first one.
pub fn enter() -> Result<(), String> {
    static ENTERED: OnceLock<Result<(), String>> = OnceLock::new();
    ENTERED.get_or_init(enter_once).clone()
}

fn enter_once() -> Result<(), String> {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN;
    let held = rustix::thread::capabilities(None).map_err(|error| format!("cannot read capabilities: {error}"))?;
    if held.effective.contains(needed) {
        return Ok(());
    }
    let (user, group) = (getuid(), getgid());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|error| {
        let reason = match error {
            Errno::EINVAL => "the process has more than one thread already",
            Errno::ENOSPC => "user.max_user_namespaces is too low",
            Errno::EPERM => "the system forbids them to ordinary users",
            _ => "see the error",
        };
        format!("neither CAP_SYS_ADMIN and CAP_NET_ADMIN nor a user namespace: {reason} ({error}); run this as root")
    })?;
    // A network namespace made before the maps are written would have an unreadable
    // /proc/net/netfilter.
    for (file, text) in
        [("setgroups", "deny".to_owned()), ("uid_map", format!("0 {user} 1")), ("gid_map", format!("0 {group} 1"))]
    {
        fs::write(format!("/proc/self/{file}"), text)
            .map_err(|error| format!("cannot map the user to root: /proc/self/{file}: {error}"))?;
    }
    Ok(())
}

/// Runs `body` on a separate thread in a new network namespace whose loopback interface is up, and
/// returns its result. A panic is propagated to the caller. Threads that `body` starts, including
/// workers of a Tokio runtime, are in the same namespace, which exists as long as any of them, or
/// any socket that was opened in it.
///
/// # Panics
///
/// If there can be no namespace: [`enter`] says why.
pub fn isolated<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    on_thread(|| {
        fresh();
        body()
    })
}

/// A network namespace beside the current one.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// A fresh one, its loopback up.
    pub fn new() -> Self {
        isolated(Self::current)
    }

    /// The calling thread's.
    pub fn current() -> Self {
        Self(File::open(THREAD).expect("open the thread's network namespace"))
    }

    /// Runs `body` in this namespace, on a separate thread; otherwise like [`isolated`].
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        on_thread(|| {
            self.join();
            body()
        })
    }

    /// Starts a thread in this namespace.
    pub fn spawn<T: Send + 'static>(&self, body: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        let namespace = self.try_clone();
        thread::spawn(move || {
            namespace.join();
            body()
        })
    }

    /// Another handle to the same namespace.
    pub fn try_clone(&self) -> Self {
        Self(self.0.try_clone().expect("duplicate a namespace's descriptor"))
    }

    /// Moves the calling thread, for good.
    fn join(&self) {
        setns(&self.0, CloneFlags::CLONE_NEWNET).expect("enter a network namespace");
    }

    pub(super) fn file(&self) -> &File {
        &self.0
    }
}

/// From a network namespace's file.
impl From<File> for Namespace {
    fn from(file: File) -> Self {
        Self(file)
    }
}

const PROCESS: &str = "/proc/self/ns/net";
const THREAD: &str = "/proc/thread-self/ns/net";

/// Moves the calling thread into a fresh network namespace, for good, and makes sure that it is
/// there.
///
/// # Panics
///
/// If there can be no namespace: [`enter`] says why.
pub fn fresh() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap_or_else(|error| {
        panic!("no network namespace: {error}; enter() must come first, and says {:?}", enter())
    });
    let (process, thread) = (identity(PROCESS), identity(THREAD));
    assert_ne!(
        process.expect("the process's network namespace"),
        thread.expect("the thread's network namespace"),
        "the thread is still in the process's network namespace"
    );
    super::link_up("lo");
}

fn identity(path: &str) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Runs `body` on a thread that ends with it.
fn on_thread<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    let name = thread::current().name().unwrap_or("isolated").to_owned();
    thread::scope(|scope| {
        let thread = thread::Builder::new().name(name).spawn_scoped(scope, body).expect("start a thread");
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}
