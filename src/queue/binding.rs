//! Binding, and finding out what a refusal means.

use std::sync::{Arc, Weak};

use tokio::runtime::Handle;

use super::{
    busy_poll::BusyPoll,
    driver,
    inbox::Inbox,
    limits::{limits_of, receive_buffer},
    shared::{Settings, Shared, SystemClock},
};
use crate::{
    Error, ErrorKind, FlushPolicy, NetworkNamespace,
    keeper::{Timed, Timer},
    kernel::KernelTable,
    socket::{Socket, Unregistered, is_own_port, own_port},
    state::{Limits, Machine, Rules},
    sys::{self, Owner},
    wire::config::{Config, FLAG_CONNTRACK, FLAG_SECURITY_CONTEXT},
};

impl Shared {
    /// Opens the socket and binds the queue with everything in one message.
    pub(crate) fn bind(
        settings: Settings,
        config: &Config,
        policy: FlushPolicy,
        namespace: Option<&NetworkNamespace>,
    ) -> Result<Arc<Self>, Error> {
        let operation = || format!("bind queue {}", settings.queue);
        if Handle::try_current().is_err() {
            return Err(Error::new(ErrorKind::NoRuntime, operation()));
        }
        let limits = limits_of(config, Limits { max_len: 0, payload: 0 });
        let receive_buffer = settings.receive_buffer.unwrap_or_else(|| receive_buffer(limits, settings.attributes));
        let open = || (Unregistered::open(receive_buffer), KernelTable::open(), sys::network_owner());
        let (socket, table, network_owner) = match namespace {
            None => open(),
            Some(namespace) => namespace.run(open)?,
        };
        let socket = Socket::register(socket?).map_err(|error| error.with_operation(operation()))?;
        let rules = Rules { queue: settings.queue, on_unanswered: settings.on_unanswered, deadline: settings.deadline };
        // nfqnl counts a queue's packets from 1 (`++queue->id_sequence`).
        let machine = Machine::new(rules, policy, limits, 1, SystemClock);
        let inbox = Inbox::new(limits.payload, BusyPoll::new(settings.busy_poll));
        let shared = Arc::new(Self::new(settings, socket, table, machine, inbox, network_owner));
        own_port(shared.socket.port_id());
        shared.ask_for_the_queue(config)?;
        let timed: Weak<Self> = Arc::downgrade(&shared);
        let timer = Timer::new(timed as Weak<dyn Timed>);
        let _ =
            shared.timer.set(timer.map_err(|source| Error::os(operation(), source).with_detail("no timer thread"))?);
        driver::start(&shared);
        shared.with(|core| core.machine.bound());
        shared.trace.bound(limits.max_len, shared.socket.receive_buffer());
        Ok(shared)
    }

    /// Asks the kernel for the queue; more than once where its last owner may just be going.
    fn ask_for_the_queue(&self, config: &Config) -> Result<(), Error> {
        const TRIES: usize = 50;
        let mut tries = 0;
        loop {
            let error = match self.configure("bind queue", config) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            tries += 1;
            let permitted = || self.is_capable_here() && self.owner().is_none();
            let going = match error.kind() {
                ErrorKind::NotPermitted => permitted(),
                // Its port id is free before its queues are, and this socket has got it.
                _ => error.raw_os_error() == Some(EBUSY),
            };
            if going && tries < TRIES {
                std::thread::yield_now();
                continue;
            }
            return Err(self.explain(error, config));
        }
    }

    /// Says what a refusal means.
    pub(super) fn explain(&self, error: Error, config: &Config) -> Error {
        match error.kind() {
            // nfqnl_recv_config answers EPERM both for a queue of another socket and to a caller without the capability.
            ErrorKind::NotPermitted => match self.owner() {
                Some(owner) => error.with_kind(ErrorKind::AlreadyBound).with_detail(owner),
                // It cannot be the capability, so there is an owner, whom the table does not show or not any more.
                None if self.is_capable_here() => error.with_kind(ErrorKind::AlreadyBound),
                None => error.with_detail("CAP_NET_ADMIN is needed in the user namespace of the network namespace"),
            },
            ErrorKind::Unsupported => match self.refused_flag(config) {
                Some(name) => error.with_detail(name),
                None => error,
            },
            ErrorKind::Other if error.raw_os_error() == Some(EBUSY) => error.with_kind(ErrorKind::AlreadyBound),
            ErrorKind::Other if error.raw_os_error() == Some(EINVAL) => {
                // nfnetlink_rcv_msg: no subsystem has registered for the message.
                error.with_kind(ErrorKind::Unsupported).with_detail("nfnetlink_queue is missing")
            }
            _ => error,
        }
    }

    /// Whether the calling thread has the capability where the kernel asks for it.
    fn is_capable_here(&self) -> bool {
        self.network_owner != Owner::Foreign && sys::has_net_admin()
    }

    /// Who else owns the queue, in words.
    fn owner(&self) -> Option<String> {
        let port = self.table.read(self.settings.queue).ok()??.port_id;
        if port == self.socket.port_id() {
            return None;
        }
        if is_own_port(port) {
            return Some("it is another queue handle of this process".to_owned());
        }
        // A process's first netlink socket has the process id for its port; later ones have numbers that are negative
        // when they are taken for signed.
        Some(match port as i32 {
            process @ 1.. => format!("by process {process}, it seems"),
            _ => format!("by a netlink socket with port id {port}"),
        })
    }

    /// Which flag this kernel does not have. The queue is not bound, so a flag it has is answered with ENODEV, after
    /// the flags have been checked.
    fn refused_flag(&self, config: &Config) -> Option<&'static str> {
        let (_, flags) = config.flags?;
        let optional = [(FLAG_CONNTRACK, "conntrack"), (FLAG_SECURITY_CONTEXT, "security_context")];
        optional.into_iter().find_map(|(flag, name)| {
            let probe = Config { flags: Some((flag, flag)), ..Config::default() };
            let refused = flags & flag != 0
                && matches!(self.configure("probe queue", &probe), Err(error) if error.kind() == ErrorKind::Unsupported);
            refused.then_some(name)
        })
    }
}

const EBUSY: i32 = rustix::io::Errno::BUSY.raw_os_error();
const EINVAL: i32 = rustix::io::Errno::INVAL.raw_os_error();
