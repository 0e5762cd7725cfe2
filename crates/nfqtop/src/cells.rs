//! The cells of the tables, as text.

use std::collections::VecDeque;

use crate::{
    snapshot::Holder,
    view::{Bound, Limit, Row},
};

/// Said if there are no rows.
pub(crate) const EMPTY: &str = "No queue is bound, and no rule that could be read leads to one.";
pub(crate) const ELSEWHERE: &str = "Other network namespaces are not shown: lsns -t net, then nfqtop --namespace PID.";

/// `7`, or `7-9` for numbers that are not bound.
pub(crate) fn number(row: &Row) -> String {
    if row.first == row.last { row.first.to_string() } else { format!("{}-{}", row.first, row.last) }
}

/// `ids 1234 +1`: the first process, and how many others. The name is shortened to the width.
pub(crate) fn owner(row: &Row, width: usize) -> String {
    let Some(bound) = &row.bound else { return "none".to_owned() };
    let Some((holder, rest)) = bound.holders.split_first() else { return "?".to_owned() };
    let others = if rest.is_empty() { String::new() } else { format!(" +{}", rest.len()) };
    let numbers = format!(" {}{others}", holder.pid);
    shortened(&holder.name, width.saturating_sub(numbers.len())) + &numbers
}

/// `ids (1234), ids (1235)`: all processes.
pub(crate) fn owners(holders: &[Holder]) -> String {
    let names: Vec<String> = holders.iter().map(|holder| format!("{} ({})", holder.name, holder.pid)).collect();
    names.join(", ")
}

/// `~12%`: of the assumed limit. `?`: the limit is unknown.
pub(crate) fn fill(bound: &Bound) -> String {
    match bound.limit {
        Limit::Default => format!("~{}%", bound.fill()),
        Limit::Seen(_) => format!("{}%", bound.fill()),
        Limit::AtLeast(_) => "?".to_owned(),
    }
}

/// How the fill was judged, as a sentence.
pub(crate) fn limit(bound: &Bound) -> String {
    match bound.limit {
        Limit::Default => {
            format!("{} of 1024, the kernel's default; the kernel does not tell the real maximum", bound.line.length)
        }
        Limit::Seen(packets) => format!("{} of {packets}, the length at which it was seen full", bound.line.length),
        Limit::AtLeast(packets) => {
            format!("{}; it was {packets} long, so the maximum is not the default, and unknown", bound.line.length)
        }
    }
}

/// Packets a second: `0`, `0.5`, `12`, `12345`, `123k`, `12M`.
pub(crate) fn rate(rate: f64) -> String {
    match rate {
        0.0 => "0".to_owned(),
        rate if rate < 9.95 => format!("{rate:.1}"),
        rate => count(rate.round() as u64),
    }
}

pub(crate) fn count(count: u64) -> String {
    match count {
        0..100_000 => count.to_string(),
        100_000..10_000_000 => format!("{}k", count / 1000),
        _ => format!("{}M", count / 1_000_000),
    }
}

/// A bar for each of the last samples, against the highest of them. Nothing for zero.
pub(crate) fn sparkline(samples: &VecDeque<u64>, width: usize) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let shown = || samples.iter().skip(samples.len().saturating_sub(width));
    let highest = shown().max().copied().unwrap_or(0).max(1);
    let bar = |sample: &u64| match (sample * 8).div_ceil(highest) {
        0 => ' ',
        eighths => BARS[eighths as usize - 1],
    };
    let padding = width.saturating_sub(samples.len());
    std::iter::repeat_n(' ', padding).chain(shown().map(bar)).collect()
}

/// At most so many characters.
pub(crate) fn shortened(text: &str, width: usize) -> String {
    match text.char_indices().nth(width) {
        Some(_) if width > 0 => text.chars().take(width - 1).chain(['…']).collect(),
        Some(_) => String::new(),
        None => text.to_owned(),
    }
}

/// Words in lines of at most `width` characters.
pub(crate) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().expect("there is a line");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_short() {
        let text = [0.0, 0.52, 12.3, 99_999.0, 123_456.0, 12_345_678.0].map(rate);
        assert_eq!(text, ["0", "0.5", "12", "99999", "123k", "12M"]);
    }

    #[test]
    fn the_newest_sample_is_on_the_right() {
        let samples = VecDeque::from([9, 0, 1, 4, 8]);
        assert_eq!(sparkline(&samples, 4), " ▁▄█");
        assert_eq!(sparkline(&samples, 6), " █ ▁▄█");
        assert_eq!(sparkline(&VecDeque::new(), 2), "  ");
    }

    #[test]
    fn long_text_is_shortened_or_wrapped() {
        assert_eq!(shortened("abcdef", 4), "abc…");
        assert_eq!(shortened("abcd", 4), "abcd");
        assert_eq!(wrapped("ab cd efghij k", 5), ["ab cd", "efghij", "k"]);
    }
}
