//! Measurements that need a process of their own. The benchmark starts its own program again.

use std::process::{Command, Stdio};

use super::{consumer::Contender, memory, ours, peers, syscalls};

/// Runs a task in a child and returns its output.
pub fn ask(task: &[&str]) -> String {
    let output = command(task).stderr(Stdio::inherit()).output().expect("start a child");
    assert!(output.status.success(), "the child for {task:?} failed: {}", output.status);
    String::from_utf8(output.stdout).expect("text")
}

pub fn command(task: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program's path"));
    command.arg("--child").args(task);
    command
}

/// Runs in the child. `more` are contenders that only this benchmark has.
pub fn run(task: &[String], more: &[Contender]) {
    match &task.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["memory", name, packets] => println!("{}", memory::grown(name, packets.parse().expect("a number"))),
        ["syscalls", name] => {
            let all = super::floor::ALL.into_iter().chain(ours::ALL).chain(peers::ALL).chain(more.iter().copied());
            let contender = all.into_iter().find(|contender| contender.name == *name).expect("a contender's name");
            syscalls::traced(&contender);
        }
        other => panic!("unknown task {other:?}"),
    }
}
