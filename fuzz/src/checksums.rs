//! Lengths and checksums of a packet by an implementation of their own, after the RFCs: it shares
//! no code with `edit`, and no crate.

/// What is behind the IP header and its extension headers.
#[derive(Debug)]
struct Walk {
    protocol: u8,
    at: usize,
    /// Where the final destination may be: first in the IP header, then in routes.
    destinations: Vec<usize>,
    /// A fragment, or a packet with an authentication header: the checksum cannot be checked.
    opaque: bool,
}

/// Whether the packet's lengths and checksums are right, as far as they can be checked.
///
/// # Errors
/// What is wrong.
pub(super) fn check(packet: &[u8]) -> Result<(), String> {
    let v4 = packet[0] >> 4 == 4;
    let stated = if v4 { word(packet, 2) } else { 40 + word(packet, 4) };
    if stated != packet.len() {
        return Err(format!("the IP header states {stated} bytes of {}", packet.len()));
    }
    let walk = if v4 { walk_v4(packet) } else { walk_v6(packet) };
    if v4 && sum(&[&packet[..header_v4(packet)]]) != 0xffff {
        return Err("the checksum of the IPv4 header is wrong".to_owned());
    }
    let Some(walk) = walk.filter(|walk| !walk.opaque) else { return Ok(()) };
    let body = &packet[walk.at..];
    let (covered, pseudo) = match walk.protocol {
        // RFC 9293, section 3.1
        6 if body.len() >= 20 && (20..=body.len()).contains(&(usize::from(body[12] >> 4) * 4)) => (body, true),
        // RFC 768
        17 if body.len() >= 8 && (8..=body.len()).contains(&word(body, 4)) => {
            if v4 && word(body, 6) == 0 {
                return Ok(());
            }
            (&body[..word(body, 4)], true)
        }
        // RFC 792; RFC 4443, section 2.3
        1 if v4 && body.len() >= 8 => (body, false),
        58 if !v4 && body.len() >= 8 => (body, true),
        _ => return Ok(()),
    };
    let length = (covered.len() as u32).to_be_bytes();
    let size = if v4 { 4 } else { 16 };
    let source = if v4 { 12 } else { 8 };
    let matches = |destination: usize| {
        let addresses = [&packet[source..source + size], &packet[destination..destination + size]];
        let all = [addresses[0], addresses[1], &[0, walk.protocol], &length, covered];
        sum(if pseudo { &all } else { &all[4..] }) == 0xffff
    };
    if walk.destinations.iter().any(|at| matches(*at)) {
        Ok(())
    } else {
        Err(format!("the checksum of protocol {} is wrong", walk.protocol))
    }
}

/// RFC 1071, section 1. Only the last part may have an odd length.
fn sum(parts: &[&[u8]]) -> u32 {
    let mut sum = 0_u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u32
}

fn word(bytes: &[u8], at: usize) -> usize {
    usize::from(bytes[at]) << 8 | usize::from(bytes[at + 1])
}

fn header_v4(packet: &[u8]) -> usize {
    usize::from(packet[0] & 15) * 4
}

fn walk_v4(packet: &[u8]) -> Option<Walk> {
    let at = header_v4(packet);
    let mut destinations = vec![16];
    // RFC 791, section 3.1: the last address of a source route.
    let mut option = 20;
    while option < at && packet[option] != 0 {
        if packet[option] == 1 {
            option += 1;
            continue;
        }
        let length = usize::from(*packet[..at].get(option + 1)?);
        if length < 2 || option + length > at {
            break;
        }
        if matches!(packet[option], 131 | 137) && length >= 7 {
            destinations.push(option + length - 4);
        }
        option += length;
    }
    let fragment = word(packet, 6) & 0x3fff != 0;
    // An authentication header.
    let opaque = fragment || packet[9] == 51;
    Some(Walk { protocol: packet[9], at, destinations, opaque })
}

fn walk_v6(packet: &[u8]) -> Option<Walk> {
    let mut walk = Walk { protocol: packet[6], at: 40, destinations: vec![24], opaque: false };
    loop {
        let header = packet.get(walk.at..walk.at + 8);
        let length = match walk.protocol {
            0 | 43 | 60 => 8 + usize::from(header?[1]) * 8,
            44 => 8,
            51 => {
                walk.opaque = true;
                (usize::from(header?[1]) + 2) * 4
            }
            _ => return Some(walk),
        };
        let header = packet.get(walk.at..walk.at + length)?;
        match walk.protocol {
            44 => walk.opaque |= word(header, 2) & 0xfff9 != 0,
            // With segments left: RFC 2460, section 4.4; RFC 6275, section 6.4; RFC 8754,
            // section 2.
            43 if header[3] != 0 => {
                let (left, last) = (usize::from(header[3]), usize::from(header[4]));
                let (addresses, odd) = ((length - 8) / 16, (length - 8) % 16 != 0);
                match header[2] {
                    0 if !odd && left <= addresses => walk.destinations.push(walk.at + length - 16),
                    2 if length == 24 && left == 1 => walk.destinations.push(walk.at + 8),
                    4 if last < addresses && left <= last + 1 => walk.destinations.push(walk.at + 8),
                    _ => walk.opaque = true,
                }
            }
            _ => {}
        }
        walk.protocol = header[0];
        walk.at += length;
    }
}
