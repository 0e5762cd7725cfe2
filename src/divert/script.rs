//! Prints the table as a script for `nft -f`.

use std::fmt::Write;

use super::{
    checked::{KernelRule, Place, Surroundings},
    nft::chain_name,
};

/// The table in the language of nft, with the rules as commands of iptables in comments.
pub(super) fn script(
    table: &str,
    surroundings: Surroundings<'_>,
    places: &[Place],
    rules: &[KernelRule<'_>],
) -> String {
    let Surroundings { family, sets, priority } = surroundings;
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
    for place in places {
        let name = chain_name(*place, priority);
        let hook = chain_name(Place { priority, ..*place }, priority);
        line(&mut text, 1, format_args!("chain {name} {{"));
        line(&mut text, 2, format_args!("type filter hook {hook} priority {}; policy accept;", place.priority));
        for rule in rules.iter().filter(|rule| rule.place == *place) {
            if let Some(command) = rule.iptables() {
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
