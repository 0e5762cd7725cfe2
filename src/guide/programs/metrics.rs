use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio_nfqueue::{
    Error, Queue,
    metrics::QueueMetrics,
    simulated::{self, TestPacket},
};

/// What the service returns for `GET /metrics`.
fn scrape(prometheus: &PrometheusHandle, queue: &QueueMetrics) -> String {
    // Now, not at an interval: what is read is never old, and an idle program does nothing.
    queue.update();
    prometheus.render()
}

/// Its test.
#[tokio::main(flavor = "current_thread")]
pub async fn main() -> Result<(), Error> {
    // First the recorder, then the queue: what is registered before it goes nowhere.
    let prometheus = PrometheusBuilder::new().install_recorder().expect("the only recorder");
    let (kernel, mut queue) = simulated::queue(Queue::builder(3).max_len(2))?;
    let metrics = QueueMetrics::register(&queue.sink());

    let [from, to] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse().unwrap());
    // One more than the queue holds.
    let sent = kernel.send_all((0..3).map(|_| TestPacket::udp(from, to, b"query")));
    queue.recv().await.expect("it is open")?.accept().submit()?;
    assert!(sent[0].outcome().await.accepted);

    let text = scrape(&prometheus, &metrics);
    for line in [
        r#"nfqueue_verdicts_total{queue="3",action="accept"} 1"#,
        r#"nfqueue_packets_dropped_total{queue="3",reason="queue_full"} 1"#,
        r#"nfqueue_queue_length{queue="3"} 1"#,
    ] {
        assert!(text.lines().any(|printed| printed == line), "{line} is not in:\n{text}");
    }
    Ok(())
}
