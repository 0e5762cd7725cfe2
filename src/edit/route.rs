//! Finds the final destination of a packet with a source route or a routing header.
//!
//! Until the route is completed, the destination in the IP header is the next hop. The transport
//! checksum covers the final destination, so it stays the same at every hop.

/// The offset of the final destination in the options of an IPv4 header.
///
/// `None` if the final destination is in the header itself, that is if there is no source route, if
/// the route is completed (RFC 1122, section 3.2.1.8), or if the options are malformed.
///
/// When the kernel sends, it writes the final destination there (`__ip_options_build`) and includes
/// it in the TCP checksum (`tcp_v4_send_check`). When it receives, it reads the next hop at the
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
    // The pointer counts the bytes of the option from 1. The addresses before it are already
    // visited.
    let pointer = *option.get(2).filter(|&&pointer| pointer >= FIRST_ADDRESS)?;
    let remaining = (option.len() + 1).checked_sub(pointer.into())?;
    (remaining > 0 && remaining % 4 == 0).then(|| end - 4)
}

/// The offset of the final destination in an IPv6 routing header with segments left.
///
/// `None` if the type of the header is unknown, or if the header is malformed (RFC 8200, section
/// 8.1).
pub(super) fn in_routing_header(header: &[u8]) -> Option<usize> {
    let &[_, _, kind, segments_left, last_entry, ..] = header else { return None };
    let (segments_left, last_entry) = (usize::from(segments_left), usize::from(last_entry));
    let list = header.len().checked_sub(BEFORE_ADDRESSES)?;
    let (addresses, remainder) = (list / IPV6_ADDRESS, list % IPV6_ADDRESS);
    match kind {
        SOURCE_ROUTE if remainder == 0 && (1..=addresses).contains(&segments_left) => Some(header.len() - IPV6_ADDRESS),
        HOME_ADDRESS if (segments_left, list) == (1, IPV6_ADDRESS) => Some(BEFORE_ADDRESSES),
        // The list begins with the final destination and may omit the first hop. TLVs may follow
        // the list (`seg6_validate_srh`).
        SEGMENT_ROUTE if last_entry < addresses && segments_left <= last_entry + 1 => Some(BEFORE_ADDRESSES),
        _ => None,
    }
}

// RFC 791, section 3.1.
const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const LOOSE_SOURCE_ROUTE: u8 = 131;
const STRICT_SOURCE_ROUTE: u8 = 137;
/// The smallest pointer. It points to the first address, which follows kind, length and pointer.
const FIRST_ADDRESS: u8 = 4;

// RFC 2460, section 4.4; RFC 6275, section 6.4; RFC 8754, section 2.
const SOURCE_ROUTE: u8 = 0;
const HOME_ADDRESS: u8 = 2;
const SEGMENT_ROUTE: u8 = 4;
/// The number of bytes before the addresses in a routing header of these types.
const BEFORE_ADDRESSES: usize = 8;
const IPV6_ADDRESS: usize = 16;
