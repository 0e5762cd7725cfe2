//! Moves the program into another network namespace.

use std::{fs::File, os::fd::AsFd, path::Path};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
    thread::{LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space, move_into_thread_name_spaces},
};

/// Where to look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Namespace {
    Process(u32),
    /// `/run/netns/NAME`
    Name(String),
    Path(String),
}

impl Namespace {
    /// Digits are the id of a process, what contains a slash is a path.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(pid) => Ok(Self::Process(pid)),
            Err(_) if text.contains('/') => Ok(Self::Path(text.to_owned())),
            Err(_) if text.is_empty() || text == "." || text == ".." => Err(format!("{text:?} is no namespace")),
            Err(_) => Ok(Self::Name(text.to_owned())),
        }
    }

    fn path(&self) -> String {
        match self {
            Self::Process(pid) => format!("/proc/{pid}/ns/net"),
            Self::Name(name) => format!("/run/netns/{name}"),
            Self::Path(path) => path.clone(),
        }
    }

    /// Moves the calling thread, which must be the only one.
    pub(crate) fn enter(&self) -> Result<(), String> {
        let path = self.path();
        let file = File::open(&path).map_err(|error| format!("open network namespace {path}: {error}"))?;
        let network = Some(LinkNameSpaceType::Network);
        match (move_into_link_name_space(file.as_fd(), network), self) {
            (Ok(()), _) => Ok(()),
            // An ordinary user is root in the user namespaces that it made.
            (Err(Errno::PERM), Self::Process(pid)) if enter_with_user(*pid).is_ok() => Ok(()),
            (Err(Errno::PERM), _) => Err(format!("enter network namespace {path}: root or CAP_SYS_ADMIN is needed")),
            (Err(Errno::INVAL), _) => Err(format!("enter network namespace {path}: it is not one")),
            (Err(error), _) => Err(format!("enter network namespace {path}: {error}")),
        }
    }
}

/// Also moves into the user namespace of the process.
fn enter_with_user(pid: u32) -> rustix::io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    move_into_thread_name_spaces(process.as_fd(), ThreadNameSpaceType::USER | ThreadNameSpaceType::NETWORK)
}

/// The number of the calling thread's network namespace, for example `net:[4026531840]`.
pub(crate) fn current() -> String {
    let link = std::fs::read_link(Path::new("/proc/thread-self/ns/net"));
    link.map_or_else(|_| "net:[?]".to_owned(), |link| link.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_a_pid_a_path_or_a_name() {
        assert_eq!(Namespace::parse("12").unwrap().path(), "/proc/12/ns/net");
        assert_eq!(Namespace::parse("lab").unwrap().path(), "/run/netns/lab");
        assert_eq!(Namespace::parse("./lab").unwrap().path(), "./lab");
        assert!(Namespace::parse("").is_err() && Namespace::parse("..").is_err());
    }

    #[test]
    fn what_is_no_namespace_is_named() {
        let error = Namespace::parse("no-such-namespace").unwrap().enter().unwrap_err();
        assert!(error.starts_with("open network namespace /run/netns/no-such-namespace: No such file"), "{error}");
        let error = Namespace::parse("/dev/null").unwrap().enter().unwrap_err();
        assert!(error.starts_with("enter network namespace /dev/null: "), "{error}");
    }
}
