//! Named sets, changed while rules match them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use nfqueue_divert::Divert;
use tokio_nfqueue::{
    ErrorKind, Protocol, Rule,
    divert::{Match, NamedSet, PacketField, SetElement, SetField},
};

use super::{counts, datagram, out, port, receiver, udp_out};
use crate::support::{udp, wait_until};

tests![
    sync addresses_of_both_versions,
    sync ports_and_protocols,
    sync tuples,
    sync elements_are_listed_removed_and_cleared,
    sync elements_expire,
    sync time_out_begins_anew,
    sync many_elements_in_one_transaction,
    sync many_elements_are_removed_in_one_transaction,
    sync full_set_takes_no_element,
    sync elements_survive_a_replacement_of_the_rules,
    sync bad_input_is_refused,
];

const HOUR: Option<Duration> = Some(Duration::from_secs(3600));

fn table(set: NamedSet, rules: impl IntoIterator<Item = Rule>) -> Divert {
    Divert::builder().set(set).rules(rules).install().unwrap()
}

/// Counts the packets that are in a set, and those that are not.
fn both(rule: Rule, condition: Match) -> [Rule; 2] {
    [rule.clone().when(condition.clone()).count(), rule.unless(condition).count()]
}

fn addresses_of_both_versions() {
    let loopbacks = [IpAddr::V4(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    for (address, field) in loopbacks.into_iter().zip([SetField::Ipv4Address, SetField::Ipv6Address]) {
        let to = loopbacks.map(receiver);
        let send = || loopbacks.into_iter().zip(&to).for_each(|(address, to)| datagram(address, to));
        for packet_field in [PacketField::SourceAddress, PacketField::DestinationAddress] {
            let divert =
                table(NamedSet::new("hosts", [field]), both(udp_out(), Match::in_set("hosts", [packet_field])));
            send();
            // The negated condition requires the IP version.
            assert_eq!(counts(&divert), [0, 1]);
            divert.set("hosts").insert(address, None).unwrap();
            send();
            assert_eq!(counts(&divert), [1, 1]);
            assert!(divert.set("hosts").remove(address).unwrap());
            assert!(!divert.set("hosts").remove(address).unwrap());
            send();
            assert_eq!(counts(&divert), [1, 2]);
        }
    }
}

fn ports_and_protocols() {
    let to = [7, 8].map(|port| udp((Ipv4Addr::LOCALHOST, port)));
    let condition = Match::in_set("ports", [PacketField::DestinationPort]);
    let divert = table(NamedSet::new("ports", [SetField::Port]), both(udp_out(), condition));
    divert.set("ports").insert(8, None).unwrap();
    to.iter().for_each(|to| datagram(Ipv4Addr::LOCALHOST, to));
    assert_eq!(counts(&divert), [1, 1]);
    divert.close().unwrap();

    let condition = Match::in_set("protocols", [PacketField::Protocol]);
    let divert = table(NamedSet::new("protocols", [SetField::Protocol]), both(out(), condition));
    datagram(Ipv4Addr::LOCALHOST, &to[0]);
    divert.set("protocols").insert(Protocol::Udp, None).unwrap();
    datagram(Ipv4Addr::LOCALHOST, &to[0]);
    assert_eq!(counts(&divert), [1, 1]);
}

fn tuples() {
    let fields = [SetField::Protocol, SetField::Ipv6Address, SetField::Port, SetField::Port];
    let condition = Match::in_set(
        "flows",
        [PacketField::Protocol, PacketField::DestinationAddress, PacketField::SourcePort, PacketField::DestinationPort],
    );
    let [from, to, other] = [(); 3].map(|()| receiver(Ipv6Addr::LOCALHOST));
    let divert = table(NamedSet::new("flows", fields), both(udp_out(), condition));
    let element = (Protocol::Udp, Ipv6Addr::LOCALHOST, port(&from), port(&to));
    divert.set("flows").insert(element, HOUR).unwrap();
    from.send_to(b"x", to.local_addr().unwrap()).unwrap();
    from.send_to(b"x", other.local_addr().unwrap()).unwrap();
    other.send_to(b"x", to.local_addr().unwrap()).unwrap();
    assert_eq!(counts(&divert), [1, 2]);
    assert_eq!(divert.set("flows").elements().unwrap()[0].0, SetElement::from(element));
    divert.close().unwrap();

    let rule = Rule::new(tokio_nfqueue::Hook::Input).when(Match::protocols([Protocol::Udp, Protocol::Tcp]));
    let condition = Match::in_set("services", [PacketField::DestinationAddress, PacketField::DestinationPort]);
    let divert = table(NamedSet::new("services", [SetField::Ipv6Address, SetField::Port]), both(rule, condition));
    divert.set("services").insert(to.local_addr().unwrap(), None).unwrap();
    datagram(Ipv6Addr::LOCALHOST, &to);
    datagram(Ipv6Addr::LOCALHOST, &other);
    wait_until("both are counted", || counts(&divert) == [1, 1]);
}

fn elements_are_listed_removed_and_cleared() {
    let divert = table(NamedSet::new("hosts", [SetField::Ipv4Address]), []);
    let set = divert.set("hosts");
    assert!(set.is_empty().unwrap());
    let address = |number| Ipv4Addr::new(10, 0, 0, number);
    set.insert_all([1, 2, 3, 2].map(address), HOUR).unwrap();
    set.insert(address(4), None).unwrap();
    let mut elements = set.elements().unwrap();
    elements.sort();
    let expected: Vec<SetElement> = [1, 2, 3, 4].map(|number| address(number).into()).to_vec();
    assert_eq!(elements.iter().map(|(element, _)| element.clone()).collect::<Vec<_>>(), expected);
    let expires = elements[0].1.expect("a time-out");
    assert!(expires <= Duration::from_secs(3600) && expires > Duration::from_secs(3500), "{expires:?}");
    assert_eq!(elements[3].1, None);
    assert_eq!(set.len().unwrap(), 4);
    set.clear().unwrap();
    assert!(set.is_empty().unwrap());
    set.clear().unwrap();
    set.insert_all::<Ipv4Addr>([], None).unwrap();
}

fn elements_expire() {
    let set = NamedSet::new("hosts", [SetField::Ipv4Address]).timeout(Duration::from_millis(200));
    let divert = table(set, []);
    let set = divert.set("hosts");
    set.insert(Ipv4Addr::new(10, 0, 0, 1), None).unwrap();
    set.insert(Ipv4Addr::new(10, 0, 0, 2), HOUR).unwrap();
    wait_until("one has expired", || set.len().unwrap() == 1);
    assert_eq!(set.elements().unwrap()[0].0, Ipv4Addr::new(10, 0, 0, 2).into());
    // An expired element can be inserted again before the kernel has collected it.
    set.insert(Ipv4Addr::new(10, 0, 0, 1), HOUR).unwrap();
    assert_eq!(set.len().unwrap(), 2);
}

fn time_out_begins_anew() {
    let divert = table(NamedSet::new("hosts", [SetField::Ipv4Address]).capacity(3), []);
    let set = divert.set("hosts");
    let addresses = [1, 2, 3].map(|number| Ipv4Addr::new(10, 0, 0, number));
    set.insert_all(addresses, Duration::from_secs(60)).unwrap();
    // Also if the set is full.
    set.insert_all(addresses[..2].iter().copied(), HOUR).unwrap();
    let mut elements = set.elements().unwrap();
    elements.sort();
    let long = |index: usize| elements[index].1.unwrap() > Duration::from_secs(3000);
    assert_eq!([long(0), long(1), long(2)], [true, true, false]);
}

fn many_elements_in_one_transaction() {
    let divert = table(
        NamedSet::new("hosts", [SetField::Ipv4Address]),
        both(udp_out(), Match::in_set("hosts", [PacketField::DestinationAddress])),
    );
    let set = divert.set("hosts");
    let addresses = (0..5000_u32).map(|number| Ipv4Addr::from(0x7f00_0001 + number));
    set.insert_all(addresses, HOUR).unwrap();
    assert_eq!(set.len().unwrap(), 5000);
    for last in [1, 200] {
        let to = receiver(Ipv4Addr::new(127, 0, 0, last));
        datagram(Ipv4Addr::LOCALHOST, &to);
    }
    assert_eq!(counts(&divert), [2, 0]);
}

fn many_elements_are_removed_in_one_transaction() {
    let set = NamedSet::new("ports", [SetField::Port]).capacity(2000);
    let divert = table(set, [out().count()]);
    let ports = divert.set("ports");
    ports.insert_all(0..2000_u16, None).unwrap();
    ports.remove_all(0..1000_u16).unwrap();
    assert_eq!(ports.len().unwrap(), 1000);
    // Some are in the set.
    ports.remove_all(500..1500_u16).unwrap();
    assert_eq!(ports.len().unwrap(), 500);
    // The set has no room for those that are not.
    ports.remove_all(1400..4000_u16).unwrap();
    assert!(ports.is_empty().unwrap());
    ports.remove_all([1_u16, 1]).unwrap();
    ports.remove_all([] as [u16; 0]).unwrap();
    assert!(ports.remove_all([Ipv4Addr::LOCALHOST]).is_err());
}

fn full_set_takes_no_element() {
    let divert = table(NamedSet::new("hosts", [SetField::Ipv4Address]).capacity(2), []);
    let set = divert.set("hosts");
    let address = |number| Ipv4Addr::new(10, 0, 0, number);
    let error = set.insert_all([1, 2, 3].map(address), None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    let text = error.to_string();
    assert!(text.contains("set hosts") && text.contains("the set is full"), "{text}");
    assert!(set.is_empty().unwrap(), "none of them is inserted");
    set.insert_all([1, 2].map(address), None).unwrap();
    assert!(set.insert(address(3), None).is_err());
    assert!(set.remove(address(1)).unwrap());
    set.insert(address(3), None).unwrap();
}

fn elements_survive_a_replacement_of_the_rules() {
    let condition = || Match::in_set("hosts", [PacketField::DestinationAddress]);
    let divert = table(NamedSet::new("hosts", [SetField::Ipv4Address]), [udp_out().when(condition()).count()]);
    divert.set("hosts").insert(Ipv4Addr::LOCALHOST, HOUR).unwrap();
    divert.replace_rules([udp_out().count()]).unwrap();
    divert.replace_rules([udp_out().count(), udp_out().when(condition()).count()]).unwrap();
    datagram(Ipv4Addr::LOCALHOST, &receiver(Ipv4Addr::LOCALHOST));
    assert_eq!(counts(&divert), [1, 1]);
}

fn bad_input_is_refused() {
    let divert = table(NamedSet::new("hosts", [SetField::Ipv4Address]), []);
    let refused = |result: Result<(), tokio_nfqueue::Error>, text: &str| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    };
    refused(divert.set("other").insert(Ipv4Addr::LOCALHOST, None), "no such set");
    refused(divert.set("hosts").insert(Ipv6Addr::LOCALHOST, None), "does not fit");
    refused(divert.set("hosts").insert((Ipv4Addr::LOCALHOST, 1), None), "does not fit");
    refused(divert.set("hosts").insert(Ipv4Addr::LOCALHOST, Duration::ZERO), "time-out");

    let install = |builder: tokio_nfqueue::divert::DivertBuilder| builder.install().map(drop);
    let set = |name: &str| NamedSet::new(name, [SetField::Port]);
    refused(install(Divert::builder().set(set("a b"))), "set \"a b\": name");
    refused(install(Divert::builder().set(set("a")).set(set("a"))), "set \"a\": name: there is another");
    let rule = udp_out().when(Match::in_set("b", [PacketField::SourcePort])).drop();
    refused(install(Divert::builder().set(set("a")).rule(rule.clone())), "rule 0: set: there is no set \"b\"");
    refused(divert.replace_rules([rule]), "rule 0: set: there is no set \"b\"");
}
