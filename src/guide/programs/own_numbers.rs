use std::{collections::HashSet, net::IpAddr};

/// Each value of a label is a number that stays in memory and in Prometheus.
const CLIENTS: usize = 100;

/// Counts a packet that was blocked.
fn blocked(clients: &mut HashSet<IpAddr>, client: IpAddr) {
    // Anyone can send from many addresses, and forge them: those beyond the limit are one.
    if clients.len() < CLIENTS {
        clients.insert(client);
    }
    let known = clients.contains(&client);
    let label = if known { client.to_string() } else { "other".to_owned() };
    metrics::counter!("filter_blocked_total", "client" => label).increment(1);
}

/// Its test.
pub fn main() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, || {
        let mut clients = HashSet::new();
        for address in 0..200_u32 {
            blocked(&mut clients, IpAddr::from(address.to_be_bytes()));
        }
    });
    let text = recorder.handle().render();
    assert!(text.contains(r#"filter_blocked_total{client="0.0.0.7"} 1"#), "{text}");
    assert!(text.contains(r#"filter_blocked_total{client="other"} 100"#), "{text}");
}
