//! The view as plain text, for `--once`.

use std::fmt::Write;

use crate::{
    cells,
    view::{Row, View},
};

const HEADER: [&str; 10] =
    ["QUEUE", "STATE", "OWNER", "LENGTH", "FILL", "IN/S", "OUT/S", "FULL/S", "BUFFER/S", "LAST ID"];
/// All others are aligned to the right.
const LEFT: [usize; 2] = [1, 2];

/// Ends with a line feed.
pub(crate) fn text(view: &View, namespace: &str) -> String {
    let mut text = format!("network namespace {namespace}");
    if let Some(seconds) = view.seconds {
        let _ = write!(text, ", watched for {seconds:.1} s");
    }
    text.push('\n');
    if !view.queues_readable {
        text.push_str("The queues cannot be read.\n");
    } else if view.rows.is_empty() {
        let _ = writeln!(text, "{}\n{}", cells::EMPTY, cells::ELSEWHERE);
    } else {
        text.push('\n');
        table(&mut text, view);
    }
    details(&mut text, view);
    text
}

fn table(text: &mut String, view: &View) {
    let rows: Vec<[String; 10]> = std::iter::once(HEADER.map(str::to_owned)).chain(view.rows.iter().map(row)).collect();
    let widths: [usize; 10] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            let separator = if column == 0 { "" } else { "  " };
            let _ = match LEFT.contains(&column) {
                true => write!(line, "{separator}{cell:<width$}"),
                false => write!(line, "{separator}{cell:>width$}"),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

fn row(row: &Row) -> [String; 10] {
    let dash = || "-".to_owned();
    let (number, state, owner) = (cells::number(row), row.label().to_owned(), cells::owner(row, usize::MAX));
    let Some(bound) = &row.bound else {
        return [number, state, owner, dash(), dash(), dash(), dash(), dash(), dash(), dash()];
    };
    let rates =
        bound.rates.map(|rates| [rates.arrived, rates.left, rates.queue_dropped, rates.user_dropped].map(cells::rate));
    let [arrived, left, full, buffer] = rates.unwrap_or_else(|| std::array::from_fn(|_| dash()));
    let (length, last_id) = (bound.line.length.to_string(), bound.line.last_id.to_string());
    [number, state, owner, length, cells::fill(bound), arrived, left, full, buffer, last_id]
}

fn details(text: &mut String, view: &View) {
    let mut section = |title: &str, lines: Vec<String>| {
        if !lines.is_empty() {
            let _ = writeln!(text, "\n{title}");
            for line in lines {
                let _ = writeln!(text, "  {line}");
            }
        }
    };
    let advice = |row: &Row| {
        let number = cells::number(row);
        row.advice.iter().map(move |advice| format!("{number}: {advice}.")).collect::<Vec<_>>()
    };
    section("Advice", view.rows.iter().flat_map(advice).collect());
    let holders = |row: &Row| {
        let holders = &row.bound.as_ref()?.holders;
        (holders.len() > 1).then(|| format!("{}: {}", cells::number(row), cells::owners(holders)))
    };
    section("Sockets that several processes hold", view.rows.iter().filter_map(holders).collect());
    // A rule to several queues once.
    let mut rules: Vec<String> = Vec::new();
    for rule in view.rows.iter().flat_map(|row| row.rules.iter().flatten()).chain(&view.other_rules) {
        let rule = rule.to_string();
        if !rules.contains(&rule) {
            rules.push(rule);
        }
    }
    section("Rules", rules);
    let unreadable = view.unreadable.iter().map(|part| format!("{}: {}", part.what, part.why));
    section("Not readable", unreadable.collect());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kernel::QueueLine,
        snapshot::{Snapshot, Unreadable},
        view::{History, tests as samples},
    };

    #[test]
    fn the_table_begins_with_the_worst() {
        let rules = || vec![samples::rule(1, 3, false)];
        let before = [samples::line(1, 0, 5), samples::line(2, 4, 4)];
        let now = [QueueLine { last_id: 2505, ..before[0] }, before[1]];
        let mut history = History::default();
        history.update(&samples::snapshot(0, &before, rules()));
        let text = text(&history.update(&samples::snapshot(2, &now, rules())), "net:[1]");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "network namespace net:[1], watched for 2.0 s");
        assert_eq!(lines[2], "QUEUE  STATE    OWNER         LENGTH  FILL  IN/S  OUT/S  FULL/S  BUFFER/S  LAST ID");
        assert_eq!(lines[3], "    2  STUCK    program2 102       4   ~0%     0      0       0         0        4");
        assert_eq!(lines[4], "    3  UNBOUND  none               -     -     -      -       -         -        -");
        assert_eq!(lines[5], "    1  ok       program1 101       0   ~0%  1250   1250       0         0     2505");
        assert!(text.contains("\nAdvice\n  2: 4 packets wait, and none has been decided for 2 s: "), "{text}");
        assert_eq!(text.matches("to 1-3").count(), 1, "{text}");
    }

    #[test]
    fn without_queues_it_says_where_others_may_be() {
        let text = text(&History::default().update(&samples::snapshot(0, &[], vec![])), "net:[1]");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "No queue is bound, and no rule that could be read leads to one.");
        assert!(lines[2].starts_with("Other network namespaces are not shown: "), "{text}");
        assert_eq!(lines.len(), 3, "{text}");
    }

    #[test]
    fn what_is_unreadable_is_named() {
        let unreadable = vec![Unreadable { what: "queues", why: "Permission denied".into() }];
        let text = text(&History::default().update(&Snapshot { unreadable, ..Snapshot::default() }), "net:[1]");
        assert!(text.ends_with("\nNot readable\n  queues: Permission denied\n"), "{text}");
    }
}
