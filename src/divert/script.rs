//! Prints the table as a script for `nft -f`.

use std::{fmt::Write, time::Duration};

use super::{
    chain::hook_name,
    checked::{KernelRule, Surroundings},
    denied::{self, DeniedSet, Remember},
    layout::Layout,
    tuple,
};

/// The table in the language of nft, with the rules as commands of iptables in comments.
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
            line(&mut text, 2, format_args!("timeout {}ms", timeout.as_millis()));
        }
        line(&mut text, 1, format_args!("}}"));
    }
    if let Some(flows) = flows {
        let mut set = |name: &str, of: &str, size: u32, timeout: Duration| {
            line(&mut text, 1, format_args!("set {name} {{"));
            line(&mut text, 2, format_args!("type {of}"));
            line(&mut text, 2, format_args!("flags dynamic,timeout"));
            line(&mut text, 2, format_args!("size {size}"));
            line(&mut text, 2, format_args!("timeout {}ms", timeout.as_millis()));
            line(&mut text, 1, format_args!("}}"));
        };
        for denied in DeniedSet::all(family) {
            set(denied.name(), &tuple::nft_type(denied.version), flows.capacity, flows.timeout);
        }
        for version in denied::versions(family) {
            for name in [denied::recent(version), denied::replied(version)] {
                set(name, &tuple::nft_type(version), flows.capacity, denied::RECENT);
            }
        }
        let capacity = denied::ports_capacity(flows.capacity);
        set(denied::PORTS, "inet_service . inet_service", capacity, flows.timeout);
    }
    for chain in &layout.chains {
        line(&mut text, 1, format_args!("chain {} {{", chain.name));
        if let Some((place, kind)) = chain.base {
            let (kind, hook) = (kind.name(), hook_name(place.hook));
            line(&mut text, 2, format_args!("type {kind} hook {hook} priority {}; policy accept;", place.priority));
        }
        // A script has no need to name connections by translated addresses.
        let is_printed = |rule: &&KernelRule<'_>| !matches!(rule.remember, Some(Remember::Translated(_)));
        for rule in layout.rules_of(chain).filter(is_printed) {
            if let Some(command) = rule.index.filter(|_| chain.base.is_some()).and_then(|_| rule.iptables()) {
                line(&mut text, 2, format_args!("# {command}"));
            }
            line(&mut text, 2, format_args!("{}", rule.nft()));
        }
        line(&mut text, 1, format_args!("}}"));
    }
    text.push_str("}\n");
    text
}

fn line(text: &mut String, depth: usize, content: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{}{content}", "\t".repeat(depth));
}
