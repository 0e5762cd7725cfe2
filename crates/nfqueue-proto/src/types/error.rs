//! The one error type.

use std::{borrow::Cow, fmt, io};

use rustix::io::Errno;

use super::PacketId;

/// An error: which operation failed and why, and the packet that it concerns.
///
/// `Display` starts with the operation: `bind queue 7: already bound by another socket`. The error
/// of the operating system, if there is one, is the [`source`](std::error::Error::source) and is
/// not repeated. `{error:#}` appends it, for programs that print one line, and so does `Debug`.
pub struct Error(Box<Repr>);

struct Repr {
    kind: ErrorKind,
    operation: Cow<'static, str>,
    detail: Option<Cow<'static, str>>,
    packet: Option<PacketId>,
    fatal: bool,
    source: Option<io::Error>,
}

/// The kinds of [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The crate refused a value before it was sent to the kernel.
    InvalidInput,
    /// Another socket owns the queue.
    AlreadyBound,
    /// There is a table of this name: of another process, or without an owner.
    AlreadyExists,
    /// The caller lacks a capability, usually `CAP_NET_ADMIN` in the user namespace that owns the
    /// network namespace. The kernel checks it at every send, not only at bind.
    NotPermitted,
    /// The running kernel does not support what was requested.
    Unsupported,
    /// The packet had already left the kernel's queue: it was decided before, its interface went
    /// down, or a hook was unregistered.
    PacketGone,
    /// The packet had already been decided by its `QueueBuilder::deadline` or by
    /// a closing queue.
    Expired,
    /// The queue is closed.
    Closed,
    /// There is no Tokio runtime, it has no I/O driver, or it is shutting down.
    NoRuntime,
    /// The kernel's acknowledgement was lost because the receive buffer was full. Whether the
    /// request took effect is unknown.
    Unconfirmed,
    /// A message from the kernel could not be parsed.
    Malformed,
    /// A time-out expired.
    TimedOut,
    /// Another version of this crate has made it, and this version cannot read it.
    Incompatible,
    /// The other process has ended, or has closed the connection.
    Disconnected,
    /// Any other error of the operating system; see [`Error::raw_os_error`].
    Other,
}

impl Error {
    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The packet that the error concerns.
    pub fn packet_id(&self) -> Option<PacketId> {
        self.0.packet
    }

    /// The operating system's error number (errno), if there was one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.0.source.as_ref().and_then(io::Error::raw_os_error)
    }

    #[doc(hidden)]
    pub fn errno(&self) -> Option<Errno> {
        self.0.source.as_ref().and_then(Errno::from_io_error)
    }

    #[doc(hidden)]
    pub fn new(kind: ErrorKind, operation: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Repr {
            kind,
            operation: operation.into(),
            detail: None,
            packet: None,
            fatal: false,
            source: None,
        }))
    }

    /// An error of the operating system. The errno determines the kind.
    #[doc(hidden)]
    pub fn os(operation: impl Into<Cow<'static, str>>, source: io::Error) -> Self {
        let kind = match Errno::from_io_error(&source) {
            Some(Errno::PERM | Errno::ACCESS) => ErrorKind::NotPermitted,
            Some(Errno::OPNOTSUPP | Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT) => ErrorKind::Unsupported,
            _ => ErrorKind::Other,
        };
        Self::new(kind, operation).with_source(source)
    }

    /// Marks an error with which the stream ends.
    #[doc(hidden)]
    pub fn fatal(mut self) -> Self {
        self.0.fatal = true;
        self
    }

    /// Whether it ends its queue: it is the last item of the stream.
    pub fn is_fatal(&self) -> bool {
        self.0.fatal
    }

    /// Replaces the operation.
    #[doc(hidden)]
    pub fn with_operation(mut self, operation: impl Into<Cow<'static, str>>) -> Self {
        self.0.operation = operation.into();
        self
    }

    #[doc(hidden)]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self
    }

    #[doc(hidden)]
    pub fn with_detail(mut self, detail: impl Into<Cow<'static, str>>) -> Self {
        self.0.detail = Some(detail.into());
        self
    }

    #[doc(hidden)]
    pub fn with_packet(mut self, packet: PacketId) -> Self {
        self.0.packet = Some(packet);
        self
    }

    #[doc(hidden)]
    pub fn with_source(mut self, source: io::Error) -> Self {
        self.0.source = Some(source);
        self
    }
}

impl ErrorKind {
    fn text(self) -> &'static str {
        match self {
            Self::InvalidInput => "invalid value",
            Self::AlreadyBound => "already bound by another socket",
            Self::AlreadyExists => "already exists",
            Self::NotPermitted => "not permitted",
            Self::Unsupported => "not supported by this kernel",
            Self::PacketGone => "the packet has already left the queue",
            Self::Expired => "the packet has already been decided",
            Self::Closed => "the queue is closed",
            Self::NoRuntime => "there is no Tokio runtime with an I/O driver",
            Self::Unconfirmed => "the kernel's acknowledgement was lost",
            Self::Malformed => "malformed message",
            Self::TimedOut => "timed out",
            Self::Incompatible => "made by another version",
            Self::Disconnected => "the other process has ended or closed the connection",
            Self::Other => "failed",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Repr { kind, operation, detail, packet, source, fatal: _ } = &*self.0;
        f.write_str(operation)?;
        if let Some(packet) = packet {
            write!(f, " (packet {packet})")?;
        }
        write!(f, ": {kind}")?;
        if let Some(detail) = detail {
            write!(f, ": {detail}")?;
        }
        match source {
            Some(source) if f.alternate() => write!(f, ": {source}"),
            _ => Ok(()),
        }
    }
}

/// As `{error:#}`, so that a `main` that returns an error prints what a person can read.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:#}")
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| source as _)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::InvalidInput => io::ErrorKind::InvalidInput,
            ErrorKind::AlreadyBound => io::ErrorKind::AddrInUse,
            ErrorKind::AlreadyExists => io::ErrorKind::AlreadyExists,
            ErrorKind::NotPermitted => io::ErrorKind::PermissionDenied,
            ErrorKind::Unsupported => io::ErrorKind::Unsupported,
            ErrorKind::PacketGone => io::ErrorKind::NotFound,
            ErrorKind::Closed => io::ErrorKind::BrokenPipe,
            ErrorKind::Malformed | ErrorKind::Incompatible => io::ErrorKind::InvalidData,
            ErrorKind::Disconnected => io::ErrorKind::ConnectionReset,
            ErrorKind::TimedOut | ErrorKind::Expired => io::ErrorKind::TimedOut,
            ErrorKind::NoRuntime | ErrorKind::Unconfirmed | ErrorKind::Other => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// Why `PacketStream::try_recv` has no packet.
#[derive(Debug)]
pub enum TryRecvError {
    /// There is no packet now.
    Empty,
    /// The queue is closed.
    Closed,
    /// The queue cannot be used any more.
    Failed(Error),
}

impl fmt::Display for TryRecvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("there is no packet"),
            Self::Closed => f.write_str("the queue is closed"),
            Self::Failed(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for TryRecvError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            // `Display` is that of the error itself.
            Self::Failed(error) => error.source(),
            Self::Empty | Self::Closed => None,
        }
    }
}
