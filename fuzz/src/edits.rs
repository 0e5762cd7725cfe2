//! Edits of any packet, in any order.

use std::net::IpAddr;

use super::{checksums, input::Input};
use tokio_nfqueue::{
    Error,
    edit::{Edit, PacketView, Unreachable, complete_checksums},
};

/// More edits take long and find no more.
const MOST_EDITS: usize = 24;
const REASONS: [Unreachable; 4] =
    [Unreachable::Network, Unreachable::Host, Unreachable::Port, Unreachable::AdministrativelyProhibited];

/// Takes the bytes for a packet and for edits of it.
pub fn edits(data: &[u8]) {
    let mut input = Input::new(data);
    let packet = input.bytes();
    if let Ok(packet) = PacketView::new(packet) {
        view(&packet);
    }
    let mut completed = packet.to_vec();
    match complete_checksums(&mut completed) {
        Ok(()) => {
            // What is behind the packet is not part of it.
            let length = PacketView::new(&completed).map(|view| whole(&view).len()).expect("it was a packet before");
            checked(&completed[..length]);
        }
        Err(_) => assert_eq!(completed, packet, "an error has changed the packet"),
    }
    let Ok(mut edit) = Edit::new(packet) else { return };
    for _ in 0..MOST_EDITS {
        if input.is_empty() {
            break;
        }
        let before = whole(&edit.view());
        if step(&mut edit, &mut input).is_err() {
            assert_eq!(whole(&edit.view()), before, "an error has changed the packet");
        }
        view(&edit.view());
    }
    let finished = edit.finish();
    checked(&finished);
    // Nothing is left to do.
    let again = Edit::new(&finished).expect("a finished packet is one");
    assert_eq!(again.finish(), finished);
}

fn checked(packet: &[u8]) {
    assert!(packet.len() <= 65_531);
    if let Err(wrong) = checksums::check(packet) {
        panic!("{wrong}: {packet:02x?}");
    }
}

/// The bytes of the packet.
fn whole(view: &PacketView<'_>) -> Vec<u8> {
    [view.ip_header(), view.ip_payload()].concat()
}

/// Reads everything that a view has.
pub(super) fn view(view: &PacketView<'_>) {
    let whole = view.ip_header().len() + view.ip_payload().len();
    let header = view.transport_header().map_or(0, <[u8]>::len);
    assert!(header + view.payload().map_or(0, <[u8]>::len) <= whole);
    assert_eq!(view.is_ipv4(), view.source_address().is_ipv4());
    let _ = (view.source_port(), view.destination_port());
    let _ = (view.ttl(), view.tos(), view.destination_address(), view.protocol(), view.is_fragment(), view.icmp());
    assert!(!view.is_tcp() || !view.is_udp());
    assert!(view.tcp().is_none() || view.is_tcp());
    assert!(!view.to_string().is_empty());
}

/// One edit. What it promises of the fields is checked at once, the checksums at the end.
fn step(edit: &mut Edit, input: &mut Input<'_>) -> Result<(), Error> {
    match input.byte() % 14 {
        0 => {
            let ttl = input.byte();
            edit.set_ttl(ttl);
            assert_eq!(edit.view().ttl(), ttl);
        }
        1 => {
            let (tos, ttl) = (input.byte(), edit.view().ttl());
            edit.set_tos(tos);
            assert_eq!((edit.view().tos(), edit.view().ttl()), (tos, ttl));
        }
        2 => {
            let address = address(input);
            edit.set_source_address(address)?;
            assert_eq!(edit.view().source_address(), address);
        }
        3 => {
            let address = address(input);
            edit.set_destination_address(address)?;
            assert_eq!(edit.view().destination_address(), address);
        }
        4 => {
            let port = input.short();
            edit.set_source_port(port)?;
            assert_eq!(edit.view().source_port(), Some(port));
        }
        5 => {
            let port = input.short();
            edit.set_destination_port(port)?;
            assert_eq!(edit.view().destination_port(), Some(port));
        }
        6 => {
            let (at, value) = (usize::from(input.short()), input.byte());
            let payload = edit.payload_mut()?;
            if let Some(byte) = payload.get_mut(at) {
                *byte = value;
                assert_eq!(edit.view().payload().map(|payload| payload[at]), Some(value));
            }
        }
        7 => {
            let with = input.bytes();
            edit.replace_payload(with)?;
            assert_eq!(edit.view().payload(), Some(with));
        }
        // Long ones.
        8 => {
            let with = vec![input.byte(); input.short().into()];
            edit.replace_payload(&with)?;
            assert_eq!(edit.view().payload(), Some(&with[..]));
        }
        9 => splice(edit, input)?,
        10 => {
            let (start, length) = (usize::from(input.byte()), usize::from(input.byte()));
            let mut wanted = edit.view().ip_payload().to_vec();
            let with = input.bytes();
            edit.splice_ip_payload(start..start + length, with)?;
            wanted.splice(start..start + length, with.iter().copied());
            // A malformed extension header may have become a whole one, which is not IP payload.
            assert!(whole(&edit.view()).ends_with(&wanted));
        }
        11 => turn_around(edit)?,
        12 => reset(edit)?,
        _ => unreachable(edit, REASONS[usize::from(input.byte()) % REASONS.len()])?,
    }
    Ok(())
}

fn address(input: &mut Input<'_>) -> IpAddr {
    if input.flag() { input.array::<16>().into() } else { input.array::<4>().into() }
}

fn splice(edit: &mut Edit, input: &mut Input<'_>) -> Result<(), Error> {
    let (start, length, with) = (usize::from(input.byte()), usize::from(input.byte()), input.bytes());
    let mut wanted = edit.view().payload().unwrap_or_default().to_vec();
    edit.splice_payload(start..start + length, with)?;
    wanted.splice(start..start + length, with.iter().copied());
    assert_eq!(edit.view().payload(), Some(&wanted[..]));
    Ok(())
}

fn turn_around(edit: &mut Edit) -> Result<(), Error> {
    let old = whole(&edit.view());
    edit.turn_around()?;
    let (old, new) = (PacketView::new(&old)?, edit.view());
    assert_eq!(
        (new.source_address(), new.destination_address(), new.ttl()),
        (old.destination_address(), old.source_address(), 64)
    );
    assert_eq!((new.source_port(), new.destination_port()), (old.destination_port(), old.source_port()));
    assert_eq!(new.payload(), old.payload());
    Ok(())
}

/// RFC 9293, section 3.10.7.1.
fn reset(edit: &mut Edit) -> Result<(), Error> {
    let old = whole(&edit.view());
    edit.tcp_reset()?;
    let (old, new) = (PacketView::new(&old)?, edit.view());
    assert_eq!((new.source_address(), new.destination_address()), (old.destination_address(), old.source_address()));
    assert_eq!((new.source_port(), new.destination_port()), (old.destination_port(), old.source_port()));
    assert_eq!((new.payload(), new.transport_header().map(<[u8]>::len)), (Some(&[][..]), Some(20)));
    let (Some(from), Some(to)) = (old.tcp(), new.tcp()) else { panic!("a reset of no TCP packet") };
    assert!(to.rst && !from.rst && !to.syn && !to.fin);
    if from.ack {
        assert_eq!((to.sequence_number, to.ack), (from.acknowledgment_number, false));
    } else {
        let length = old.payload().map_or(0, <[u8]>::len) as u32 + u32::from(from.syn) + u32::from(from.fin);
        let acknowledged = from.sequence_number.wrapping_add(length);
        assert_eq!((to.sequence_number, to.ack, to.acknowledgment_number), (0, true, acknowledged));
    }
    Ok(())
}

/// RFC 1812, section 4.3.2; RFC 4443, sections 2.4 and 3.1.
fn unreachable(edit: &mut Edit, reason: Unreachable) -> Result<(), Error> {
    let old = whole(&edit.view());
    edit.icmp_unreachable(reason)?;
    let packet = whole(&edit.view());
    let (before, new) = (PacketView::new(&old)?, edit.view());
    assert_eq!(
        (new.source_address(), new.destination_address()),
        (before.destination_address(), before.source_address())
    );
    let (header, most, kind) = if new.is_ipv4() { (28, 576, 3) } else { (48, 1280, 1) };
    assert_eq!(packet[header..], old[..(most - header).min(old.len())], "what is quoted");
    assert_eq!(new.icmp().map(|(kind, _)| kind), Some(kind));
    Ok(())
}
