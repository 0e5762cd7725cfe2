//! Binding, and finding out what a refusal means.

use std::sync::Arc;

use tokio::runtime::Handle;

use super::{
    driver,
    limits::Limits,
    shared::{Settings, Shared},
};
use crate::{
    Error, ErrorKind, FlushPolicy, NetworkNamespace,
    kernel::KernelTable,
    socket::{Socket, Unregistered},
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
        if Handle::try_current().is_err() {
            return Err(Error::new(ErrorKind::NoRuntime, format!("bind queue {}", settings.queue)));
        }
        let limits = Limits::of(config, Limits { max_len: 0, payload: 0 });
        let receive_buffer = settings.receive_buffer.unwrap_or_else(|| limits.buffer());
        let open = || (Unregistered::open(receive_buffer), KernelTable::open());
        let (socket, table) = match namespace {
            None => open(),
            Some(namespace) => namespace.run(open)?,
        };
        let shared = Arc::new(Self::new(settings, Socket::register(socket?)?, table, policy, limits));
        shared.configure("bind queue", config).map_err(|error| shared.explain(error, config))?;
        driver::start(&shared).map_err(|source| Error::os(format!("bind queue {}", settings.queue), source))?;
        Ok(shared)
    }

    /// Says what a refused bind means.
    pub(super) fn explain(&self, error: Error, config: &Config) -> Error {
        match error.kind() {
            // nfqnl_recv_config answers EPERM both for a queue of another socket and to a caller without the capability.
            ErrorKind::NotPermitted => match self.owner() {
                Some(owner) => error.with_kind(ErrorKind::AlreadyBound).with_detail(owner),
                None => error,
            },
            ErrorKind::Unsupported => match self.refused_flag(config) {
                Some(name) => error.with_detail(name),
                None => error,
            },
            ErrorKind::Other if error.raw_os_error() == Some(EINVAL) => {
                // nfnetlink_rcv_msg: no subsystem has registered for the message.
                error.with_kind(ErrorKind::Unsupported).with_detail("nfnetlink_queue is missing")
            }
            _ => error,
        }
    }

    /// Who else owns the queue, in words.
    fn owner(&self) -> Option<String> {
        let port = self.table.read(self.settings.queue).ok()??.port_id;
        if port == self.socket.port_id() {
            return None;
        }
        let port = port as i32;
        // A process's first netlink socket has the process id for its port; later ones have negative numbers.
        Some(if port > 0 { format!("by process {port}, it seems") } else { format!("port id {port}") })
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

const EINVAL: i32 = rustix::io::Errno::INVAL.raw_os_error();
