//! Port ids of netlink sockets.

use std::{
    hash::{BuildHasher, RandomState},
    io, process,
    time::Instant,
};

/// Gives a socket a random port id: `bind` is tried with one after the other, until it does not
/// return [`AddrInUse`](io::ErrorKind::AddrInUse). Returns the port id, whose highest bit is 1.
///
/// The kernel's own first choice is the process id. It is free again as soon as the close of its
/// socket begins. Later in the same call (`netlink_release`), the kernel removes all queues and
/// tables of this port id, also those that a new socket with the same port id has made meanwhile.
/// Any user may open and close a socket with a port id that can be guessed.
///
/// # Errors
/// Those of `bind`.
pub fn bind_port(mut bind: impl FnMut(u32) -> io::Result<()>) -> io::Result<u32> {
    let mut result = Err(io::ErrorKind::AddrInUse.into());
    for _ in 0..ATTEMPTS {
        // The keys of the hash are random. A child by `fork` has the keys of its parent: the
        // process id and the time are others.
        let port = RandomState::new().hash_one((process::id(), Instant::now())) as u32 | 1 << 31;
        result = bind(port).map(|()| port);
        if !result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse) {
            break;
        }
    }
    result
}

const ATTEMPTS: usize = 16;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn port_ids_are_random() {
        // Two of so few are equal in one of 4000 runs.
        let ports: HashSet<u32> = (0..1000).map(|_| bind_port(|_| Ok(())).unwrap()).collect();
        assert!(ports.len() >= 999 && ports.iter().all(|port| port >> 31 == 1));
        for bit in 0..31 {
            let ones = ports.iter().filter(|port| **port >> bit & 1 == 1).count();
            assert!((300..700).contains(&ones), "bit {bit}: {ones}");
        }
    }

    #[test]
    fn a_port_id_in_use_is_not_an_error_but_others_are() {
        let refuse = |times: usize, kind: io::ErrorKind| {
            let mut tried = 0;
            let result = bind_port(|_| {
                tried += 1;
                if tried > times { Ok(()) } else { Err(kind.into()) }
            });
            (result.map(drop).map_err(|error| error.kind()), tried)
        };
        assert_eq!(refuse(3, io::ErrorKind::AddrInUse), (Ok(()), 4));
        assert_eq!(refuse(99, io::ErrorKind::AddrInUse), (Err(io::ErrorKind::AddrInUse), ATTEMPTS));
        assert_eq!(refuse(99, io::ErrorKind::PermissionDenied), (Err(io::ErrorKind::PermissionDenied), 1));
    }
}
