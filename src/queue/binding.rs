//! Binding, and finding out what a refusal means.

use std::{fs, sync::Arc};

use super::{
    driver,
    shared::{Settings, Shared},
};
use crate::{
    Error, ErrorKind, FlushPolicy,
    socket::Socket,
    wire::config::{Config, FLAG_CONNTRACK, FLAG_SECURITY_CONTEXT},
};

impl Shared {
    /// Opens the socket and binds the queue with everything in one message.
    pub(crate) fn bind(
        settings: Settings,
        config: &Config,
        receive_buffer: usize,
        policy: FlushPolicy,
        payload: usize,
    ) -> Result<Arc<Self>, Error> {
        let socket = Socket::open(receive_buffer)?;
        let shared = Arc::new(Self::new(settings, socket, policy, payload));
        shared.configure("bind queue", config).map_err(|error| shared.explain(error, config))?;
        driver::start(&shared).map_err(|source| Error::os(format!("bind queue {}", settings.queue), source))?;
        Ok(shared)
    }

    /// Says what a refused bind means.
    fn explain(&self, error: Error, config: &Config) -> Error {
        match error.kind() {
            // nfqnl_recv_config answers EPERM both for a queue of another socket and to a caller without the capability.
            ErrorKind::NotPermitted => match owner(self.settings.queue) {
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

/// Who owns a queue in this network namespace, in words.
fn owner(queue: u16) -> Option<String> {
    let table = fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue").ok()?;
    let port = table.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let number = fields.next()?.parse::<u16>().ok()?;
        // Printed as unsigned, and above 2³¹ for all but a process's first netlink socket; older kernels print it signed.
        let port = fields.next()?.parse::<i64>().ok()? as u32 as i32;
        (number == queue).then_some(port)
    })?;
    // The port id of a process's first netlink socket is its process id.
    Some(if port > 0 { format!("by process {port}, it seems") } else { format!("port id {port}") })
}
