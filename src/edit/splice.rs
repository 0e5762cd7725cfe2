//! Changes the payload, and updates the length fields.

use std::ops::{Bound, Range, RangeBounds};

use etherparse::Ipv6Header;

use super::{
    Edit, invalid,
    layout::{Layout, Obstacle, Transport, Version},
    refused, too_long,
};
use crate::{types::Error, wire::MAX_PAYLOAD};

impl Edit {
    /// The transport payload, to change in place: the bytes after the header of TCP or UDP, or
    /// after the first 8 bytes of ICMP or ICMPv6.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if
    /// * the packet is a fragment;
    /// * an authentication header covers the packet;
    /// * the protocol is not TCP, UDP, ICMP or ICMPv6 (ESP, for example);
    /// * the transport header is malformed;
    /// * the packet has an IPv6 routing header with segments left that is malformed, or whose type
    ///   is not 0, 2 or 4.
    pub fn payload_mut(&mut self) -> Result<&mut [u8], Error> {
        let range = self.payload_range("edit the payload")?;
        Ok(&mut self.packet[range])
    }

    /// Replaces the whole transport payload. The new payload may have a different length.
    ///
    /// # Errors
    ///
    /// As [`splice_payload`](Self::splice_payload).
    pub fn replace_payload(&mut self, with: &[u8]) -> Result<(), Error> {
        self.splice_payload(.., with)
    }

    /// Replaces a range of the transport payload, in bytes from its beginning.
    ///
    /// `with` may have a different length than the range. The length fields in the headers are
    /// updated.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput)
    /// * for the same reasons as [`payload_mut`](Self::payload_mut);
    /// * if the range is not within the payload;
    /// * if the packet would be longer than 65 531 bytes;
    /// * if the length of a [super-packet](Self#super-packets) would change.
    #[doc(alias = "nfq_tcp_mangle_ipv4")]
    #[doc(alias = "nfq_tcp_mangle_ipv6")]
    #[doc(alias = "nfq_udp_mangle_ipv4")]
    #[doc(alias = "nfq_udp_mangle_ipv6")]
    pub fn splice_payload(&mut self, range: impl RangeBounds<usize>, with: &[u8]) -> Result<(), Error> {
        const OPERATION: &str = "splice the payload";
        let payload = self.payload_range(OPERATION)?;
        let range = within(OPERATION, payload, range)?;
        self.splice(OPERATION, range, with)
    }

    /// Replaces a range of the IP payload (transport header and transport payload), in bytes from
    /// its beginning.
    ///
    /// Use this for protocols and header fields that this type has no method for. Only the length
    /// in the IP header is updated. The caller must set the length in a UDP header.
    /// [`finish`](Self::finish) computes the checksum of TCP, UDP, ICMP and ICMPv6.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) if
    /// * the packet is a fragment;
    /// * an authentication header covers the packet;
    /// * the packet has an IPv6 routing header with segments left that is malformed, or whose type
    ///   is not 0, 2 or 4;
    /// * the range is not within the IP payload;
    /// * the packet would be longer than 65 531 bytes;
    /// * the length of a [super-packet](Self#super-packets) would change;
    /// * the header of TCP, UDP, ICMP or ICMPv6 would be malformed.
    ///
    /// The packet is then unchanged.
    #[doc(alias = "nfq_ip_mangle")]
    #[doc(alias = "nfq_ip6_mangle")]
    #[doc(alias = "pktb_mangle")]
    pub fn splice_ip_payload(&mut self, range: impl RangeBounds<usize>, with: &[u8]) -> Result<(), Error> {
        const OPERATION: &str = "splice the IP payload";
        if let Some(obstacle @ (Obstacle::Fragment | Obstacle::Authenticated | Obstacle::Routed)) = self.layout.obstacle
        {
            return Err(refused(OPERATION, obstacle));
        }
        let range = within(OPERATION, self.layout.at..self.layout.end, range)?;
        let end = self.end_after(OPERATION, &range, with)?;
        // Works on a copy, so that the packet stays unchanged if the result is malformed.
        let packet = [&self.packet[..range.start], with, &self.packet[range.end..]].concat();
        let mut new = Self { packet, layout: Layout { end, ..self.layout }, gso: self.gso };
        new.write_ip_len();
        new.layout = Layout::of(&new.packet).map_err(|detail| invalid(OPERATION, detail))?;
        if let Some(obstacle @ Obstacle::Malformed(_)) = new.layout.obstacle {
            return Err(refused(OPERATION, obstacle));
        }
        *self = new;
        Ok(())
    }

    fn payload_range(&self, operation: &'static str) -> Result<Range<usize>, Error> {
        self.layout.editable().map_err(|obstacle| refused(operation, obstacle))?;
        Ok(self.layout.payload().unwrap_or_default())
    }

    /// The length of the packet after `range` is replaced by `with`.
    fn end_after(&self, operation: &'static str, range: &Range<usize>, with: &[u8]) -> Result<usize, Error> {
        let end = self.layout.end - range.len() + with.len();
        if end > MAX_PAYLOAD {
            return Err(too_long(operation, end));
        }
        if self.gso && end != self.layout.end {
            return Err(invalid(operation, "a super-packet must keep its length; bind the queue with gso(false)"));
        }
        Ok(end)
    }

    /// `range` must lie within the transport payload.
    fn splice(&mut self, operation: &'static str, range: Range<usize>, with: &[u8]) -> Result<(), Error> {
        let end = self.end_after(operation, &range, with)?;
        let (old_end, new_range) = (self.layout.end, range.start..range.start + with.len());
        if end > old_end {
            self.packet.reserve_exact(end - old_end);
            self.packet.resize(end, 0);
        }
        if end != old_end {
            self.packet.copy_within(range.end..old_end, new_range.end);
            self.packet.truncate(end);
        }
        self.packet[new_range].copy_from_slice(with);

        let after_payload = old_end - self.layout.payload_end;
        self.layout.end = end;
        self.layout.payload_end = end - after_payload;
        self.write_ip_len();
        if self.layout.transport == Some(Transport::Udp) {
            let at = self.layout.at;
            self.write_u16(at + 4, self.layout.payload_end - at);
        }
        Ok(())
    }

    pub(super) fn write_ip_len(&mut self) {
        self.layout.stated_len = Some(self.layout.end);
        match self.layout.version {
            Version::V4 => self.write_u16(2, self.layout.end),
            Version::V6 => self.write_u16(4, self.layout.end - Ipv6Header::LEN),
        }
    }
}

/// Converts `range`, which counts from the beginning of `whole`, to a range of the packet.
fn within(operation: &'static str, whole: Range<usize>, range: impl RangeBounds<usize>) -> Result<Range<usize>, Error> {
    let start = match range.start_bound() {
        Bound::Included(&start) => Some(start),
        Bound::Excluded(&before) => before.checked_add(1),
        Bound::Unbounded => Some(0),
    };
    let end = match range.end_bound() {
        Bound::Included(&last) => last.checked_add(1),
        Bound::Excluded(&end) => Some(end),
        Bound::Unbounded => Some(whole.len()),
    };
    match (start, end) {
        (Some(start), Some(end)) if start <= end && end <= whole.len() => Ok(whole.start + start..whole.start + end),
        _ => Err(invalid(operation, format!("the range is not within the payload of {} bytes", whole.len()))),
    }
}
