//! Where rules are read from: nf_tables through netlink, the old iptables through its own program.

use std::{
    fs,
    io::{self, ErrorKind},
    process::{Command, Stdio},
    time::Duration,
};

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_ALIGNTO, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::{
    io::Errno,
    net::sockopt::{Timeout, set_socket_timeout},
};

use crate::{
    rules::{self, Rule},
    snapshot::Unreadable,
};

#[derive(Debug, Default)]
pub(crate) struct RuleSource {
    socket: Option<Socket>,
    sequence: u32,
}

impl RuleSource {
    /// The rules, and what could not be read of them. `None` if none could.
    pub(crate) fn read(&mut self) -> (Option<Vec<Rule>>, Vec<Unreadable>) {
        let mut unreadable = Vec::new();
        let mut rules = match self.nft() {
            Ok(rules) => rules,
            Err(error) => {
                // A socket with an unread rest of a dump is of no use.
                self.socket = None;
                let why = match error.raw_os_error().map(Errno::from_raw_os_error) {
                    Some(Errno::PERM) => "nf_tables: root or CAP_NET_ADMIN is needed".to_owned(),
                    Some(Errno::INVAL | Errno::OPNOTSUPP) => {
                        format!("nf_tables: {error}: the kernel has none, or its module is not loaded")
                    }
                    _ => format!("nf_tables: {error}"),
                };
                unreadable.push(Unreadable { what: "rules", why });
                return (None, unreadable);
            }
        };
        for (source, family, tables, saves) in LEGACY {
            match legacy(tables, saves) {
                Ok(None) => {}
                Ok(Some(text)) => rules.extend(rules::legacy(&text, source, family)),
                Err(why) => unreadable.push(Unreadable { what: "rules", why: format!("{source}: {why}") }),
            }
        }
        (Some(rules), unreadable)
    }

    fn nft(&mut self) -> io::Result<Vec<Rule>> {
        const TRIES: u32 = 3;
        let mut rules = Vec::new();
        for _ in 0..TRIES {
            rules.clear();
            // If rules change meanwhile, the dump is repeated; in the end what came is shown.
            if self.dump(&mut rules)? {
                break;
            }
        }
        Ok(rules)
    }

    /// Says whether the dump is of one time.
    fn dump(&mut self, rules: &mut Vec<Rule>) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        let socket = match &self.socket {
            Some(socket) => socket,
            None => self.socket.insert(open()?),
        };
        // struct nlmsghdr { length, type, flags, sequence, port }, struct nfgenmsg of all families
        let mut request = Vec::with_capacity(20);
        request.extend_from_slice(&20_u32.to_ne_bytes());
        request.extend_from_slice(&NFT_MSG_GETRULE.to_ne_bytes());
        request.extend_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
        request.extend_from_slice(&self.sequence.to_ne_bytes());
        request.extend_from_slice(&[0; 8]);
        socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
        let mut buffer = Vec::with_capacity(LONGEST_DATAGRAM);
        let mut whole = true;
        loop {
            buffer.clear();
            match socket.recv(&mut buffer, 0) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            };
            let mut rest = &buffer[..];
            while let Ok(message) = NetlinkBuffer::new_checked(rest) {
                let length = (message.length() as usize).next_multiple_of(usize::from(NLMSG_ALIGNTO));
                rest = rest.get(length..).unwrap_or_default();
                if message.sequence_number() != self.sequence {
                    continue;
                }
                whole &= message.flags() & NLM_F_DUMP_INTR == 0;
                match message.message_type() {
                    NLMSG_DONE => return Ok(whole),
                    NLMSG_ERROR => {
                        let code = message.payload().first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                        return Err(io::Error::from_raw_os_error(-code));
                    }
                    NFT_MSG_NEWRULE => rules.extend(rules::nft(message.payload())),
                    _ => {}
                }
            }
        }
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(1)))?;
    Ok(socket)
}

// NFNL_SUBSYS_NFTABLES << 8
const NFT_MSG_NEWRULE: u16 = (10 << 8) | 6;
const NFT_MSG_GETRULE: u16 = (10 << 8) | 7;
/// The kernel fills at most 32 KiB of a datagram of a dump.
const LONGEST_DATAGRAM: usize = 1 << 16;

type Legacy = (&'static str, &'static str, &'static str, [&'static str; 2]);

/// The name, the family, the file that lists the tables, and programs that print the rules.
const LEGACY: [Legacy; 2] = [
    (
        "iptables-legacy",
        "ip",
        "/proc/thread-self/net/ip_tables_names",
        ["iptables-legacy-save", "/usr/sbin/iptables-legacy-save"],
    ),
    (
        "ip6tables-legacy",
        "ip6",
        "/proc/thread-self/net/ip6_tables_names",
        ["ip6tables-legacy-save", "/usr/sbin/ip6tables-legacy-save"],
    ),
];

/// The text of all rules; `None` if there are no tables.
fn legacy(tables: &str, saves: [&str; 2]) -> Result<Option<String>, String> {
    match fs::read_to_string(tables) {
        Ok(names) if names.trim().is_empty() => return Ok(None),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{tables}: {error}")),
    }
    for save in saves {
        match Command::new(save).arg("-c").stdin(Stdio::null()).output() {
            Ok(output) if output.status.success() => {
                return Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()));
            }
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr);
                return Err(format!("{save}: {}", text.lines().next().unwrap_or("failed")));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(format!("{save}: {error}")),
        }
    }
    Err(format!("there are tables, and {} is not installed", saves[0]))
}
