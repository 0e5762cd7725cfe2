//! Processes that own a queue, or do a whole test, in the network namespace of the thread that
//! starts them.

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tokio_nfqueue::{Action, Queue, QueueBuilder};

use super::{forked, limits, network, proc, seccomp, spurious, wakes};
use crate::{common::DEADLINE, own_rules, promises, scale, support};

const CHILD: &str = "TOKIO_NFQUEUE_TEST_FAULTS_CHILD";

/// What a process that serves a queue has counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counted {
    pub(super) received: u64,
    pub(super) accepted: u64,
    pub(super) expired: u64,
    pub(super) lost: u64,
}

/// A process that is killed when this is dropped.
pub(crate) struct Process {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Process {
    /// Waits until the process says that it is ready. Returns what it says besides.
    pub(crate) fn start(mode: &str) -> (Self, String) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(CHILD, mode).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = support::start_process(&mut command).unwrap();
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        let mut process = Self { child, input, output };
        let line = process.line();
        let rest = line.strip_prefix("ready").unwrap_or_else(|| panic!("{mode}: {line:?}"));
        (process, rest.trim().to_owned())
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Stops the process (SIGSTOP), and waits until it has stopped.
    pub(super) fn stop(&self) {
        kill(self.pid(), Signal::SIGSTOP).unwrap();
        let status = waitpid(self.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert_eq!(status, WaitStatus::Stopped(self.pid(), Signal::SIGSTOP));
    }

    pub(super) fn resume(&self) {
        kill(self.pid(), Signal::SIGCONT).unwrap();
    }

    /// Kills the process (SIGKILL), and waits for its end.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Lets a process end that waits for the end of its input. Returns whether it has succeeded.
    pub(crate) fn finish(&mut self) -> bool {
        self.input = None;
        self.child.wait().unwrap().success()
    }

    /// Lets a process go on that waits for the end of its input, until it says that it has done.
    pub(crate) fn go_on(&mut self) {
        self.input = None;
        assert_eq!(self.line(), "done");
    }

    /// Ends a process that serves a queue.
    pub(super) fn end(&mut self) -> Counted {
        self.input = None;
        let line = self.line();
        let numbers: Vec<u64> =
            line.split(' ').map(|word| word.parse().unwrap_or_else(|_| panic!("{line:?}"))).collect();
        let [received, accepted, expired, lost] = numbers[..] else { panic!("{line:?}") };
        assert!(self.child.wait().unwrap().success());
        Counted { received, accepted, expired, lost }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Does a whole test in a process of its own, because the test changes what belongs to a process.
///
/// Returns what it has printed to the standard error stream, once that has been closed: also by its
/// children.
///
/// # Panics
/// When the process fails.
pub(crate) fn in_a_process(mode: &str) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(CHILD, mode).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = support::start_process(&mut command).unwrap().wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    eprint!("{text}");
    assert!(output.status.success(), "{mode}: {}: {text}", output.status);
    text.into_owned()
}

/// The whole `main` of the processes.
pub(super) fn child() -> Option<ExitCode> {
    let mode = std::env::var(CHILD).ok()?;
    let queue = Queue::builder(0).max_len(4096).on_unanswered(Action::Accept);
    match &*mode {
        "serve" => serve(queue, false),
        "serve 50" => serve(queue.max_len(50), false),
        "hold" => serve(queue.deadline(DEADLINE, Action::Accept), true),
        "fork" => {
            in_runtime(async {
                let queue = queue.bind().await.unwrap();
                let forked = support::fork_sleeper().unwrap();
                accept_all(queue, false, &format!("ready {forked}")).await;
            });
        }
        "signals" => forked::signals(),
        "daemon" => forked::daemon(),
        "heir" => forked::heir(),
        "siblings" => forked::siblings(),
        mode if mode.starts_with(seccomp::MODE) => seccomp::child(mode),
        mode if mode.starts_with(spurious::MODE) => spurious::child(mode),
        mode if mode.starts_with(wakes::MODE) => wakes::child(mode),
        mode if mode.starts_with(scale::MODE) => scale::child(mode),
        mode if mode.starts_with(own_rules::MODE) => own_rules::child(mode),
        "proc" => proc::hidden(),
        "proc, no capability" => proc::without_capability(),
        "table" => network::own_a_table(),
        network::EVENTS => in_runtime(network::dropped_packets_are_reported()),
        promises::EVENTS => in_runtime(promises::documented_events()),
        "descriptors" => in_runtime(limits::few_descriptors()),
        "memory" => in_runtime(limits::little_memory()),
        "thousand" => in_runtime(limits::thousand_queues()),
        mode => panic!("{mode:?}"),
    }
    // A thread may still read the input.
    std::process::exit(0);
}

pub(crate) fn in_runtime(body: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(body);
}

fn serve(queue: QueueBuilder, hold: bool) {
    in_runtime(async { accept_all(queue.bind().await.unwrap(), hold, "ready").await });
}

/// Accepts all packets, or holds them, until the input ends. Then closes the queue.
async fn accept_all(mut queue: Queue, hold: bool, ready: &str) {
    let sink = queue.sink();
    let mut held = Vec::new();
    say(ready);
    let mut end = tokio::task::spawn_blocking(|| std::io::stdin().read(&mut [0]));
    loop {
        tokio::select! {
            packet = queue.recv() => {
                let packet = packet.expect("the queue continues").expect("no error");
                if hold { held.push(packet) } else { packet.accept().submit().unwrap() }
            }
            _ = &mut end => break,
        }
    }
    sink.close_with(Action::Accept).await.unwrap();
    let stats = sink.stats();
    let Counted { received, accepted, expired, lost } = Counted {
        received: stats.received.packets,
        accepted: stats.decided.accepted,
        expired: stats.decided.expired,
        lost: stats.lost.packets,
    };
    say(&format!("{received} {accepted} {expired} {lost}"));
}

pub(crate) fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{line}").unwrap();
    output.flush().unwrap();
}

/// Sleeps until the process is killed, or the test has ended.
pub(crate) fn wait_for_the_end() {
    let _ = std::io::stdin().read(&mut [0]);
}

/// A process that another one has made by `fork`; it is killed when this is dropped.
pub(super) struct Forked(Pid);

impl Forked {
    pub(super) fn new(pid: &str) -> Self {
        Self(Pid::from_raw(pid.parse().unwrap()))
    }

    pub(super) fn lives(&self) -> bool {
        kill(self.0, None).is_ok()
    }
}

impl Drop for Forked {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
    }
}
