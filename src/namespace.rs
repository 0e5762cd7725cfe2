//! Network namespaces.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::Arc,
    thread,
};

use rustix::{
    io::Errno,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

#[cfg(feature = "test-util")]
use crate::io::memory::MemoryKernel;
use crate::{
    io::{
        kernel::{NO_PROC, lacks_proc},
        sys,
    },
    types::{Error, ErrorKind},
};

/// A network namespace in which to bind a queue or to install rules, without moving the caller's
/// threads into it: [`QueueBuilder::namespace`](crate::QueueBuilder::namespace), and
/// [`run`](Self::run) for `DivertBuilder::install`.
///
/// It holds a file descriptor, which keeps the namespace alive. Clones share it.
#[derive(Debug, Clone)]
pub struct NetworkNamespace(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Real(Arc<OwnedFd>),
    #[cfg(feature = "test-util")]
    Memory(Arc<dyn MemoryKernel>),
}

impl NetworkNamespace {
    /// The namespace at a path: `/proc/PID/ns/net` of a process in it, or a bind mount of such a
    /// file.
    ///
    /// # Errors
    /// The file cannot be opened. Whether it is a network namespace is checked when it is used. The
    /// file in `/proc` requires the right to read the process's state (`PTRACE_MODE_READ_FSCREDS`).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let file =
            File::open(path).map_err(|source| failed(&format!("open network namespace {}", path.display()), source))?;
        Ok(OwnedFd::from(file).into())
    }

    /// The namespace that `ip netns add NAME` has created: `/run/netns/NAME`.
    ///
    /// # Errors
    /// As [`open`](Self::open). `InvalidInput` if the name is empty, `.` or `..`, or contains a
    /// slash or NUL.
    pub fn named(name: &str) -> Result<Self, Error> {
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
            let error = Error::new(ErrorKind::InvalidInput, format!("open network namespace {name:?}"));
            return Err(error.with_detail("a name is not empty, `.` or `..`, and contains no slash or NUL"));
        }
        Self::open(Path::new("/run/netns").join(name))
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn current() -> Result<Self, Error> {
        Self::open("/proc/thread-self/ns/net").map_err(|error| match lacks_proc() {
            true => error.with_detail(NO_PROC),
            false => error,
        })
    }

    /// The namespace of a socket: the one in which it was opened, whichever process holds it now.
    ///
    /// For example, with a socket from another process, a queue can be bound in that process's
    /// network namespace.
    ///
    /// # Errors
    /// * [`InvalidInput`](ErrorKind::InvalidInput): `socket` is not a socket.
    /// * [`NotPermitted`](ErrorKind::NotPermitted): the thread lacks `CAP_NET_ADMIN` in the user
    ///   namespace that owns the network namespace.
    /// * [`Unsupported`](ErrorKind::Unsupported): the kernel is older than Linux 4.10, or was built
    ///   without network namespaces (`NET_NS`).
    #[doc(alias = "SIOCGSKNS")]
    pub fn of_socket(socket: impl AsFd) -> Result<Self, Error> {
        sys::network_namespace_of(socket).map(Self::from).map_err(|errno| {
            let error = failed("find the network namespace of a socket", errno.into());
            match errno {
                Errno::NOTSOCK => error.with_kind(ErrorKind::InvalidInput).with_detail("not a socket"),
                Errno::NOTTY => error.with_kind(ErrorKind::Unsupported).with_detail("Linux 4.10 is needed"),
                Errno::PERM => error.with_detail(OF_SOCKET_NEEDS),
                _ => error,
            }
        })
    }

    fn descriptor(&self) -> Result<&OwnedFd, Error> {
        match &self.0 {
            Kind::Real(namespace) => Ok(namespace),
            #[cfg(feature = "test-util")]
            Kind::Memory(_) => {
                let error = Error::new(ErrorKind::Unsupported, "enter network namespace");
                Err(error.with_detail("a simulated kernel has queues and nothing else"))
            }
        }
    }

    /// The namespace of a kernel in memory.
    #[cfg(feature = "test-util")]
    pub(crate) fn in_memory(kernel: Arc<dyn MemoryKernel>) -> Self {
        Self(Kind::Memory(kernel))
    }

    /// The kernel in memory whose namespace this is.
    #[cfg(feature = "test-util")]
    pub(crate) fn memory(&self) -> Option<&Arc<dyn MemoryKernel>> {
        match &self.0 {
            Kind::Real(_) => None,
            Kind::Memory(kernel) => Some(kernel),
        }
    }

    /// Runs `body` in the namespace, on a temporary thread, and waits for it. The calling thread
    /// stays in its namespace. What `body` opens, for example sockets, stays in the other one.
    ///
    /// ```no_run
    /// # #[cfg(feature = "divert")]
    /// # fn example() -> Result<(), tokio_nfqueue::Error> {
    /// use tokio_nfqueue::{Divert, Hook, NetworkNamespace, Rule};
    ///
    /// let rules = Divert::builder().rule(Rule::new(Hook::Forward).to_queue(0));
    /// let divert = NetworkNamespace::named("lab")?.run(|| rules.install())??;
    /// # drop(divert);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// * [`NotPermitted`](ErrorKind::NotPermitted): entering the namespace needs `CAP_SYS_ADMIN` in
    ///   the caller's user namespace and in the one that owns the network namespace.
    /// * [`Unsupported`](ErrorKind::Unsupported): it is that of a simulated kernel, which has only
    ///   queues.
    /// * [`Other`](ErrorKind::Other): it is not a network namespace, or no thread can be started.
    ///
    /// # Panics
    /// If `body` panics.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> Result<T, Error> {
        let namespace = self.descriptor()?;
        thread::scope(|scope| {
            let builder = thread::Builder::new().name("netns".to_owned());
            let run = || {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok(body())
            };
            let thread = sys::with_signals_blocked(|| builder.spawn_scoped(scope, run))?;
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
        .map_err(|source| {
            let error = failed("enter network namespace", source);
            match error.kind() {
                ErrorKind::NotPermitted => error.with_detail(ENTERING_NEEDS),
                _ => error,
            }
        })
    }
}

/// `netns_install` (net/core/net_namespace.c).
const ENTERING_NEEDS: &str =
    "CAP_SYS_ADMIN is needed in this process's user namespace and in the one that owns the network namespace";

/// `sock_ioctl` (net/socket.c).
const OF_SOCKET_NEEDS: &str = "CAP_NET_ADMIN is needed in the user namespace that owns the network namespace";

fn failed(operation: &str, source: io::Error) -> Error {
    // EINVAL: the file is not a network namespace.
    Error::os(operation.to_owned(), source)
}

/// From a descriptor of a network namespace, for example one received over a Unix socket.
impl From<OwnedFd> for NetworkNamespace {
    fn from(fd: OwnedFd) -> Self {
        Self(Kind::Real(Arc::new(fd)))
    }
}
