//! The program as it is, on a real kernel, beside other processes with queues.
//!
//! Each test has a thread and a network namespace of its own. The other processes are this binary:
//! see `children`.

mod children;
mod pseudo_terminal;

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader},
    net::{Ipv4Addr, UdpSocket},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, ExitCode, Output, Stdio},
    time::Duration,
};

use libtest_mimic::{Arguments, Failed, Trial};
use nfqueue_divert::{Divert, Hook, Protocol, Rule};
use nfqueue_testbed::{enter, isolated, queue_line, wait_until};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use self::{
    children::{Child, Mode},
    pseudo_terminal::PseudoTerminal,
};

/// Set to 1 to skip all tests that need a kernel.
const SKIP: &str = "TOKIO_NFQUEUE_SKIP_KERNEL_TESTS";
/// Datagrams to this port plus the number of a queue go to that queue.
const PORT: u16 = 9000;

fn main() -> ExitCode {
    if let Some(code) = children::run() {
        return code;
    }
    // The tests report problems.
    let _ = enter();
    let tests: [(&str, fn()); 14] = [
        ("the_stuck_queue_is_on_top_with_its_owner_and_advice", stuck_on_top),
        ("a_program_that_reads_and_does_not_decide_is_told_from_one_that_does_not_read", reads_and_holds),
        ("a_stopped_process_is_named", stopped),
        ("all_processes_that_hold_a_socket_are_listed", shared),
        ("packets_lost_to_the_receive_buffer_are_reported", buffer_loss),
        ("a_rule_to_a_queue_that_no_program_has_bound_is_reported_with_its_counter", unbound),
        ("the_table_is_printed_once", table),
        ("without_queues_it_says_where_others_may_be", empty),
        ("json_is_printed_at_each_refresh_until_a_signal_comes", each_refresh),
        ("another_network_namespace_is_shown_by_the_id_of_a_process", by_pid),
        ("what_may_not_be_read_is_named_and_the_rest_is_shown", powerless),
        ("an_ordinary_user_is_told_what_is_needed", ordinary_user),
        ("keys_work_in_a_terminal_and_quitting_restores_it", keys),
        ("a_signal_ends_it_and_restores_the_terminal", signals),
    ];
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(2);
    let skip = std::env::var_os(SKIP).is_some_and(|value| value == "1");
    let trial = |(name, body): (&str, fn())| {
        let test = move || {
            enter()?;
            // Its name is also that of the thread.
            std::panic::catch_unwind(|| isolated(body)).map_err(|_| Failed::without_message())
        };
        Trial::test(name, test).with_ignored_flag(skip)
    };
    libtest_mimic::run(&arguments, tests.into_iter().map(trial).collect()).exit_code()
}

/// The program: beside this binary, for a copy of both, or where Cargo has built it.
fn path() -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let beside = this.parent().unwrap().join("nfqtop");
    if beside.exists() { beside } else { env!("CARGO_BIN_EXE_nfqtop").into() }
}

fn nfqtop(arguments: &[&str]) -> Output {
    let output = Command::new(path()).args(arguments).stdin(Stdio::null()).output().unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

fn once() -> Value {
    let output = nfqtop(&["--once", "--json"]);
    assert!(output.status.success());
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The entry of a queue.
fn entry(view: &Value, queue: u16) -> &Value {
    let queues = view["queues"].as_array().unwrap();
    queues.iter().find(|entry| entry["queue"] == queue).unwrap_or_else(|| panic!("no queue {queue} in {view:#}"))
}

fn kinds(entry: &Value) -> Vec<&str> {
    entry["advice"].as_array().unwrap().iter().map(|advice| advice["kind"].as_str().unwrap()).collect()
}

fn first_advice(entry: &Value) -> &str {
    entry["advice"][0]["text"].as_str().unwrap_or_else(|| panic!("no advice: {entry:#}"))
}

/// A rule for each queue.
fn rules(queues: &[u16]) -> Divert {
    let rule = |&queue: &u16| {
        Rule::new(Hook::Output).ipv4().protocol(Protocol::Udp).destination_port(PORT + queue).to_queue(queue)
    };
    Divert::builder().rules(queues.iter().map(rule)).install().unwrap()
}

/// Sends datagrams that a rule sends to a queue.
fn send(queue: u16, count: u32) {
    // Packets that wait in a queue are charged to the socket that has sent them. It would block.
    const EACH: u32 = 50;
    for first in (0..count).step_by(EACH as usize) {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        for _ in first..count.min(first + EACH) {
            // While packets are dropped at OUTPUT, sending fails.
            let _ = socket.send_to(b"datagram", (Ipv4Addr::LOCALHOST, PORT + queue));
        }
    }
}

fn wait_for_length(queue: u16, length: u64) {
    wait_until("the packets are queued", || queue_line(queue).is_some_and(|line| line[2] == length));
}

fn stuck_on_top() {
    let (one, stuck, two) = (
        Child::start("good-one", 1, Mode::Accepts),
        Child::start("stuck-one", 2, Mode::Sleeps),
        Child::start("good-two", 3, Mode::Accepts),
    );
    let _rules = rules(&[1, 2, 3]);
    for queue in [1, 2, 3] {
        send(queue, 20);
    }
    wait_for_length(2, 20);
    wait_for_length(1, 0);
    wait_for_length(3, 0);
    let view = once();
    let top = &view["queues"][0];
    assert_eq!(top["queue"], 2, "{view:#}");
    assert_eq!(top["owners"], serde_json::json!([{"pid": stuck.pid(), "name": "stuck-one"}]));
    assert_eq!((kinds(top), &top["severity"]), (vec!["stuck"], &Value::from("losing")));
    assert!(first_advice(top).starts_with("20 packets wait, and none has been decided for "), "{top:#}");
    assert!(first_advice(top).contains("does not read its socket"), "{top:#}");
    assert!(first_advice(top).contains(&format!("strace -f -p {}", stuck.pid())), "{top:#}");
    assert_eq!((&top["length"], &top["limit"], &top["fill_percent"]), (&20.into(), &1024.into(), &1.into()));
    for (queue, child, name) in [(1, &one, "good-one"), (3, &two, "good-two")] {
        let entry = entry(&view, queue);
        assert_eq!(entry["owners"], serde_json::json!([{"pid": child.pid(), "name": name}]));
        assert_eq!((kinds(entry), &entry["last_id"], &entry["length"]), (vec![], &20.into(), &0.into()), "{entry:#}");
    }
    assert_eq!(view["unreadable"], serde_json::json!([]));
}

fn reads_and_holds() {
    let _child = Child::start("holds", 1, Mode::Holds);
    let _rules = rules(&[1]);
    send(1, 5);
    wait_for_length(1, 5);
    wait_until("all are read", || once()["queues"][0]["unread_bytes"] == 0);
    let view = once();
    assert!(first_advice(entry(&view, 1)).contains("has read all of them and sends no verdict"), "{view:#}");
}

fn stopped() {
    let child = Child::start("stopped", 1, Mode::Accepts);
    let _rules = rules(&[1]);
    kill(Pid::from_raw(child.pid() as i32), Signal::SIGSTOP).unwrap();
    send(1, 3);
    wait_for_length(1, 3);
    let view = once();
    let expected = format!("the process is stopped; continue it with kill -CONT {}", child.pid());
    assert!(first_advice(entry(&view, 1)).ends_with(&expected), "{view:#}");
}

fn shared() {
    let child = Child::start("shared", 1, Mode::Forks);
    let view = once();
    let owners = entry(&view, 1)["owners"].as_array().unwrap();
    let mut pids: Vec<u32> = owners.iter().map(|owner| owner["pid"].as_u64().unwrap() as u32).collect();
    pids.sort_unstable();
    let mut expected = vec![child.pid(), child.forked().unwrap()];
    expected.sort_unstable();
    assert_eq!(pids, expected, "{view:#}");
}

fn buffer_loss() {
    let _child = Child::start("slow", 1, Mode::Sleeps);
    let _rules = rules(&[1]);
    // More than the default buffer of a socket holds.
    send(1, 900);
    wait_until("packets are lost", || queue_line(1).is_some_and(|line| line[6] > 0));
    let before = queue_line(1).unwrap();
    let view = once();
    let queue = entry(&view, 1);
    assert_eq!(kinds(queue), ["stuck", "lost_before"], "{view:#}");
    assert_eq!(queue["user_dropped"], before[6]);
    let mut program = Command::new(path());
    let program = program
        .args(["--once", "--json", "--interval", "3"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It reads the queues first; the more is sent while it watches.
    let sender = std::thread::scope(|scope| {
        let pid = program.id();
        let sender = scope.spawn(move || {
            while fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
                send(1, 10);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let output = program.wait_with_output().unwrap();
        sender.join().unwrap();
        output
    });
    let view: Value = serde_json::from_slice(&sender.stdout).unwrap();
    let queue = entry(&view, 1);
    assert_eq!(kinds(queue), ["stuck", "buffer_loss"], "{view:#}");
    assert!(queue["per_second"]["user_dropped"].as_f64().unwrap() > 0.0, "{view:#}");
}

fn unbound() {
    let rule = Rule::new(Hook::Output).ipv4().protocol(Protocol::Udp).destination_port(PORT + 1).to_queues(1..=4);
    let bypassed = Rule::new(Hook::Output).ipv4().protocol(Protocol::Udp).destination_port(PORT + 7).to_queue(7);
    let builder = Divert::builder().rule(rule.bypass(false)).rule(bypassed.bypass(true)).table("sends");
    let _divert = builder.install().unwrap();
    let _child = Child::start("second", 2, Mode::Accepts);
    send(7, 6);
    let view = once();
    let summary = view["queues"].as_array().unwrap().iter().map(|entry| {
        (entry["queue"].as_u64().unwrap(), entry["last_queue"].as_u64().unwrap(), entry["bound"] == true, kinds(entry))
    });
    let summary = summary.collect::<Vec<_>>();
    let expected = [
        (1, 1, false, vec!["unbound"]),
        (3, 4, false, vec!["unbound"]),
        (7, 7, false, vec!["bypassed"]),
        (2, 2, true, vec![]),
    ];
    assert_eq!(summary, expected, "{view:#}");
    let rule = &entry(&view, 7)["rules"][0];
    assert_eq!((&rule["source"], &rule["table"], &rule["packets"]), (&"nft".into(), &"sends".into(), &6.into()));
    assert_eq!((&rule["bypass"], &rule["first_queue"]), (&true.into(), &7.into()));
    let rule = &entry(&view, 2)["rules"][0];
    assert_eq!((&rule["first_queue"], &rule["last_queue"], &rule["bypass"]), (&1.into(), &4.into(), &false.into()));
}

fn table() {
    let child = Child::start("asleep", 2, Mode::Sleeps);
    let _rules = rules(&[2]);
    send(2, 4);
    wait_for_length(2, 4);
    let output = nfqtop(&["--once"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let row = text.lines().nth(3).unwrap();
    let expected = format!("2 STUCK asleep {} 4 ~0% 0 0 0 0 4", child.pid());
    assert_eq!(row.split_whitespace().collect::<Vec<_>>().join(" "), expected, "{text}");
    assert!(text.contains("\nAdvice\n  2: 4 packets wait, and none has been decided for "), "{text}");
    assert!(text.contains("\nRules\n  nft "), "{text}");
    assert!(text.contains(", to 2: 4 packets, "), "{text}");
}

fn empty() {
    let output = nfqtop(&["--once", "--interval", "0.1"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("\nNo queue is bound, "), "{text}");
    let hint = "Other network namespaces are not shown: lsns -t net, then nfqtop --namespace PID.";
    assert!(text.lines().any(|line| line == hint), "{text}");
}

fn each_refresh() {
    let _child = Child::start("good", 1, Mode::Accepts);
    let _rules = rules(&[1]);
    let mut command = Command::new(path());
    command.args(["--json", "--interval", "0.1"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut program = command.spawn().unwrap();
    let lines = BufReader::new(program.stdout.take().unwrap()).lines();
    let mut seen = 0;
    for line in lines.map_while(Result::ok) {
        let view: Value = serde_json::from_str(&line).unwrap();
        let rate = view["queues"][0]["per_second"]["arrived"].as_f64().unwrap();
        send(1, 10);
        seen += u32::from(rate > 0.0);
        if seen == 3 {
            kill(Pid::from_raw(program.id() as i32), Signal::SIGTERM).unwrap();
        }
    }
    assert!(seen >= 3);
    assert!(program.wait().unwrap().success());
}

fn by_pid() {
    let child = Child::start("elsewhere", 5, Mode::Accepts);
    let pid = child.pid().to_string();
    let view = isolated(move || {
        let output = nfqtop(&["--once", "--json", "--interval", "0.1", "--namespace", &pid]);
        assert!(output.status.success());
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    });
    assert_eq!(view["queues"][0]["queue"], 5, "{view:#}");
    assert_eq!(view["queues"][0]["owners"][0]["name"], "elsewhere", "{view:#}");
    let link = fs::read_link("/proc/thread-self/ns/net").unwrap();
    assert_eq!(OsStr::new(view["namespace"].as_str().unwrap()), link.as_os_str());
}

/// In a user namespace without privileges over the network namespace.
fn powerless() {
    let _child = Child::start("hidden", 1, Mode::Accepts);
    let _rules = rules(&[1]);
    let output = children::powerless(&path()).args(["--once", "--json", "--interval", "0.1"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let view: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&view["queues"][0]["queue"], &view["queues"][0]["owners"]), (&1.into(), &serde_json::json!([])));
    assert_eq!(view["queues"][0]["rules"], Value::Null);
    let named: Vec<&str> =
        view["unreadable"].as_array().unwrap().iter().map(|part| part["what"].as_str().unwrap()).collect();
    assert_eq!(named, ["owners", "rules"], "{view:#}");
    let text = view["unreadable"].to_string();
    assert!(text.contains("CAP_SYS_PTRACE") && text.contains("CAP_NET_ADMIN"), "{text}");
}

fn ordinary_user() {
    let mut command = Command::new(path());
    command.args(["--once", "--interval", "0.1"]).stdin(Stdio::null());
    if nix::unistd::getuid().is_root() && !is_in_user_namespace() {
        command.uid(65_534).gid(65_534);
    } else {
        eprintln!("skipped: another user cannot be had in this user namespace");
        return;
    }
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => {
            eprintln!("skipped: user 65534 cannot start the program: {error}");
            return;
        }
    };
    assert!(!output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("The queues cannot be read."), "{text}");
    assert!(text.contains("root or CAP_DAC_READ_SEARCH is needed"), "{text}");
    assert!(text.contains("root or CAP_NET_ADMIN is needed"), "{text}");
}

fn is_in_user_namespace() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !map.contains("4294967295"))
}

fn keys() {
    let stuck = Child::start("stuck", 4, Mode::Sleeps);
    let _good = Child::start("good", 2, Mode::Accepts);
    let _rules = rules(&[2, 4]);
    send(4, 12);
    wait_for_length(4, 12);
    let mut terminal = PseudoTerminal::start(&path(), &["--interval", "0.2"]);
    terminal.wait_for("STUCK");
    terminal.wait_for("12 packets wait, and none has been decided");
    terminal.wait_for(" q quit");
    let rows = terminal.rows();
    assert!(rows[2].starts_with(&format!("     4 STUCK    stuck {}", stuck.pid())), "{rows:#?}");
    assert!(rows[23].starts_with(" q quit"), "{rows:#?}");
    terminal.press("j");
    terminal.wait_for("── queue 2 ─");
    terminal.press("\x1b[A");
    terminal.wait_for("── queue 4 ─");
    terminal.press("s");
    terminal.wait_for("by number");
    wait_until("the rows are in this order", || terminal.rows()[2].starts_with("     2 "));
    terminal.press("?");
    terminal.wait_for("packets that found the queue full");
    terminal.press("?");
    terminal.wait_for("── queue 4 ─");
    terminal.press(" ");
    terminal.wait_for("PAUSED");
    // What changes during a pause is shown when it is over.
    send(4, 3);
    wait_for_length(4, 15);
    assert!(!terminal.text().contains("15 packets wait"));
    terminal.press(" ");
    terminal.wait_for("15 packets wait");
    terminal.resize(30, 120);
    terminal.wait_for("LAST ID");
    terminal.press("q");
    assert!(terminal.ended().success());
    terminal.assert_restored();
}

fn signals() {
    let _child = Child::start("good", 2, Mode::Accepts);
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut terminal = PseudoTerminal::start(&path(), &["--interval", "600"]);
        terminal.wait_for("good");
        terminal.signal(signal);
        assert!(terminal.ended().success());
        terminal.assert_restored();
    }
    let mut terminal = PseudoTerminal::start(&path(), &["--interval", "600"]);
    terminal.wait_for("good");
    // ctrl-c
    terminal.press("\x03");
    assert!(terminal.ended().success());
    terminal.assert_restored();
}
