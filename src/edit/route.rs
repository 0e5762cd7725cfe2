//! The final destination of a packet that carries a route.
//!
//! Until the route is used up, the destination in the IP header is the next hop. The transport
//! checksum covers the final destination, so it stays the same from hop to hop.

// RFC 791, section 3.1.
const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const LOOSE_SOURCE_ROUTE: u8 = 131;
const STRICT_SOURCE_ROUTE: u8 = 137;
/// The smallest pointer, to the first address: kind, length and pointer come before it.
const FIRST_ADDRESS: u8 = 4;

// RFC 2460, section 4.4; RFC 6275, section 6.4; RFC 8754, section 2.
const SOURCE_ROUTE: u8 = 0;
const HOME_ADDRESS: u8 = 2;
const SEGMENT_ROUTE: u8 = 4;
/// What precedes the addresses in a routing header of these types, in bytes.
const BEFORE_ADDRESSES: usize = 8;
const IPV6_ADDRESS: usize = 16;

/// Where the final destination is in the options of an IPv4 header.
///
/// `None` if it is in the header itself: there is no source route, the route is used up (RFC 1122,
/// section 3.2.1.8), or the options are malformed.
///
/// The kernel writes the final destination there when it sends (`__ip_options_build`), and covers
/// it with TCP's checksum (`tcp_v4_send_check`). When it receives, it reads the next hop at the
/// pointer (`ip_options_rcv_srr`).
pub(super) fn in_options(options: &[u8]) -> Option<usize> {
    let mut route = None;
    let mut at = 0;
    loop {
        let (kind, length) = match options[at..] {
            [] | [END, ..] => break,
            [NO_OPERATION, ..] => (NO_OPERATION, 1),
            [kind, length, ..] if length >= 2 => (kind, length.into()),
            _ => return None,
        };
        let option = options.get(at..at + length)?;
        at += length;
        // A second source route is malformed (`__ip_options_compile`).
        if matches!(kind, LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE) && route.replace((option, at)).is_some() {
            return None;
        }
    }
    let (option, end) = route?;
    // The pointer counts the option's bytes from 1. What it has passed is the way behind.
    let pointer = *option.get(2).filter(|&&pointer| pointer >= FIRST_ADDRESS)?;
    let ahead = (option.len() + 1).checked_sub(pointer.into())?;
    (ahead > 0 && ahead % 4 == 0).then(|| end - 4)
}

/// Where the final destination is in an IPv6 routing header that has segments left. `None` if the
/// header's type is unknown or the header is malformed (RFC 8200, section 8.1).
pub(super) fn in_routing_header(header: &[u8]) -> Option<usize> {
    let &[_, _, kind, segments_left, last_entry, ..] = header else { return None };
    let (segments_left, last_entry) = (usize::from(segments_left), usize::from(last_entry));
    let list = header.len().checked_sub(BEFORE_ADDRESSES)?;
    let (addresses, behind) = (list / IPV6_ADDRESS, list % IPV6_ADDRESS);
    match kind {
        SOURCE_ROUTE if behind == 0 && (1..=addresses).contains(&segments_left) => Some(header.len() - IPV6_ADDRESS),
        HOME_ADDRESS if (segments_left, list) == (1, IPV6_ADDRESS) => Some(BEFORE_ADDRESSES),
        // The list begins with the final destination and may lack the first hop. Other things may
        // follow it (`seg6_validate_srh`).
        SEGMENT_ROUTE if last_entry < addresses && segments_left <= last_entry + 1 => Some(BEFORE_ADDRESSES),
        _ => None,
    }
}
