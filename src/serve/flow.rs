//! Which packets are of one connection, as far as their order is concerned.

/// The protocol and both ends, the smaller one first, so that both directions are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FlowKey {
    protocol: u8,
    ends: [End; 2],
}

/// An address and a port. The port is 0 where there is none, or where it cannot be seen.
type End = ([u8; 16], u16);

impl FlowKey {
    /// Of a packet that begins with its IP header. All others are of one connection.
    pub(super) fn of(packet: &[u8]) -> Self {
        match packet.first().map(|byte| byte >> 4) {
            Some(4) => v4(packet),
            Some(6) => v6(packet),
            _ => None,
        }
        .unwrap_or(Self { protocol: 0, ends: [([0; 16], 0); 2] })
    }

    fn new(protocol: u8, source: &[u8], destination: &[u8], transport: Option<&[u8]>) -> Self {
        let port = |at: usize| match transport.and_then(|bytes| bytes.get(at..at + 2)) {
            Some(&[high, low]) if HAVE_PORTS.contains(&protocol) => u16::from_be_bytes([high, low]),
            _ => 0,
        };
        let end = |address: &[u8], port| {
            let mut padded = [0; 16];
            padded[..address.len()].copy_from_slice(address);
            (padded, port)
        };
        let mut ends = [end(source, port(0)), end(destination, port(2))];
        ends.sort_unstable();
        Self { protocol, ends }
    }
}

fn v4(packet: &[u8]) -> Option<FlowKey> {
    let header = packet.get(..20)?;
    let length = usize::from(header[0] & 0xf) * 4;
    let is_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    let transport = packet.get(length..).filter(|_| !is_fragment);
    Some(FlowKey::new(header[9], &header[12..16], &header[16..20], transport))
}

fn v6(packet: &[u8]) -> Option<FlowKey> {
    let header = packet.get(..40)?;
    let (mut next, mut rest) = (header[6], &packet[40..]);
    let mut is_fragment = false;
    while EXTENSIONS.contains(&next) {
        let [following, length, ..] = *rest else { break };
        let length = match next {
            FRAGMENT => 8,
            AUTHENTICATION => (usize::from(length) + 2) * 4,
            _ => (usize::from(length) + 1) * 8,
        };
        is_fragment |= next == FRAGMENT;
        next = following;
        rest = rest.get(length..).unwrap_or_default();
    }
    Some(FlowKey::new(next, &header[8..24], &header[24..40], Some(rest).filter(|_| !is_fragment)))
}

const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
/// Hop-by-hop options, routing, fragment, authentication, destination options.
const EXTENSIONS: [u8; 5] = [0, 43, FRAGMENT, AUTHENTICATION, 60];
/// TCP, UDP, DCCP, SCTP, UDP-Lite.
const HAVE_PORTS: [u8; 5] = [6, 17, 33, 132, 136];

#[cfg(test)]
mod tests {
    use super::*;

    fn packet_v4(protocol: u8, from: (u8, u16), to: (u8, u16), fragment: u16) -> Vec<u8> {
        let mut packet = vec![0; 28];
        packet[0] = 0x45;
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[9] = protocol;
        (packet[15], packet[19]) = (from.0, to.0);
        packet[20..22].copy_from_slice(&from.1.to_be_bytes());
        packet[22..24].copy_from_slice(&to.1.to_be_bytes());
        packet
    }

    fn packet_v6(extensions: &[(u8, &[u8])], protocol: u8, ports: [u16; 2]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x60;
        (packet[23], packet[39]) = (1, 2);
        let numbers = extensions.iter().map(|(number, _)| *number).chain([protocol]).collect::<Vec<_>>();
        packet[6] = numbers[0];
        for (index, (_, bytes)) in extensions.iter().enumerate() {
            let start = packet.len();
            packet.extend_from_slice(bytes);
            packet[start] = numbers[index + 1];
        }
        ports.iter().for_each(|port| packet.extend_from_slice(&port.to_be_bytes()));
        packet
    }

    #[test]
    fn both_directions_are_one_connection() {
        let one = FlowKey::of(&packet_v4(6, (1, 100), (2, 200), 0));
        assert_eq!(one, FlowKey::of(&packet_v4(6, (2, 200), (1, 100), 0)));
        for other in [
            packet_v4(17, (1, 100), (2, 200), 0),
            packet_v4(6, (1, 200), (2, 100), 0),
            packet_v4(6, (1, 101), (2, 200), 0),
            packet_v4(6, (3, 100), (2, 200), 0),
        ] {
            assert_ne!(one, FlowKey::of(&other));
        }
    }

    #[test]
    fn packets_without_visible_ports_are_of_their_addresses() {
        let fragments = [0x2000, 0x0010].map(|fragment| FlowKey::of(&packet_v4(6, (1, 7), (2, 8), fragment)));
        assert_eq!(fragments[0], fragments[1]);
        assert_eq!(FlowKey::of(&packet_v4(1, (1, 7), (2, 8), 0)), FlowKey::of(&packet_v4(1, (1, 9), (2, 8), 0)));
    }

    #[test]
    fn extension_headers_are_skipped() {
        let plain = FlowKey::of(&packet_v6(&[], 17, [5, 6]));
        let options: (u8, &[u8]) = (0, &[0; 8]);
        let long: (u8, &[u8]) = (60, &[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let authentication: (u8, &[u8]) =
            (51, &[0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(plain, FlowKey::of(&packet_v6(&[options, long, authentication], 17, [5, 6])));
        assert_ne!(plain, FlowKey::of(&packet_v6(&[(44, &[0; 8])], 17, [5, 6])), "a fragment has no ports");
    }

    #[test]
    fn cut_and_foreign_packets_are_no_panic() {
        let whole = packet_v6(&[(0, &[0; 8]), (44, &[0; 8])], 6, [1, 2]);
        (0..whole.len()).for_each(|length| _ = FlowKey::of(&whole[..length]));
        let other = FlowKey::of(&[]);
        assert_eq!(other, FlowKey::of(&[0xff; 60]));
        assert_eq!(other, FlowKey::of(&[0x45, 0, 0]));
    }
}
