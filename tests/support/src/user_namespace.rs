//! A user namespace beside the test's own, and a network namespace that it owns.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, ExitCode, Stdio},
};

use nix::{
    sched::{CloneFlags, unshare},
    unistd::getuid,
};

use super::{Namespace, start_process};

/// Set in the process that makes the namespaces.
const CHILD: &str = "TOKIO_NFQUEUE_USER_NAMESPACE";

/// A process in a new user namespace and in a new network namespace, which the user namespace owns.
/// The process does nothing and is killed with this handle.
///
/// The test's process holds all capabilities there, for it created the user namespace.
#[derive(Debug)]
pub struct UserNamespace(Child);

impl UserNamespace {
    /// Needs a binary whose `main` begins with [`child`](Self::child).
    pub fn new() -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        command.env(CHILD, "1").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = start_process(&mut command).expect("start a process");
        let mut line = String::new();
        let output = child.stdout.take().expect("a pipe");
        BufReader::new(output).read_line(&mut line).expect("read from the process");
        assert_eq!(line, "ready\n", "no user namespace: the process says why");
        Self(child)
    }

    /// The whole `main` of the process that makes the namespaces, and `None` in all others.
    pub fn child() -> Option<ExitCode> {
        std::env::var_os(CHILD)?;
        let user = getuid();
        unshare(CloneFlags::CLONE_NEWUSER).expect("make a user namespace");
        // See `enter` about the order.
        fs::write("/proc/self/uid_map", format!("0 {user} 1")).expect("map the user to root");
        unshare(CloneFlags::CLONE_NEWNET).expect("make a network namespace");
        println!("ready");
        // Until the other process kills this one or has ended.
        let _ = std::io::stdin().read(&mut [0]);
        Some(ExitCode::FAILURE)
    }

    /// The network namespace.
    pub fn network(&self) -> Namespace {
        File::open(self.path()).expect("open the process's network namespace").into()
    }

    /// The network namespace's file.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.0.id()).into()
    }
}

impl Drop for UserNamespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
