//! Methods for the modes of other programs.

use tokio_nfqueue::{Action, Queue};

use crate::common::{Traffic, next, soon, start};

tests![both repeat_marked_never_loops];

async fn repeat_marked_never_loops() {
    // The rule does not match on the mark, so without the check in `repeat_marked` the packet would
    // be queued indefinitely.
    let (mut queue, _rules) = start(Queue::builder(0));
    let traffic = Traffic::new(1);
    traffic.send([0]);
    for (turn, action) in [(0, Action::Repeat), (1, Action::Accept)] {
        let packet = next(&mut queue).await;
        assert_eq!((packet.mark(), packet.has_mark(0x10, 0xf0)), (turn * 0x10, turn == 1));
        let verdict = packet.repeat_marked(0x10, 0xf0);
        assert_eq!(verdict.action(), action);
        verdict.submit().unwrap();
    }
    soon("the flush", queue.sink().flush()).await;
    traffic.expect([0]).await;
}
