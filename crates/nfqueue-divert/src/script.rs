//! Prints the table as a script for `nft -f`.

use std::{fmt::Write, time::Duration};

use super::{
    action::FLOWTABLE,
    chain::{FLOWTABLE_PRIORITY, INGRESS, hook_name},
    checked::Surroundings,
    denied::{self, DeniedSet},
    layout::Layout,
    tuple,
};

/// The table in the language of nft.
pub(super) fn script(table: &str, surroundings: Surroundings<'_>, layout: &Layout<'_>) -> String {
    let Surroundings { family, sets, flows, .. } = surroundings;
    let mut text = format!("table {} {table} {{\n", family.name());
    for set in sets {
        let types: Vec<&str> = set.fields().iter().map(|field| field.name()).collect();
        line(&mut text, 1, format_args!("set {} {{", set.name()));
        line(&mut text, 2, format_args!("type {}", types.join(" . ")));
        line(&mut text, 2, format_args!("flags timeout"));
        line(&mut text, 2, format_args!("size {}", set.size()));
        if let Some(timeout) = set.default_timeout() {
            line(&mut text, 2, format_args!("timeout {}", time(timeout)));
        }
        line(&mut text, 1, format_args!("}}"));
    }
    if let Some(flows) = flows {
        let mut set = |name: &str, of: &str, size: u32, timeout: Duration| {
            line(&mut text, 1, format_args!("set {name} {{"));
            line(&mut text, 2, format_args!("type {of}"));
            line(&mut text, 2, format_args!("flags dynamic,timeout"));
            line(&mut text, 2, format_args!("size {size}"));
            line(&mut text, 2, format_args!("timeout {}", time(timeout)));
            line(&mut text, 1, format_args!("}}"));
        };
        for denied in DeniedSet::every(family) {
            set(denied.name(), &tuple::nft_type(denied.version), flows.capacity, flows.timeout);
        }
        for version in denied::versions(family) {
            set(denied::begun(version), &tuple::nft_type(version), denied::BEGUN, flows.timeout);
            set(denied::beside(version), &tuple::nft_type(version), denied::BESIDE, flows.beside_timeout());
            set(denied::recent(version), &tuple::nft_type(version), flows.capacity, denied::RECENT);
            set(denied::replied(version), &tuple::nft_type(version), denied::REPLIED, denied::RECENT);
        }
        let capacity = denied::ports_capacity(flows.capacity);
        set(denied::PORTS, "inet_service . inet_service", capacity, flows.timeout);
        if surroundings.offloads() {
            set(denied::RECALLED, "inet_service . inet_service", denied::RECALLED_CAPACITY, denied::RECALL);
        }
    }
    let devices: Vec<String> = surroundings.offload.iter().map(|name| format!("\"{name}\"")).collect();
    let devices = format!("devices = {{ {} }}", devices.join(", "));
    if surroundings.offloads() {
        line(&mut text, 1, format_args!("flowtable {FLOWTABLE} {{"));
        line(&mut text, 2, format_args!("hook ingress priority {FLOWTABLE_PRIORITY}"));
        line(&mut text, 2, format_args!("{devices}"));
        line(&mut text, 2, format_args!("counter"));
        line(&mut text, 1, format_args!("}}"));
    }
    for chain in &layout.chains {
        line(&mut text, 1, format_args!("chain {} {{", chain.name));
        if let Some((place, kind)) = chain.base {
            let (kind, mut hook) = (kind.name(), hook_name(place.hook).to_owned());
            if place.hook == INGRESS {
                hook = format!("{hook} {devices}");
            }
            line(&mut text, 2, format_args!("type {kind} hook {hook} priority {}; policy accept;", place.priority));
        }
        for rule in layout.rules_of(chain).filter(|rule| rule.has_nft()) {
            rule.nft_rules().iter().for_each(|rule| line(&mut text, 2, format_args!("{rule}")));
        }
        line(&mut text, 1, format_args!("}}"));
    }
    text.push_str("}\n");
    text
}

/// A time as nft writes it, such as `1d2h3m4s5ms`. It reads numbers of at most 8 digits
/// (`time_parse`), so the unit must grow with the time.
fn time(time: Duration) -> String {
    let seconds = time.as_secs();
    let parts = [
        (seconds / 86_400, "d"),
        (seconds / 3600 % 24, "h"),
        (seconds / 60 % 60, "m"),
        (seconds % 60, "s"),
        (time.subsec_millis().into(), "ms"),
    ];
    parts.iter().filter(|(number, _)| *number > 0).map(|(number, unit)| format!("{number}{unit}")).collect()
}

fn line(text: &mut String, depth: usize, content: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{}{content}", "\t".repeat(depth));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_outs_are_printed_in_units_that_nft_reads() {
        let printed = |milliseconds| time(Duration::from_millis(milliseconds));
        assert_eq!(printed(1), "1ms");
        assert_eq!(printed(1500), "1s500ms");
        assert_eq!(printed(60_000), "1m");
        assert_eq!(printed(100_000_000), "1d3h46m40s");
        assert_eq!(printed(86_400_001), "1d1ms");
        assert_eq!(printed(3_153_600_000_000), "36500d");
        assert_eq!(printed(3_153_599_999_999), "36499d23h59m59s999ms");
        assert_eq!(time(Duration::from_micros(1999)), "1ms");
    }
}
