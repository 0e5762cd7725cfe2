//! Addresses of this host behind which is the host at the right (destination NAT), which may see
//! the left one under an address of this host (masquerade).

use std::net::SocketAddr;

use super::world::{Host, World};
use crate::common::{Random, rules};

/// The first ports that are forwarded to the right host: without and with masquerade.
const PORTS: [u16; 2] = [62_000, 62_100];
/// The number of ports of each kind.
const COUNT: u16 = 64;

/// Whether the kernel can do it.
pub(super) fn install(world: &World) -> bool {
    let mut installed = true;
    for v6 in [false, true] {
        let (from, to) = (world.address(Host::This, Host::Left, v6), world.address(Host::Right, Host::This, v6));
        for (first, masquerade) in PORTS.into_iter().zip([false, true]) {
            let ports = first..=first + COUNT - 1;
            installed &= rules::install_redirection(&format!("nat_{first}"), from, ports, to, masquerade).is_ok();
        }
    }
    installed
}

/// An end at the right, and the address to send to.
pub(super) fn end(world: &World, v6: bool, random: &mut Random) -> (SocketAddr, SocketAddr) {
    let port = PORTS[random.below(2)] + random.below(COUNT.into()) as u16;
    let at = |address| SocketAddr::new(address, port);
    (at(world.address(Host::Right, Host::This, v6)), at(world.address(Host::This, Host::Left, v6)))
}
