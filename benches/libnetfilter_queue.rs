//! libnetfilter_queue, the C library that most programs use, compared with this crate, `nfq` and
//! the floor. It is loaded at run time. If it is not installed, this benchmark names the package
//! and succeeds.
//!
//! A whole run of `cargo bench --workspace` includes its figures in `benches/RESULTS.md`.
#![allow(missing_docs)]

use std::{
    ffi::{c_char, c_int, c_void},
    process::ExitCode,
    ptr::null_mut,
    sync::{Arc, OnceLock},
};

use libloading::{Library, Symbol};
use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};
use suite::{
    child,
    consumer::{Consumer, Contender, Job, Until, WHOLE},
    drain, flood, floor,
    options::{Options, USAGE},
    ours, peers,
    plan::{self, Section},
    report, support, syscalls, tcp,
};

mod suite;

const NEEDED: &str = "libnetfilter_queue is not installed, so it is not measured. The package is libnetfilter-queue1 in Debian \
                      and Ubuntu, libnetfilter_queue in Fedora and Arch.";

fn main() -> ExitCode {
    let options = match Options::parse() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("libnetfilter_queue: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if options.help {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    if options.gate {
        return ExitCode::SUCCESS;
    }
    let scale = options.scale();
    let mut cpu = Section::new(drain::SECTION, scale.rounds);
    let mut saturated = Section::new(flood::SECTION, scale.rounds);
    for contender in [floor::ONE, floor::BATCH, floor::PACKED, ours::ACCEPT_ALL, peers::NFQ, CLASSIC] {
        cpu = cpu.step(contender.name, move |book| drain::measure(&contender, &scale, book));
        saturated = saturated.step(contender.name, move |book| flood::measure(&contender, &scale, book));
    }
    let mut goodput = Section::new(tcp::SECTION, scale.rounds);
    let queues = [
        (tcp::NO_QUEUE, None),
        (tcp::DEFAULTS, Some((ours::ACCEPT_ALL, tcp::job(WHOLE, true)))),
        (tcp::BUSY_POLL, Some((ours::BUSY_POLL, tcp::job(WHOLE, true)))),
        (CLASSIC.name, Some((CLASSIC, tcp::job(WHOLE, false)))),
    ];
    for (name, queue) in queues {
        goodput = goodput.step(name, move |book| tcp::measure(name, queue, &scale, book));
    }
    let calls = Section::new(syscalls::SECTION, 1).step(CLASSIC.name, |book| syscalls::measure(&CLASSIC, book));
    let allocations =
        Section::new("allocations", 1).step(CLASSIC.name, move |book| drain::allocations(&CLASSIC, &scale, book));
    let sections = [cpu, saturated, goodput, calls, allocations];
    if options.list {
        plan::list(&sections, &options);
        return ExitCode::SUCCESS;
    }
    if Functions::loaded().is_none() {
        eprintln!("{NEEDED}");
        return ExitCode::SUCCESS;
    }
    // Before any other thread starts: an ordinary user becomes root of a user namespace.
    if let Err(sentence) = support::enter() {
        eprintln!("libnetfilter_queue: {sentence}");
        return ExitCode::FAILURE;
    }
    if !options.child.is_empty() {
        child::run(&options.child, &[CLASSIC]);
        return ExitCode::SUCCESS;
    }
    let book = plan::run(&sections, &options);
    println!("{}", report::of_library(&book, options.quick));
    if options.complete() {
        report::leave(&book);
    }
    ExitCode::SUCCESS
}

const CLASSIC: Contender =
    Contender { name: report::library::NAME, make: |job| Box::new(Classic::new(job)), queues: 1 };

/// The loop of the library's own example: receive one message, pass it to the library, set the
/// verdict in the callback.
struct Classic {
    library: &'static Functions,
    handle: *mut c_void,
    queue: *mut c_void,
    buffer: Vec<u8>,
}

impl Classic {
    fn new(job: &Job) -> Self {
        let library = Functions::loaded().expect("the library was found before");
        // SAFETY: the functions are called as libnetfilter_queue.h declares them. The handles are
        // the library's and live until `drop`. The callback needs no data.
        let (handle, queue) = unsafe {
            let handle = (library.open)();
            assert!(!handle.is_null(), "nfq_open");
            let queue = (library.create_queue)(handle, 0, decide, null_mut());
            assert!(!queue.is_null(), "nfq_create_queue");
            assert!((library.set_mode)(queue, COPY_PACKET, job.copy_range) >= 0, "nfq_set_mode");
            assert!((library.set_queue_maxlen)(queue, job.max_len) >= 0, "nfq_set_queue_maxlen");
            (handle, queue)
        };
        let classic = Self { library, handle, queue, buffer: vec![0; 72 * 1024] };
        peers::grow_receive_buffer(&classic.fd(), job.receive_buffer);
        classic
    }

    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        // SAFETY: the handle and its descriptor are open as long as `self` lives.
        unsafe { std::os::fd::BorrowedFd::borrow_raw((self.library.fd)(self.handle)) }
    }
}

impl Consumer for Classic {
    fn consume(&mut self, until: &Arc<Until>) {
        while !until.over() {
            // SAFETY: as in `fd`. `fd` is not used because it would borrow all of `self`, and the
            // buffer is needed.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw((self.library.fd)(self.handle)) };
            let length = match recv(fd, &mut self.buffer[..], RecvFlags::empty()) {
                Ok((length, _)) => length,
                // The socket's receive buffer has overflowed. Packets follow.
                Err(Errno::NOBUFS) => continue,
                Err(error) => panic!("receive a packet: {error}"),
            };
            // SAFETY: the buffer holds `length` bytes.
            unsafe { (self.library.handle_packet)(self.handle, self.buffer.as_mut_ptr().cast(), length as c_int) };
            until.both(1);
        }
    }
}

impl Drop for Classic {
    fn drop(&mut self) {
        // SAFETY: both handles are open and are not used again.
        unsafe {
            (self.library.destroy_queue)(self.queue);
            (self.library.close)(self.handle);
        }
    }
}

extern "C" fn decide(queue: *mut c_void, _: *mut c_void, packet: *mut c_void, _: *mut c_void) -> c_int {
    const ACCEPT: u32 = 1;
    let Some(library) = Functions::loaded() else { return -1 };
    // SAFETY: the library passes a queue's handle and a packet. The packet's header begins with its
    // id.
    unsafe {
        let header = (library.packet_header)(packet);
        let id = u32::from_be(header.cast::<u32>().read_unaligned());
        (library.set_verdict)(queue, id, ACCEPT, 0, null_mut())
    }
}

/// `NFQNL_COPY_PACKET`
const COPY_PACKET: u8 = 2;

type Callback = extern "C" fn(*mut c_void, *mut c_void, *mut c_void, *mut c_void) -> c_int;

/// The library's functions, as libnetfilter_queue.h declares them.
struct Functions {
    open: unsafe extern "C" fn() -> *mut c_void,
    close: unsafe extern "C" fn(*mut c_void) -> c_int,
    create_queue: unsafe extern "C" fn(*mut c_void, u16, Callback, *mut c_void) -> *mut c_void,
    destroy_queue: unsafe extern "C" fn(*mut c_void) -> c_int,
    set_mode: unsafe extern "C" fn(*mut c_void, u8, u32) -> c_int,
    set_queue_maxlen: unsafe extern "C" fn(*mut c_void, u32) -> c_int,
    fd: unsafe extern "C" fn(*mut c_void) -> c_int,
    handle_packet: unsafe extern "C" fn(*mut c_void, *mut c_char, c_int) -> c_int,
    packet_header: unsafe extern "C" fn(*mut c_void) -> *mut c_void,
    set_verdict: unsafe extern "C" fn(*mut c_void, u32, u32, u32, *mut u8) -> c_int,
}

impl Functions {
    fn loaded() -> Option<&'static Self> {
        static LOADED: OnceLock<Option<Functions>> = OnceLock::new();
        LOADED.get_or_init(Self::load).as_ref()
    }

    /// # Safety
    /// `T` must be the type of the function of this name.
    unsafe fn get<T: Copy + 'static>(library: &'static Library, name: &str) -> Option<T> {
        // SAFETY: the caller guarantees the type.
        let symbol: Symbol<'static, T> = unsafe { library.get(name) }.ok()?;
        Some(*symbol)
    }

    fn load() -> Option<Self> {
        // SAFETY: the library has no initialisers. Its functions have the types given above. It is
        // never unloaded.
        unsafe {
            let library: &'static Library = Box::leak(Box::new(Library::new("libnetfilter_queue.so.1").ok()?));
            Some(Self {
                open: Self::get(library, "nfq_open")?,
                close: Self::get(library, "nfq_close")?,
                create_queue: Self::get(library, "nfq_create_queue")?,
                destroy_queue: Self::get(library, "nfq_destroy_queue")?,
                set_mode: Self::get(library, "nfq_set_mode")?,
                set_queue_maxlen: Self::get(library, "nfq_set_queue_maxlen")?,
                fd: Self::get(library, "nfq_fd")?,
                handle_packet: Self::get(library, "nfq_handle_packet")?,
                packet_header: Self::get(library, "nfq_get_msg_packet_hdr")?,
                set_verdict: Self::get(library, "nfq_set_verdict")?,
            })
        }
    }
}
