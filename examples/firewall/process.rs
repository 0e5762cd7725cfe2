//! The name of the program that has a socket, from `/proc`.

use std::{fs, net::SocketAddr, path::Path};

use tokio_nfqueue::Protocol;

/// The name of a program with a socket for this connection. It reads the tables of all sockets and
/// processes, which takes some milliseconds on a busy host.
pub(crate) fn name(protocol: Protocol, source: SocketAddr, destination: SocketAddr) -> Option<String> {
    // A socket for IPv6 may have connections over IPv4.
    let tables = match protocol {
        Protocol::Tcp => ["/proc/net/tcp", "/proc/net/tcp6"],
        _ => ["/proc/net/udp", "/proc/net/udp6"],
    };
    let inode = tables.iter().find_map(|table| inode(table, source.port(), destination.port()))?;
    let wanted = format!("socket:[{inode}]");
    let mut processes = fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    let process = processes.find(|process| has_open(process, &wanted))?;
    let name = fs::read_to_string(process.join("comm")).ok()?;
    // It goes into a line, and to a terminal.
    Some(name.trim_end().chars().map(|c| if c.is_control() { '?' } else { c }).collect())
}

/// The inode of the socket with these ports. One that is not connected has the remote port 0.
fn inode(table: &str, local: u16, remote: u16) -> Option<String> {
    let (local, remote) = (format!(":{local:04X}"), format!(":{remote:04X}"));
    let sockets = fs::read_to_string(table).ok()?;
    sockets.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (from, to, inode) = (fields.get(1)?, fields.get(2)?, fields.get(9)?);
        let is_it = from.ends_with(&local) && (to.ends_with(&remote) || to.ends_with(":0000"));
        (is_it && *inode != "0").then(|| (*inode).to_owned())
    })
}

fn has_open(process: &Path, wanted: &str) -> bool {
    let Ok(files) = fs::read_dir(process.join("fd")) else { return false };
    files.flatten().any(|file| fs::read_link(file.path()).is_ok_and(|target| target.as_os_str() == wanted))
}
