//! Packets of every kind that can be edited, written by etherparse.

use etherparse::{
    IpFragOffset, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions, Ipv6FragmentHeader, Ipv6Header,
    Ipv6RawExtHeader, Ipv6RoutingExtensions, NetHeaders, PacketBuilder, PacketHeaders, TcpHeader, TransportHeader,
    checksum::Sum16BitWords, ip_number,
};
use proptest::prelude::*;

#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) ip: IpHeaders,
    pub(crate) transport: SampleTransport,
    pub(crate) payload: Vec<u8>,
}

#[derive(Debug, Clone)]
pub(crate) enum SampleTransport {
    Tcp(Box<TcpHeader>),
    Udp(u16, u16),
    /// ICMP over IPv4, ICMPv6 over IPv6.
    Icmp(u16, u16),
}

pub(crate) fn sample() -> impl Strategy<Value = Sample> {
    (ip(), transport(), prop::collection::vec(any::<u8>(), 0..80)).prop_map(|(ip, transport, payload)| Sample {
        ip,
        transport,
        payload,
    })
}

/// The simplest packet, for tests of a single property.
pub(crate) fn plain(v6: bool, transport: SampleTransport, payload: &[u8]) -> Sample {
    let ip = if v6 {
        let header = Ipv6Header { source: [1; 16], destination: [2; 16], hop_limit: 64, ..Default::default() };
        IpHeaders::Ipv6(header, Ipv6Extensions::default())
    } else {
        IpHeaders::Ipv4(
            Ipv4Header::new(0, 64, ip_number::UDP, [10, 0, 0, 1], [10, 0, 0, 2]).unwrap(),
            Ipv4Extensions::default(),
        )
    };
    Sample { ip, transport, payload: payload.to_vec() }
}

impl Sample {
    /// The packet as etherparse writes it, with its checksums.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let ip = PacketBuilder::ip(self.ip.clone());
        match &self.transport {
            SampleTransport::Tcp(header) => ip.tcp_header((**header).clone()).write(&mut bytes, &self.payload),
            SampleTransport::Udp(source, destination) => ip.udp(*source, *destination).write(&mut bytes, &self.payload),
            &SampleTransport::Icmp(id, seq) if self.is_ipv4() => {
                ip.icmpv4_echo_request(id, seq).write(&mut bytes, &self.payload)
            }
            &SampleTransport::Icmp(id, seq) => ip.icmpv6_echo_request(id, seq).write(&mut bytes, &self.payload),
        }
        .unwrap();
        bytes
    }

    pub(crate) fn is_ipv4(&self) -> bool {
        matches!(self.ip, IpHeaders::Ipv4(..))
    }

    pub(crate) fn protocol(&self) -> IpNumber {
        match self.transport {
            SampleTransport::Tcp(_) => ip_number::TCP,
            SampleTransport::Udp(..) => ip_number::UDP,
            SampleTransport::Icmp(..) if self.is_ipv4() => ip_number::ICMP,
            SampleTransport::Icmp(..) => ip_number::IPV6_ICMP,
        }
    }

    /// The offset of the transport checksum in the packet.
    pub(crate) fn checksum_at(&self) -> usize {
        self.ip.header_len()
            + match self.transport {
                SampleTransport::Tcp(_) => 16,
                SampleTransport::Udp(..) => 6,
                SampleTransport::Icmp(..) => 2,
            }
    }

    /// The sum of the pseudo header.
    pub(crate) fn partial_checksum(&self) -> [u8; 2] {
        let length = self.bytes().len() - self.ip.header_len();
        let mut words = vec![0, self.protocol().0];
        words.extend_from_slice(&(length as u32).to_be_bytes());
        match &self.ip {
            IpHeaders::Ipv4(header, _) => words.extend([header.source, header.destination].concat()),
            IpHeaders::Ipv6(header, _) => words.extend([header.source, header.destination].concat()),
        }
        (!Sum16BitWords::new().add_slice(&words).ones_complement()).to_ne_bytes()
    }

    /// Overwrites the checksums of IP and transport header. A UDP checksum does not become 0,
    /// because 0 means that there is none.
    pub(crate) fn spoil_checksums(&self, packet: &mut [u8], with: [u8; 4]) {
        let at = self.checksum_at();
        packet[at..at + 2].copy_from_slice(&with[..2]);
        if with[..2] == [0, 0] {
            packet[at] = 1;
        }
        if self.is_ipv4() {
            packet[10..12].copy_from_slice(&with[2..]);
        }
    }
}

/// Asserts that the checksums of a packet are correct.
#[track_caller]
pub(crate) fn assert_checksums(packet: &[u8]) {
    let headers = PacketHeaders::from_ip_slice(packet).unwrap();
    let payload = headers.payload.slice();
    match (headers.net.unwrap(), headers.transport.unwrap()) {
        (NetHeaders::Ipv4(ip, _), transport) => {
            assert_eq!(ip.header_checksum, ip.calc_header_checksum());
            match transport {
                TransportHeader::Tcp(tcp) => assert_eq!(tcp.checksum, tcp.calc_checksum_ipv4(&ip, payload).unwrap()),
                TransportHeader::Udp(udp) => assert_eq!(udp.checksum, udp.calc_checksum_ipv4(&ip, payload).unwrap()),
                TransportHeader::Icmpv4(icmp) => assert_eq!(icmp.checksum, icmp.icmp_type.calc_checksum(payload)),
                other => panic!("{other:?}"),
            }
        }
        (NetHeaders::Ipv6(ip, _), transport) => match transport {
            TransportHeader::Tcp(tcp) => assert_eq!(tcp.checksum, tcp.calc_checksum_ipv6(&ip, payload).unwrap()),
            TransportHeader::Udp(udp) => assert_eq!(udp.checksum, udp.calc_checksum_ipv6(&ip, payload).unwrap()),
            TransportHeader::Icmpv6(icmp) => {
                let expected = icmp.icmp_type.calc_checksum(ip.source, ip.destination, payload).unwrap();
                assert_eq!(icmp.checksum, expected);
            }
            other => panic!("{other:?}"),
        },
        (other, _) => panic!("{other:?}"),
    }
}

fn ip() -> impl Strategy<Value = IpHeaders> {
    let v4 = (any::<[u8; 12]>(), 0..=10_usize).prop_map(|(fields, options)| {
        let mut header = Ipv4Header {
            identification: u16::from_be_bytes([fields[0], fields[1]]),
            dont_fragment: fields[2] & 1 == 1,
            time_to_live: fields[3],
            source: [fields[4], fields[5], fields[6], fields[7]],
            destination: [fields[8], fields[9], fields[10], fields[11]],
            ..Default::default()
        };
        header.options = [1; 40][..options * 4].try_into().unwrap();
        IpHeaders::Ipv4(header, Ipv4Extensions::default())
    });
    let v6 = (any::<[u8; 16]>(), any::<[u8; 16]>(), any::<[u8; 4]>(), extensions()).prop_map(
        |(source, destination, fields, extensions)| {
            let header = Ipv6Header {
                traffic_class: fields[0],
                flow_label: etherparse::Ipv6FlowLabel::try_new(u32::from_be_bytes([0, 7, fields[1], fields[2]]))
                    .unwrap(),
                hop_limit: fields[3],
                source,
                destination,
                ..Default::default()
            };
            IpHeaders::Ipv6(header, extensions)
        },
    );
    prop_oneof![v4, v6]
}

/// Extension headers that allow all edits, with a completed routing header and a fragment header
/// before an unfragmented datagram.
fn extensions() -> impl Strategy<Value = Ipv6Extensions> {
    let raw = |payload: &[u8]| Ipv6RawExtHeader::new_raw(ip_number::UDP, payload).unwrap();
    any::<[bool; 4]>().prop_map(move |[hop_by_hop, destination, routing, fragment]| Ipv6Extensions {
        hop_by_hop_options: hop_by_hop.then(|| raw(&[1, 4, 0, 0, 0, 0])),
        destination_options: destination.then(|| raw(&[1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
        routing: routing.then(|| Ipv6RoutingExtensions {
            routing: raw(&[&[4, 0][..], &[0; 20]].concat()),
            final_destination_options: None,
        }),
        fragment: fragment.then(|| Ipv6FragmentHeader::new(ip_number::UDP, IpFragOffset::ZERO, false, 77)),
        auth: None,
    })
}

fn transport() -> impl Strategy<Value = SampleTransport> {
    let tcp = (any::<[u16; 6]>(), any::<u8>(), 0..=10_usize).prop_map(|(fields, flags, options)| {
        let mut header = TcpHeader::new(fields[0], fields[1], u32::from(fields[2]) << 7, fields[3]);
        header.acknowledgment_number = u32::from(fields[4]) << 9;
        header.urgent_pointer = fields[5];
        [header.syn, header.ack, header.psh, header.fin] = [0, 1, 2, 3].map(|bit| flags >> bit & 1 == 1);
        [header.rst, header.urg, header.ece, header.cwr] = [4, 5, 6, 7].map(|bit| flags >> bit & 1 == 1);
        header.set_options_raw(&[1; 40][..options * 4]).unwrap();
        SampleTransport::Tcp(Box::new(header))
    });
    prop_oneof![
        tcp,
        any::<(u16, u16)>().prop_map(|(source, destination)| SampleTransport::Udp(source, destination)),
        any::<(u16, u16)>().prop_map(|(id, sequence)| SampleTransport::Icmp(id, sequence)),
    ]
}
