//! Processes of this binary: with queues, in a terminal, or without privileges.

use std::{
    ffi::{CString, OsString},
    io::{BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    path::Path,
    process::{self, Command, ExitCode, Stdio},
    time::Duration,
};

use nfqueue_testbed::{RawQueue, fork_sleeper};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        signal::{Signal, kill},
    },
    unistd::Pid,
};

/// Set in such a process: what it does.
const TASK: &str = "NFQTOP_TEST_TASK";

/// What a process does with its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Accepts,
    /// Reads packets and does not decide them.
    Holds,
    /// Does not read.
    Sleeps,
    /// As `Sleeps`; another process has a copy of the socket.
    Forks,
}

/// A process that has bound a queue, in the network namespace of the thread that started it.
pub(crate) struct Child {
    process: process::Child,
    forked: Option<u32>,
}

impl Child {
    pub(crate) fn start(name: &str, queue: u16, mode: Mode) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .env(TASK, format!("{name} {queue} {mode:?}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let forked = line.strip_prefix("ready").expect("the process says why").trim().parse().ok();
        Self { process, forked }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The process that has a copy of the socket.
    pub(crate) fn forked(&self) -> Option<u32> {
        self.forked
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(pid) = self.forked {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A command that starts a program as the leader of a session whose terminal is its standard input.
/// Otherwise it would ask the terminal of the tests for its size.
pub(crate) fn in_terminal(program: &Path) -> Command {
    launcher("terminal", program)
}

/// A command that starts a program in a user namespace in which it has no privileges over the
/// network namespace.
pub(crate) fn powerless(program: &Path) -> Command {
    let mut command = launcher("powerless", program);
    command.stdin(Stdio::null());
    command
}

fn launcher(task: &str, program: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(TASK, task).arg(program);
    command
}

/// The whole `main` of such a process, and `None` in all others.
pub(crate) fn run() -> Option<ExitCode> {
    let task = std::env::var(TASK).ok()?;
    match task.as_str() {
        "terminal" => {
            rustix::process::setsid().expect("begin a session");
            rustix::process::ioctl_tiocsctty(std::io::stdin()).expect("take the terminal");
            exec()
        }
        "powerless" => {
            unshare(CloneFlags::CLONE_NEWUSER).expect("make a user namespace");
            exec()
        }
        _ => {
            let mut words = task.split(' ');
            let mut next = || words.next().expect("name, queue and mode");
            let (name, queue, mode) = (next(), next().parse().expect("a number"), next());
            prctl::set_name(&CString::new(name).expect("a name")).expect("set the name");
            hold(RawQueue::bind(queue).expect("bind the queue"), mode)
        }
    }
}

fn exec() -> ! {
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let program = arguments.remove(0);
    panic!("{}", Command::new(program).args(arguments).env_remove(TASK).exec())
}

fn hold(queue: RawQueue, mode: &str) -> ! {
    // The process ends with the test's, also if that is killed.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        process::exit(0);
    });
    let forked = if mode == "Forks" { fork_sleeper().expect("fork").to_string() } else { String::new() };
    println!("ready {forked}");
    loop {
        match mode {
            "Accepts" => {
                if let Some(packet) = queue.next(Duration::from_secs(1)) {
                    queue.accept(&packet);
                }
            }
            "Holds" => drop(queue.next(Duration::from_secs(1))),
            _ => std::thread::sleep(Duration::from_secs(1)),
        }
    }
}
