//! What the terminal shows, and what its keys do. Draws into a buffer; reads and writes nothing.

use std::cmp::Reverse;

use ratatui::{
    buffer::Buffer,
    layout::Rect,
    style::{Color, Modifier, Style},
};

use crate::{
    advice::Severity,
    cells,
    keys::Key,
    view::{Bound, Row, View},
};

#[derive(Debug, Default)]
pub(crate) struct Screen {
    view: View,
    /// The indices of the rows, in the order in which they are shown.
    order: Vec<usize>,
    /// The first number of the selected row, which keeps its selection when it moves. `None`: the
    /// first row, whichever it is.
    selected: Option<u16>,
    /// Rows above the first one that is shown.
    offset: usize,
    sort: Sort,
    paused: bool,
    help: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Sort {
    #[default]
    Trouble,
    Number,
    Rate,
    Length,
}

/// What is to be done after a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    Nothing,
    Draw,
    /// The pause is over: show what is new.
    Refresh,
    Quit,
}

impl Screen {
    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    pub(crate) fn show(&mut self, view: View) {
        self.view = view;
        self.reorder();
    }

    fn reorder(&mut self) {
        let rows = &self.view.rows;
        self.order = (0..rows.len()).collect();
        let rate = |row: &Row| row.bound.as_ref().and_then(|bound| bound.rates).map_or(0.0, |rates| rates.arrived);
        match self.sort {
            Sort::Trouble => {}
            Sort::Number => self.order.sort_by_key(|&index| rows[index].first),
            Sort::Rate => self.order.sort_by(|&one, &two| rate(&rows[two]).total_cmp(&rate(&rows[one]))),
            Sort::Length => self
                .order
                .sort_by_key(|&index| Reverse(rows[index].bound.as_ref().map_or(0, |bound| bound.line.length))),
        }
    }

    /// The place of the selected row in the order.
    fn position(&self) -> usize {
        let is_selected = |&index: &usize| Some(self.view.rows[index].first) == self.selected;
        self.order.iter().position(is_selected).unwrap_or(0)
    }

    pub(crate) fn key(&mut self, key: Key) -> Next {
        match key {
            Key::Interrupt | Key::Char('q') => return Next::Quit,
            Key::Char('?') | Key::Char('h') => self.help = !self.help,
            Key::Escape if self.help => self.help = false,
            Key::Char(' ') => {
                self.paused = !self.paused;
                return if self.paused { Next::Draw } else { Next::Refresh };
            }
            Key::Char('s') => {
                self.sort = match self.sort {
                    Sort::Trouble => Sort::Number,
                    Sort::Number => Sort::Rate,
                    Sort::Rate => Sort::Length,
                    Sort::Length => Sort::Trouble,
                };
                self.reorder();
            }
            Key::Down | Key::Char('j') => self.select(self.position() + 1),
            Key::Up | Key::Char('k') => self.select(self.position().saturating_sub(1)),
            Key::PageDown => self.select(self.position() + PAGE),
            Key::PageUp => self.select(self.position().saturating_sub(PAGE)),
            Key::Home | Key::Char('g') => {
                self.selected = None;
                self.offset = 0;
            }
            Key::End | Key::Char('G') => self.select(usize::MAX),
            _ => return Next::Nothing,
        }
        Next::Draw
    }

    fn select(&mut self, position: usize) {
        let position = position.min(self.order.len().saturating_sub(1));
        self.selected = self.order.get(position).map(|&index| self.view.rows[index].first);
    }

    pub(crate) fn draw(&mut self, area: Rect, buffer: &mut Buffer, namespace: &str) {
        let mut lines = Lines { area, buffer, next: area.y };
        self.title(&mut lines, namespace);
        if self.help {
            for line in HELP.lines() {
                lines.put(line, Style::new());
            }
        } else {
            let unreadable = self.view.unreadable.len().min(2) as u16;
            let free = area.height.saturating_sub(3 + unreadable);
            let details = if free < 8 { 0 } else { (free * 2 / 5).clamp(5, 14) };
            self.table(&mut lines, free - details);
            lines.next = (area.y + area.height).saturating_sub(1 + unreadable + details);
            self.details(&mut lines, details);
            lines.next = (area.y + area.height).saturating_sub(1 + unreadable);
            for part in self.view.unreadable.iter().take(2) {
                lines.put(&format!(" not readable: {}: {}", part.what, part.why), Color::Yellow.into());
            }
        }
        lines.next = (area.y + area.height).saturating_sub(1);
        lines.put(&format!("{FOOTER:<width$}", width = usize::from(area.width)), Modifier::REVERSED.into());
    }

    fn title(&self, lines: &mut Lines<'_>, namespace: &str) {
        let rows = &self.view.rows;
        let bound = rows.iter().filter_map(|row| row.bound.as_ref());
        let rate: f64 = bound.clone().filter_map(|bound| bound.rates).map(|rates| rates.arrived).sum();
        let losing = rows.iter().filter(|row| row.severity() == Some(Severity::Losing)).count();
        let sort = match self.sort {
            Sort::Trouble => "trouble",
            Sort::Number => "number",
            Sort::Rate => "rate",
            Sort::Length => "length",
        };
        let paused = if self.paused { " PAUSED " } else { "" };
        let (count, rate) = (bound.count(), cells::rate(rate));
        let text = format!(" nfqtop {namespace}  {count} queues, {losing} in trouble, {rate}/s  by {sort} {paused}");
        lines.put(&text, Modifier::BOLD.into());
    }

    /// The header and at most so many rows.
    fn table(&mut self, lines: &mut Lines<'_>, height: u16) {
        let columns = columns(&self.view.rows, usize::from(lines.area.width));
        let mut header = String::new();
        for column in &columns {
            column.append(&mut header, column.title.to_owned());
        }
        lines.put(&header, Style::new().add_modifier(Modifier::UNDERLINED));
        if self.view.rows.is_empty() {
            let texts = match self.view.queues_readable {
                true => &[cells::EMPTY, cells::ELSEWHERE][..],
                false => &["The queues cannot be read."],
            };
            let width = usize::from(lines.area.width).saturating_sub(2);
            for line in texts.iter().flat_map(|text| cells::wrapped(text, width)) {
                lines.put(&format!(" {line}"), Style::new());
            }
        }
        let (position, height) = (self.position(), usize::from(height));
        // The selected row is visible.
        self.offset = self.offset.min(position).max((position + 1).saturating_sub(height));
        self.offset = self.offset.min(self.order.len().saturating_sub(height));
        for (place, &index) in self.order.iter().enumerate().skip(self.offset).take(height) {
            let row = &self.view.rows[index];
            let mut line = String::new();
            for column in &columns {
                column.append(&mut line, (column.cell)(row, column.width));
            }
            let style = Style::new().fg(color(row.severity()));
            let style = if place == position { style.add_modifier(Modifier::REVERSED) } else { style };
            lines.put(&format!("{line:<width$}", width = usize::from(lines.area.width)), style);
        }
    }

    /// The selected row in words.
    fn details(&self, lines: &mut Lines<'_>, height: u16) {
        let Some(row) = self.order.get(self.position()).map(|&index| &self.view.rows[index]) else { return };
        if height == 0 {
            return;
        }
        let end = lines.next + height;
        let width = usize::from(lines.area.width).saturating_sub(2);
        let title = format!("── queue {} ", cells::number(row));
        lines.put(&format!("{title:─<width$}", width = width + 2), Style::new());
        let mut put = |text: &str, style: Style| {
            for line in cells::wrapped(text, width) {
                if lines.next < end {
                    lines.put(&format!(" {line}"), style);
                }
            }
        };
        for advice in &row.advice {
            put(&advice.to_string(), Style::new().fg(color(Some(advice.severity()))));
        }
        if let Some(bound) = &row.bound {
            for line in bound_details(bound) {
                put(&line, Style::new());
            }
        }
        match &row.rules {
            Some(rules) => rules.iter().for_each(|rule| put(&rule.to_string(), Style::new())),
            None => put("rules: not readable", Style::new()),
        }
        for rule in &self.view.other_rules {
            put(&rule.to_string(), Style::new());
        }
    }
}

const PAGE: usize = 10;

const FOOTER: &str = " q quit  ↑↓/jk select  space pause  s sort  ? help";

const HELP: &str = "
 q, ctrl-c     quit               space  pause, resume
 ↑ ↓, k j      select a queue     s      sort by trouble, number, rate, length
 PgUp PgDn     ten queues         Home   the worst again
 ?             this help

 OWNER   the process that holds the socket, and how many others hold it
 LENGTH  packets that wait for a verdict, unread ones included
 FILL    of the maximum length; the kernel does not tell it: ~ assumes 1024
 IN/S    packets that got an id      OUT/S  packets that left the queue
 FULL/S  packets that found the queue full: dropped
 BUF/S   packets that found the socket's receive buffer full: dropped";

fn color(severity: Option<Severity>) -> Color {
    match severity {
        Some(Severity::Losing) => Color::Red,
        Some(Severity::Warning) => Color::Yellow,
        Some(Severity::Note) => Color::Cyan,
        None => Color::Reset,
    }
}

fn bound_details(bound: &Bound) -> Vec<String> {
    let line = &bound.line;
    let holders = match &bound.holders[..] {
        [] => format!("held by no process that can be seen (port id {})", line.port),
        holders => format!("held by {} (port id {})", cells::owners(holders), line.port),
    };
    let unread = bound.unread.map_or_else(String::new, |bytes| format!(", {bytes} bytes unread in the socket"));
    vec![
        holders,
        format!("length {}{unread}", cells::limit(bound)),
        format!(
            "last id {}, dropped since bound: {} full, {} buffer; copies {}, up to {} bytes",
            line.last_id,
            line.queue_dropped,
            line.user_dropped,
            line.copy.name(),
            line.copy_range
        ),
    ]
}

/// Writes one line after another, cut at the border.
struct Lines<'a> {
    area: Rect,
    buffer: &'a mut Buffer,
    next: u16,
}

impl Lines<'_> {
    fn put(&mut self, text: &str, style: Style) {
        if self.next < self.area.y + self.area.height {
            self.buffer.set_stringn(self.area.x, self.next, text, usize::from(self.area.width), style);
            self.next += 1;
        }
    }
}

struct Column {
    title: &'static str,
    width: usize,
    right: bool,
    cell: fn(&Row, usize) -> String,
}

impl Column {
    fn append(&self, line: &mut String, cell: String) {
        let cell = cells::shortened(&cell, self.width);
        let width = self.width;
        line.push_str(&if self.right { format!(" {cell:>width$}") } else { format!(" {cell:<width$}") });
    }
}

fn columns(rows: &[Row], width: usize) -> Vec<Column> {
    let number_width = rows.iter().map(|row| cells::number(row).len()).max().unwrap_or(0).max(5);
    let column = |title, width, right, cell| Column { title, width, right, cell };
    let mut columns = vec![
        column("QUEUE", number_width, true, |row, _| cells::number(row)),
        column("STATE", 8, false, |row, _| row.label().to_owned()),
        column("OWNER", 13, false, cells::owner),
        column("LENGTH", 6, true, |row, _| of(row, |bound| cells::count(bound.line.length.into()))),
        column("FILL", 5, true, |row, _| of(row, cells::fill)),
        column("IN/S", 6, true, |row, _| rate(row, |rates| rates.arrived)),
        column("OUT/S", 6, true, |row, _| rate(row, |rates| rates.left)),
        column("FULL/S", 6, true, |row, _| rate(row, |rates| rates.queue_dropped)),
        column("BUF/S", 6, true, |row, _| rate(row, |rates| rates.user_dropped)),
        column("rate", 7, true, |row, width| of(row, |bound| cells::sparkline(&bound.rate_samples, width))),
    ];
    let used = |columns: &[Column]| columns.iter().map(|column| column.width + 1).sum::<usize>();
    // A name has up to 15 characters, and a pid mostly fewer than 8.
    columns[2].width += width.saturating_sub(used(&columns)).min(9);
    if width >= used(&columns) + 10 {
        let cell: fn(&Row, usize) -> String =
            |row, width| of(row, |bound| cells::sparkline(&bound.length_samples, width));
        columns.push(column("length", 9, true, cell));
    }
    if width >= used(&columns) + 11 {
        columns.push(column("LAST ID", 10, true, |row, _| of(row, |bound| bound.line.last_id.to_string())));
    }
    columns[9].width += width.saturating_sub(used(&columns)).min(50);
    columns
}

fn of(row: &Row, cell: impl FnOnce(&Bound) -> String) -> String {
    row.bound.as_ref().map_or_else(|| "-".to_owned(), cell)
}

fn rate(row: &Row, choose: impl FnOnce(&crate::view::Rates) -> f64) -> String {
    let rates = row.bound.as_ref().and_then(|bound| bound.rates.as_ref());
    rates.map_or_else(|| "-".to_owned(), |rates| cells::rate(choose(rates)))
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::{
        kernel::QueueLine,
        snapshot::Unreadable,
        view::{History, tests as samples},
    };

    fn screen() -> Screen {
        let rules = || vec![samples::rule(1, 4, false)];
        let before = [samples::line(1, 0, 5), samples::line(2, 4, 4), samples::line(3, 0, 0)];
        let now = [QueueLine { last_id: 2505, ..before[0] }, before[1], QueueLine { last_id: 7, ..before[2] }];
        let mut history = History::default();
        history.update(&samples::snapshot(0, &before, rules()));
        let mut screen = Screen::default();
        screen.show(history.update(&samples::snapshot(2, &now, rules())));
        screen
    }

    fn drawn(screen: &mut Screen, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| screen.draw(frame.area(), frame.buffer_mut(), "net:[1]")).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..height).map(line).collect()
    }

    fn press(screen: &mut Screen, keys: &str) {
        for key in keys.chars() {
            screen.key(Key::Char(key));
        }
    }

    #[test]
    fn the_worst_is_on_top_with_its_advice() {
        let lines = drawn(&mut screen(), 80, 24);
        assert_eq!(lines[0], " nfqtop net:[1]  3 queues, 2 in trouble, 1254/s  by trouble");
        assert!(
            lines[1].starts_with(" QUEUE STATE    OWNER           LENGTH  FILL   IN/S  OUT/S FULL/S  BUF/S"),
            "{}",
            lines[1]
        );
        assert!(
            lines[2].starts_with("     2 STUCK    program2 102         4   ~0%      0      0      0      0"),
            "{}",
            lines[2]
        );
        assert!(
            lines[3].starts_with("     4 UNBOUND  none                 -     -      -      -      -      -"),
            "{}",
            lines[3]
        );
        let text = lines.join("\n");
        assert!(text.contains("── queue 2 ─"), "{text}");
        assert!(text.contains("4 packets wait, and none has been decided for 2 s"), "{text}");
        assert!(text.contains("held by program2 (102) (port id 102)"), "{text}");
        assert_eq!(lines[23], FOOTER);
    }

    #[test]
    fn a_wide_terminal_also_shows_lengths_and_the_last_id() {
        let lines = drawn(&mut screen(), 140, 30);
        assert!(lines[1].contains("length") && lines[1].ends_with("LAST ID"), "{}", lines[1]);
        assert!(lines[4].trim_end().ends_with("2505"), "{}", lines[4]);
        assert!(lines[4].contains('█'), "{}", lines[4]);
    }

    #[test]
    fn small_terminals_are_no_problem() {
        for (width, height) in [(1, 1), (5, 2), (20, 4), (40, 9), (80, 11), (300, 90)] {
            let mut screen = screen();
            drawn(&mut screen, width, height);
            press(&mut screen, "?");
            drawn(&mut screen, width, height);
        }
    }

    #[test]
    fn keys_select_sort_pause_and_help() {
        let mut screen = screen();
        press(&mut screen, "j");
        assert_eq!(screen.selected, Some(4));
        assert!(drawn(&mut screen, 80, 24).join("\n").contains("── queue 4 ─"));
        press(&mut screen, "jjjjjj");
        assert_eq!(screen.selected, Some(3), "it stops at the last one");
        press(&mut screen, "k");
        assert_eq!(screen.selected, Some(1));
        press(&mut screen, "s");
        let lines = drawn(&mut screen, 80, 24);
        let numbers: Vec<&str> = lines[2..6].iter().filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(numbers, ["1", "2", "3", "4"], "by number; the selection stays with its queue");
        assert_eq!(screen.position(), 0);
        assert_eq!(screen.key(Key::Char(' ')), Next::Draw);
        assert!(screen.is_paused() && drawn(&mut screen, 90, 24)[0].ends_with("PAUSED"));
        assert_eq!(screen.key(Key::Char(' ')), Next::Refresh);
        press(&mut screen, "?");
        assert!(drawn(&mut screen, 80, 24).join("\n").contains("pause, resume"));
        screen.key(Key::Escape);
        assert!(!drawn(&mut screen, 80, 24).join("\n").contains("pause, resume"));
        assert_eq!(screen.key(Key::Char('q')), Next::Quit);
        assert_eq!(screen.key(Key::Interrupt), Next::Quit);
    }

    #[test]
    fn the_selected_row_is_visible_among_many() {
        let lines: Vec<_> = (0..100).map(|number| samples::line(number, 0, 0)).collect();
        let mut screen = Screen::default();
        screen.show(History::default().update(&samples::snapshot(0, &lines, vec![])));
        for (key, number) in [(Key::End, "99"), (Key::PageUp, "89"), (Key::Home, "0")] {
            screen.key(key);
            let shown = drawn(&mut screen, 80, 24);
            assert!(shown.iter().any(|line| line.contains(&format!("── queue {number} ─"))), "{number}");
            let is_row = |line: &&String| line.split_whitespace().next() == Some(number);
            assert!(shown[2..15].iter().any(|line| is_row(&line)), "{number}: {shown:#?}");
        }
    }

    #[test]
    fn without_queues_it_says_where_others_may_be() {
        let mut screen = Screen::default();
        screen.show(History::default().update(&samples::snapshot(0, &[], vec![])));
        let lines = drawn(&mut screen, 80, 24);
        assert_eq!(lines[2], " No queue is bound, and no rule that could be read leads to one.");
        let hint = format!("{}{}", lines[3], lines[4]);
        assert_eq!(hint, " Other network namespaces are not shown: lsns -t net, then nfqtop --namespace PID.");
    }

    #[test]
    fn what_cannot_be_read_stands_above_the_footer() {
        let mut screen = screen();
        screen.view.unreadable = vec![Unreadable { what: "rules", why: "root is needed".into() }];
        assert_eq!(drawn(&mut screen, 80, 24)[22], " not readable: rules: root is needed");
    }
}
