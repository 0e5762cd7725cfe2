//! Binding a queue, and explaining why the kernel refuses.

use std::{future::Future, sync::Arc};

use rustix::io::Errno;
use tokio::runtime::Handle;

#[cfg(feature = "test-util")]
use super::memory::MemoryKernel;
use super::{
    busy_poll::BusyPoll,
    driver,
    kernel::KernelTable,
    limits::{limits_of, receive_buffer},
    receiver::Receiver,
    shared::{Settings, Shared},
    socket::{self, Socket, Unregistered, is_own_port, own_port},
    sys::{self, Owner},
    task_timer::Pauses,
};
use crate::{
    state::{Machine, flush::FlushPolicy},
    types::{Error, ErrorKind},
    wire::config::{Command, Config, FLAG_CONNTRACK, FLAG_GSO, FLAG_SECURITY_CONTEXT, FLAG_UID_GID},
};

/// Descriptors that belong to the network namespace in which they were opened.
pub(crate) struct Opened {
    socket: Result<Unregistered, Error>,
    table: KernelTable,
    network_owner: Owner,
}

impl Opened {
    /// Opens a socket and the kernel's table of queues in the calling thread's network namespace.
    pub(crate) fn new(settings: &Settings, config: &Config) -> Self {
        let wanted = || receive_buffer(limits_of(config), settings.attributes);
        let socket = Unregistered::open(settings.receive_buffer.unwrap_or_else(wanted));
        let mut table = KernelTable::open();
        if table.is_missing() {
            // The kernel loads the module when the first message for it comes (nfnetlink_rcv_msg).
            // This message has a socket of its own, so that its reply is discarded.
            let mut message = Vec::new();
            Config { command: Some(Command::Nothing), ..Config::default() }.encode(&mut message, 1, settings.queue);
            if Unregistered::open(0).is_ok_and(|socket| socket.send(&message)) {
                table = KernelTable::open();
            }
        }
        let network_owner = socket.as_ref().map_or(Owner::Foreign, sys::network_owner);
        Self { socket, table, network_owner }
    }

    /// Opens a socket of a kernel in memory.
    #[cfg(feature = "test-util")]
    pub(crate) fn in_memory(kernel: &Arc<dyn MemoryKernel>, settings: &Settings, config: &Config) -> Self {
        let wanted = || receive_buffer(limits_of(config), settings.attributes);
        let receive_buffer = settings.receive_buffer.unwrap_or_else(wanted);
        let socket = Unregistered::open_in_memory(kernel, receive_buffer, settings.flow_marks);
        Self { socket, table: KernelTable::none(), network_owner: Owner::Own }
    }
}

impl Shared {
    /// Returns an error outside of a runtime.
    pub(crate) fn check_runtime(queue: u16) -> Result<(), Error> {
        match Handle::try_current() {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::new(ErrorKind::NoRuntime, format!("bind queue {queue}"))),
        }
    }

    /// Binds the queue, with everything in one message.
    pub(crate) fn bind(
        settings: Settings,
        config: &Config,
        policy: FlushPolicy,
        opened: Opened,
    ) -> Result<Arc<Self>, Error> {
        let shared = Self::prepare(settings, config, policy, opened)?;
        // Another thread may be closing the socket that has the queue.
        shared.ask_for_the_queue(config, 50)?;
        shared.begin()?;
        Ok(shared)
    }

    /// As [`bind`](Self::bind), but waits while another socket owns the queue.
    ///
    /// The kernel does not report that a queue has been unbound, so the request is repeated, with
    /// the same socket.
    pub(crate) fn bind_when_free(
        settings: Settings,
        config: Config,
        policy: FlushPolicy,
        opened: Opened,
    ) -> Result<impl Future<Output = Result<Arc<Self>, Error>> + Send + use<>, Error> {
        let operation = "bind queue";
        let runtime = Handle::try_current().map_err(|_| Error::new(ErrorKind::NoRuntime, operation))?;
        let shared = Self::prepare(settings, &config, policy, opened)?;
        let mut pauses = Pauses::new(operation, shared.clock.clone())?;
        Ok(async move {
            loop {
                match shared.ask_for_the_queue(&config, 1) {
                    Ok(()) => break,
                    Err(error) if error.kind() == ErrorKind::AlreadyBound => pauses.pause().await,
                    Err(error) => return Err(error),
                }
            }
            // Whatever polls this future, the driver runs where the socket is registered.
            let _entered = runtime.enter();
            shared.begin()?;
            Ok(shared)
        })
    }

    /// A queue that is not bound yet.
    fn prepare(settings: Settings, config: &Config, policy: FlushPolicy, opened: Opened) -> Result<Arc<Self>, Error> {
        let operation = || format!("bind queue {}", settings.queue);
        let Opened { socket, table, network_owner } = opened;
        let limits = limits_of(config);
        let socket = Socket::new(socket?).map_err(|error| error.with_operation(operation()))?;
        let fixed = settings.fixed();
        let machine = Machine::new(fixed, policy, limits, socket.first_id(), socket.clock());
        let receiver = Receiver::new(limits.payload, BusyPoll::new(settings.busy_poll));
        let shared = Arc::new(Self::new(settings, socket, table, machine, receiver, network_owner));
        own_port(shared.socket.port_id());
        Ok(shared)
    }

    /// Starts what a bound queue needs.
    fn begin(self: &Arc<Self>) -> Result<(), Error> {
        driver::start(self).map_err(|source| {
            let error = Error::os(format!("bind queue {}", self.settings.queue), source);
            error.with_detail("the timer thread cannot be started")
        })?;
        let max_len = self.core().machine.limits().max_len;
        self.with(|core| core.machine.bound());
        self.trace.bound(max_len, self.socket.receive_buffer());
        Ok(())
    }

    /// Sends the message that binds the queue, up to `most` times if the previous owner may be
    /// closing.
    fn ask_for_the_queue(&self, config: &Config, most: usize) -> Result<(), Error> {
        let mut tries = 0;
        loop {
            let error = match self.configure("bind queue", config) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            tries += 1;
            let permitted = || self.is_capable_here() && self.other_owner().is_none_or(socket::is_closed_port);
            let going = || match error.kind() {
                ErrorKind::NotPermitted => permitted(),
                _ => error.errno() == Some(Errno::BUSY),
            };
            if tries < most && going() {
                std::thread::yield_now();
                continue;
            }
            return Err(self.explain(error, config));
        }
    }

    /// Explains a refusal.
    pub(super) fn explain(&self, error: Error, config: &Config) -> Error {
        match error.kind() {
            // nfqnl_recv_config returns EPERM both if another socket owns the queue and if the
            // caller lacks the capability.
            ErrorKind::NotPermitted => match self.owner() {
                Some(owner) => error.with_kind(ErrorKind::AlreadyBound).with_detail(owner),
                // It is not the capability, so there is an owner, whom the table does not show (any
                // more).
                None if self.is_capable_here() => error.with_kind(ErrorKind::AlreadyBound),
                None => {
                    error.with_detail("CAP_NET_ADMIN is needed in the user namespace that owns the network namespace")
                }
            },
            ErrorKind::Unsupported => match self.refused_flag(config) {
                Some(name) => error.with_detail(name),
                None => error,
            },
            ErrorKind::Other if error.errno() == Some(Errno::BUSY) => error.with_kind(ErrorKind::AlreadyBound),
            ErrorKind::Other if error.errno() == Some(Errno::INVAL) => {
                // nfnetlink_rcv_msg: no subsystem has registered for the message.
                error.with_kind(ErrorKind::Unsupported).with_detail("nfnetlink_queue is missing")
            }
            _ => error,
        }
    }

    /// Whether the calling thread has the capability that the kernel checks.
    fn is_capable_here(&self) -> bool {
        self.network_owner != Owner::Foreign && self.is_capable()
    }

    /// The port id of another socket that has the queue.
    fn other_owner(&self) -> Option<u32> {
        let port = self.bound_kernel_stats().ok()??.port_id;
        (port != self.socket.port_id()).then_some(port)
    }

    /// The other owner of the queue, in words.
    fn owner(&self) -> Option<String> {
        let port = self.other_owner()?;
        if is_own_port(port) {
            return Some("the owner is another queue of this process".to_owned());
        }
        if socket::is_closed_port(port) {
            return Some("the owner is a queue of this process that is being closed".to_owned());
        }
        // The kernel gives a process's first netlink socket the process id. Other port ids are
        // negative as signed numbers.
        Some(match port as i32 {
            process @ 1.. => format!("the owner is probably process {process}"),
            _ => format!("the owner is the netlink socket with port id {port}; nfqtop tells its process"),
        })
    }

    /// Which flag the kernel does not support. The queue is not bound, so for a supported flag the
    /// kernel returns ENODEV, after it has checked the flags.
    fn refused_flag(&self, config: &Config) -> Option<&'static str> {
        let (_, flags) = config.flags?;
        let optional = [
            (FLAG_CONNTRACK, "conntrack"),
            (FLAG_SECURITY_CONTEXT, "security_context"),
            (FLAG_GSO, "gso"),
            (FLAG_UID_GID, "uid_gid"),
        ];
        optional.into_iter().find_map(|(flag, name)| {
            let probe = Config { flags: Some((flag, flag)), ..Config::default() };
            let refused = flags & flag != 0
                && matches!(self.configure("probe queue", &probe), Err(error) if error.kind() == ErrorKind::Unsupported);
            refused.then_some(name)
        })
    }
}
