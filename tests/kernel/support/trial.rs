//! Tests: each on its own thread in its own network namespace, with a time limit.

use std::{
    any::Any,
    fmt::Debug,
    future::Future,
    io,
    process::ExitCode,
    sync::{
        OnceLock,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use libtest_mimic::{Arguments, Failed, Trial};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nfqueue_testbed::{RawQueue, SLOWNESS, UserNamespace, enter, fresh, isolated, rules, stay_on_one_cpu};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

/// Set to 1 to skip all tests that need a kernel.
const SKIP: &str = "TOKIO_NFQUEUE_SKIP_KERNEL_TESTS";
/// How long a test may take. Other programs may leave it a small part of the processors: the
/// longest ones have taken 120 s then.
const DEADLINE: Duration = Duration::from_secs(180 + 60 * SLOWNESS);
/// How much longer what a deadline interrupts may take to clean up.
const GRACE: Duration = Duration::from_secs(5);

/// What a test may return: nothing, or a result.
pub trait Report {
    /// The failure, if it is one.
    fn report(self) -> Result<(), Failed>;
}

impl Report for () {
    fn report(self) -> Result<(), Failed> {
        Ok(())
    }
}

impl<E: Debug> Report for Result<(), E> {
    fn report(self) -> Result<(), Failed> {
        self.map_err(|error| format!("the test returned an error: {error:?}").into())
    }
}

/// The body of `main` of a test binary: must be its first statement.
///
/// Takes the arguments of the standard harness; runs two tests at a time by default. A filter that
/// ends in `::` selects the tests of a module: those whose names begin with it.
pub fn run(mut tests: Vec<Trial>) -> ExitCode {
    if let Some(code) = UserNamespace::child() {
        return code;
    }
    // A list needs no kernel; the tests report problems.
    let entered = enter().is_ok();
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(2);
    // `order::` is also in `bridge::..._in_any_order::two_workers`.
    if let Some(module) = arguments.filter.as_ref().filter(|filter| filter.ends_with("::")) {
        tests.retain(|test| test.name().starts_with(module));
    }
    let skip = std::env::var_os(SKIP).is_some_and(|value| value == "1");
    if skip && !arguments.list {
        eprintln!("{SKIP}=1: all {} tests that need the kernel are skipped", tests.len());
    }
    let _held = (SLOWNESS > 1 && entered && !skip && !arguments.list).then(rules::hold_hooks);
    let tests = tests.into_iter().map(|test| if skip { test.with_ignored_flag(true) } else { test }).collect();
    libtest_mimic::run(&arguments, tests).exit_code()
}

/// A test without a runtime.
pub fn test_sync<R: Report>(name: &str, body: impl FnOnce() -> R + Send + 'static) -> Trial {
    trial(name, move || body().report())
}

/// A test in a Tokio runtime of one thread.
pub fn test<R: Report, F: Future<Output = R>>(name: &str, body: impl FnOnce() -> F + Send + 'static) -> Trial {
    trial(name, move || in_runtime(&mut tokio::runtime::Builder::new_current_thread(), body))
}

/// A test in a Tokio runtime of two worker threads.
pub fn test_multi<R: Report, F: Future<Output = R>>(name: &str, body: impl FnOnce() -> F + Send + 'static) -> Trial {
    trial(name, move || in_runtime(tokio::runtime::Builder::new_multi_thread().worker_threads(2), body))
}

/// A test without a runtime that keeps its own deadlines, and is stopped by none.
pub fn test_unbounded<R: Report>(name: &str, body: impl FnOnce() -> R + Send + 'static) -> Trial {
    Trial::test(name, move || {
        prerequisites()?;
        body().report()
    })
}

/// On a slow machine the body's thread stays on one CPU: there a packet may wait so long for its
/// CPU that what this thread sends later, on another CPU, overtakes it ([`stay_on_one_cpu`]).
fn in_runtime<R: Report, F: Future<Output = R>>(
    builder: &mut tokio::runtime::Builder,
    body: impl FnOnce() -> F,
) -> Result<(), Failed> {
    let runtime = builder.enable_all().build()?;
    if SLOWNESS > 1 {
        stay_on_one_cpu();
    }
    runtime.block_on(async {
        match tokio::time::timeout(DEADLINE, body()).await {
            Ok(result) => result.report(),
            Err(_) => Err(format!("not done after {DEADLINE:?}").into()),
        }
    })
}

fn trial(name: &str, body: impl FnOnce() -> Result<(), Failed> + Send + 'static) -> Trial {
    let thread = thread::Builder::new().name(name.to_owned());
    Trial::test(name, move || {
        prerequisites()?;
        let (alive, ended) = mpsc::channel::<()>();
        let thread = thread.spawn(move || {
            let _alive = alive;
            fresh();
            body()
        })?;
        // Nothing is sent: the channel closes when the thread ends for any reason.
        match ended.recv_timeout(DEADLINE + GRACE) {
            Err(RecvTimeoutError::Timeout) => Err(format!("hangs: not done after {:?}", DEADLINE + GRACE).into()),
            _ => thread.join().unwrap_or_else(|panic| Err(message(&*panic).into())),
        }
    })
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("with something that is no text"))
}

/// What the tests need of the system.
fn prerequisites() -> Result<(), String> {
    static CHECKED: OnceLock<Result<(), String>> = OnceLock::new();
    let check = || {
        enter()?;
        isolated(|| {
            RawQueue::bind(0).map_err(|error| format!("the kernel offers no NFQUEUE: {error}"))?;
            nf_tables().map_err(|error| format!("the kernel offers no nf_tables: {error}"))
        })
    };
    CHECKED.get_or_init(check).clone().map_err(|error| format!("{error}; {SKIP}=1 skips these tests"))
}

/// Asks nf_tables for its generation (`NFT_MSG_GETGEN`), which it has even without a table.
fn nf_tables() -> io::Result<()> {
    const GETGEN: u16 = 10 << 8 | 16;
    const REQUEST: u16 = 1;
    const ERROR: u16 = 2;
    let mut message = [0; 20];
    message[0..4].copy_from_slice(&20_u32.to_ne_bytes());
    message[4..6].copy_from_slice(&GETGEN.to_ne_bytes());
    message[6..8].copy_from_slice(&REQUEST.to_ne_bytes());
    let socket = Socket::new(NETLINK_NETFILTER)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(GRACE))?;
    socket.send_to(&message, &SocketAddr::new(0, 0), 0)?;
    let mut answer = Vec::with_capacity(4096);
    socket.recv(&mut answer, 0)?;
    match (answer.get(4..6), answer.get(16..20)) {
        (Some(kind), Some(code)) if kind == ERROR.to_ne_bytes() => {
            let code = i32::from_ne_bytes([code[0], code[1], code[2], code[3]]);
            Err(io::Error::from_raw_os_error(-code))
        }
        _ => Ok(()),
    }
}
