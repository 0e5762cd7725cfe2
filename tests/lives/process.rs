//! A filter, as its parent sees it.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc,
    thread::JoinHandle,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    Traits,
    filter::{Origin, arguments},
};
use crate::support;

/// It is killed when this is dropped.
pub(super) struct Process {
    pub(super) number: u32,
    child: Child,
    input: ChildStdin,
    lines: mpsc::Receiver<String>,
    reader: Option<JoinHandle<()>>,
    said: Vec<String>,
}

impl Process {
    /// In the network namespace of the calling thread.
    pub(super) fn start(number: u32, from: Origin, traits: Traits) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        command.args(arguments(number, from, traits)).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = support::start_process(&mut command).expect("start a process");
        let (input, output) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        let (sender, lines) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                let Ok(line) = line else { return };
                let _ = sender.send(line);
            }
        });
        Self { number, child, input, lines, reader: Some(reader), said: Vec::new() }
    }

    /// The first line that begins so.
    pub(super) fn said(&mut self, begin: &str) -> Option<String> {
        self.said.extend(self.lines.try_iter());
        self.said.iter().find(|line| line.starts_with(begin)).cloned()
    }

    /// All that it has said.
    pub(super) fn lines(&mut self) -> &[String] {
        self.said.extend(self.lines.try_iter());
        &self.said
    }

    /// What it says again is then found anew.
    pub(super) fn forget_lines(&mut self) {
        self.lines();
        self.said.clear();
    }

    pub(super) fn command(&mut self, line: &str) {
        // It may have ended.
        let _ = writeln!(self.input, "{line}");
    }

    pub(super) fn terminate(&self) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
    }

    pub(super) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What each of its threads does: its state, system call, and stack in the kernel, as `proc(5)`
    /// gives them.
    pub(super) fn threads(&self) -> String {
        let tasks = format!("/proc/{}/task", self.child.id());
        let mut text = String::new();
        for task in std::fs::read_dir(tasks).into_iter().flatten().flatten() {
            for file in ["stat", "syscall", "stack"] {
                let read = std::fs::read_to_string(task.path().join(file));
                let read = read.unwrap_or_else(|error| error.to_string());
                text += &format!("\n{file}: {}", read.trim_end());
            }
        }
        text
    }

    /// Whether it has ended, and if so, whether it says that it has succeeded. All that it has said
    /// has then been read.
    pub(super) fn ended(&mut self) -> Option<bool> {
        let status = self.child.try_wait().expect("wait for a process")?;
        let _ = self.reader.take().map(JoinHandle::join);
        Some(status.success())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
