//! Prints the table as a script for `nft -f`.

use std::fmt::Write;

use super::{chain::hook_name, checked::Surroundings, denied::DeniedSet, layout::Layout, tuple};

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
    for (set, flows) in flows.into_iter().flat_map(|flows| DeniedSet::all(family).map(move |set| (set, flows))) {
        line(&mut text, 1, format_args!("set {} {{", set.name()));
        line(&mut text, 2, format_args!("type {}", tuple::nft_type(set.version)));
        line(&mut text, 2, format_args!("flags dynamic,timeout"));
        line(&mut text, 2, format_args!("size {}", flows.capacity));
        line(&mut text, 2, format_args!("timeout {}ms", flows.timeout.as_millis()));
        line(&mut text, 1, format_args!("}}"));
    }
    for chain in &layout.chains {
        line(&mut text, 1, format_args!("chain {} {{", chain.name));
        if let Some((place, kind)) = chain.base {
            let (kind, hook) = (kind.name(), hook_name(place.hook));
            line(&mut text, 2, format_args!("type {kind} hook {hook} priority {}; policy accept;", place.priority));
        }
        for rule in layout.rules_of(chain) {
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
