//! The view for programs: one JSON object for each refresh. README.md documents the fields.

use serde::Serialize;

use crate::{
    advice::{Advice, Severity},
    rules::Rule,
    view::{Bound, Rates, Row, View},
};

/// A line of JSON, without a line feed.
pub(crate) fn line(view: &View, namespace: &str) -> String {
    let object = Object {
        nfqtop: env!("CARGO_PKG_VERSION"),
        time: rounded(view.unix_time),
        namespace,
        seconds: view.seconds.map(rounded),
        queues: view.queues_readable.then(|| view.rows.iter().map(queue).collect()),
        other_rules: view.other_rules.iter().map(rule).collect(),
        unreadable: view.unreadable.iter().map(|part| Unreadable { what: part.what, why: &part.why }).collect(),
    };
    serde_json::to_string(&object).expect("no map with keys that are not strings")
}

#[derive(Serialize)]
struct Object<'a> {
    nfqtop: &'a str,
    time: f64,
    namespace: &'a str,
    seconds: Option<f64>,
    queues: Option<Vec<QueueObject<'a>>>,
    other_rules: Vec<RuleObject<'a>>,
    unreadable: Vec<Unreadable<'a>>,
}

#[derive(Serialize)]
struct QueueObject<'a> {
    queue: u16,
    last_queue: u16,
    bound: bool,
    severity: &'a str,
    advice: Vec<AdviceObject<'a>>,
    #[serde(flatten)]
    details: Option<Details<'a>>,
    rules: Option<Vec<RuleObject<'a>>>,
}

#[derive(Serialize)]
struct AdviceObject<'a> {
    kind: &'a str,
    text: String,
}

/// Of a queue that is bound.
#[derive(Serialize)]
struct Details<'a> {
    port_id: u32,
    owners: Vec<Owner<'a>>,
    unread_bytes: Option<u32>,
    length: u32,
    limit: u32,
    limit_from: &'a str,
    fill_percent: u32,
    copy_mode: &'a str,
    copy_range: u32,
    queue_dropped: u32,
    user_dropped: u32,
    last_id: u32,
    per_second: Option<PerSecond>,
}

#[derive(Serialize)]
struct Owner<'a> {
    pid: u32,
    name: &'a str,
}

#[derive(Serialize)]
struct PerSecond {
    arrived: f64,
    left: f64,
    queue_dropped: f64,
    user_dropped: f64,
}

#[derive(Serialize)]
struct RuleObject<'a> {
    source: &'a str,
    family: &'a str,
    table: &'a str,
    chain: &'a str,
    handle: Option<u64>,
    text: Option<&'a str>,
    first_queue: Option<u16>,
    last_queue: Option<u16>,
    bypass: bool,
    fanout: bool,
    packets: Option<u64>,
    bytes: Option<u64>,
    packets_per_second: Option<f64>,
}

#[derive(Serialize)]
struct Unreadable<'a> {
    what: &'a str,
    why: &'a str,
}

fn queue(row: &Row) -> QueueObject<'_> {
    QueueObject {
        queue: row.first,
        last_queue: row.last,
        bound: row.bound.is_some(),
        severity: match row.severity() {
            Some(Severity::Losing) => "losing",
            Some(Severity::Warning) => "warning",
            Some(Severity::Note) => "note",
            None => "ok",
        },
        advice: row.advice.iter().map(advice).collect(),
        details: row.bound.as_ref().map(details),
        rules: row.rules.as_ref().map(|rules| rules.iter().map(rule).collect()),
    }
}

fn advice(advice: &Advice) -> AdviceObject<'_> {
    AdviceObject { kind: advice.kind(), text: advice.to_string() }
}

fn details(bound: &Bound) -> Details<'_> {
    let line = &bound.line;
    Details {
        port_id: line.port,
        owners: bound.holders.iter().map(|holder| Owner { pid: holder.pid, name: &holder.name }).collect(),
        unread_bytes: bound.unread,
        length: line.length,
        limit: bound.limit.packets(),
        limit_from: bound.limit.source(),
        fill_percent: bound.fill(),
        copy_mode: line.copy.name(),
        copy_range: line.copy_range,
        queue_dropped: line.queue_dropped,
        user_dropped: line.user_dropped,
        last_id: line.last_id,
        per_second: bound.rates.map(per_second),
    }
}

fn per_second(rates: Rates) -> PerSecond {
    PerSecond {
        arrived: rounded(rates.arrived),
        left: rounded(rates.left),
        queue_dropped: rounded(rates.queue_dropped),
        user_dropped: rounded(rates.user_dropped),
    }
}

fn rule(rule: &Rule) -> RuleObject<'_> {
    RuleObject {
        source: rule.source,
        family: rule.family,
        table: &rule.table,
        chain: &rule.chain,
        handle: rule.handle,
        text: rule.text.as_deref(),
        first_queue: rule.queues.map(|queues| queues.0),
        last_queue: rule.queues.map(|queues| queues.1),
        bypass: rule.bypass,
        fanout: rule.fanout,
        packets: rule.counter.map(|counter| counter.packets),
        bytes: rule.counter.map(|counter| counter.bytes),
        packets_per_second: rule.rate.map(rounded),
    }
}

/// To milliseconds, and thousandths of a packet.
fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        snapshot::{Snapshot, Unreadable},
        view::{History, tests as samples},
    };

    #[test]
    fn all_fields_are_there() {
        let rules = || vec![samples::rule(1, 1, true), samples::rule(9, 9, false)];
        let mut history = History::default();
        history.update(&samples::snapshot(1, &[samples::line(1, 3, 3)], rules()));
        let view = history.update(&samples::snapshot(3, &[samples::line(1, 3, 3)], rules()));
        let value: Value = serde_json::from_str(&line(&view, "net:[1]")).unwrap();
        assert_eq!(value["namespace"], "net:[1]");
        assert_eq!(value["seconds"], 2.0);
        let queue = &value["queues"][0];
        assert_eq!(queue["advice"][0]["kind"], "stuck");
        assert_eq!(queue["owners"], json!([{"pid": 101, "name": "program1"}]));
        let expected = json!({"arrived": 0.0, "left": 0.0, "queue_dropped": 0.0, "user_dropped": 0.0});
        assert_eq!(queue["per_second"], expected);
        assert_eq!((&queue["limit"], &queue["limit_from"]), (&json!(1024), &json!("default")));
        assert_eq!(queue["rules"][0]["bypass"], true);
        let unbound = &value["queues"][1];
        assert_eq!((&unbound["queue"], &unbound["bound"]), (&json!(9), &json!(false)));
        assert_eq!(unbound["severity"], "losing");
        assert!(unbound.get("port_id").is_none());
        // README.md names every field.
        let documentation = include_str!("../README.md");
        let mut fields = Vec::new();
        names(&value, &mut fields);
        for field in fields {
            assert!(documentation.contains(&format!("`{field}`")), "README.md does not document {field}");
        }
    }

    fn names(value: &Value, fields: &mut Vec<String>) {
        match value {
            Value::Object(object) => {
                for (name, value) in object {
                    fields.push(name.clone());
                    names(value, fields);
                }
            }
            Value::Array(values) => values.iter().for_each(|value| names(value, fields)),
            _ => {}
        }
    }

    #[test]
    fn queues_that_cannot_be_read_are_null_and_the_reason_is_there() {
        let unreadable = vec![Unreadable { what: "queues", why: "no".into() }];
        let view = History::default().update(&Snapshot { unreadable, ..Snapshot::default() });
        let value: Value = serde_json::from_str(&line(&view, "net:[1]")).unwrap();
        assert_eq!((&value["queues"], &value["seconds"]), (&Value::Null, &Value::Null));
        assert_eq!(value["unreadable"], json!([{"what": "queues", "why": "no"}]));
    }
}
