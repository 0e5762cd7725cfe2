//! Hand-overs that fail: the predecessor keeps the queue, and nothing is lost.

use std::{
    fs::File,
    io::{IoSlice, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use futures::FutureExt;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use tokio_nfqueue::{Action, Error, ErrorKind, FlushPolicy, Queue, handover::Takeover};

use super::{ENOUGH, connection, take_over};
use crate::{
    common::{Traffic, account, eventually, freed, hold, next, queued, soon, start, without_net_admin},
    support::drop_now,
};

tests![
    both a_handover_that_is_dropped_lets_the_queue_go_on,
    both a_successor_that_never_accepts_changes_nothing,
    both a_successor_that_accepts_too_late_gets_an_error,
    both a_successor_that_disappears_changes_nothing,
    both a_cancelled_hand_over_changes_nothing,
    both a_predecessor_that_disappears_leaves_the_queue_to_the_successor,
    both a_predecessor_that_sends_nothing_is_an_error,
    both garbage_instead_of_a_hand_over_is_an_error,
    both garbage_instead_of_an_acknowledgement_is_an_error,
    both another_version_is_an_error_that_names_both,
    both damaged_descriptors_are_an_error,
    both a_second_hand_over_at_the_same_time_is_an_error,
    both a_queue_that_is_not_taken_over_is_an_error,
    both a_close_during_a_failed_hand_over_happens_afterwards,
    both a_hand_over_waits_no_longer_for_verdicts_than_a_close,
    both a_queue_that_is_dropped_during_a_hand_over_goes_to_the_successor,
    both a_successor_that_drops_the_queue_early_closes_it,
    one without_the_capability_there_is_no_hand_over,
    one the_queue_of_a_simulated_kernel_stays_in_its_process,
];

/// The queue works: packets that wait and new ones are delivered.
async fn goes_on(queue: &mut Queue, traffic: &Traffic, waiting: std::ops::Range<u32>) {
    let new = waiting.end..waiting.end + 10;
    traffic.send(new.clone());
    for _ in waiting.clone().chain(new.clone()) {
        next(queue).await.accept().submit().unwrap();
    }
    traffic.expect(waiting.chain(new)).await;
    assert_eq!((queue.stats().lost.packets, queue.stats().sent.gone_at_least), (0, 0));
}

async fn a_handover_that_is_dropped_lets_the_queue_go_on() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    for round in 0..3 {
        let base = round * 20;
        traffic.send(base..base + 10);
        let handover = soon("the hand-over", queue.hand_over(ENOUGH)).await.unwrap();
        assert!(queue.recv().now_or_never().is_none());
        drop(handover);
        goes_on(&mut queue, &traffic, base..base + 10).await;
    }
}

async fn a_successor_that_never_accepts_changes_nothing() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    for received in [false, true] {
        let base = 20 * u32::from(received);
        let (here, there) = connection();
        traffic.send(base..base + 10);
        let takeover = async move {
            if received { Some(Takeover::receive(there).await.unwrap()) } else { std::future::pending().await }
        };
        let handover = queue.hand_over(ENOUGH).await.unwrap();
        let mut takeover = tokio::spawn(takeover);
        let error = soon("the error", handover.send(here, Duration::from_millis(20))).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        goes_on(&mut queue, &traffic, base..base + 10).await;
        if received {
            drop((&mut takeover).await.unwrap());
        }
        takeover.abort();
        assert!(account(0).is_some());
    }
}

async fn a_successor_that_accepts_too_late_gets_an_error() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    let (here, there) = connection();
    traffic.send(0..10);
    let handover = queue.hand_over(ENOUGH).await.unwrap();
    let (sent, takeover) = tokio::join!(handover.send(here, Duration::from_millis(20)), Takeover::receive(there));
    assert_eq!(sent.unwrap_err().kind(), ErrorKind::TimedOut);
    let mut takeover = takeover.unwrap();
    let mut late = Queue::builder(0).take_over(&mut takeover).unwrap();
    assert!(late.recv().now_or_never().is_none());
    let error = soon("the error", takeover.accept()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(error.to_string().contains("keeps the queue"), "{error}");
    assert!(soon("the end of the stream", late.recv()).await.is_none());
    drop(late);
    goes_on(&mut queue, &traffic, 0..10).await;
}

async fn a_successor_that_disappears_changes_nothing() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    for (round, stage) in ["connected", "received", "taken over"].into_iter().enumerate() {
        let base = 20 * round as u32;
        let (here, there) = connection();
        traffic.send(base..base + 10);
        let handover = queue.hand_over(ENOUGH).await.unwrap();
        let disappears = async {
            if stage == "connected" {
                return drop(there);
            }
            let mut takeover = Takeover::receive(there).await.unwrap();
            if stage == "taken over" {
                drop(Queue::builder(0).take_over(&mut takeover).unwrap());
            }
        };
        let (sent, ()) = tokio::join!(handover.send(here, ENOUGH), disappears);
        let error = sent.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Disconnected, "{stage}: {error}");
        goes_on(&mut queue, &traffic, base..base + 10).await;
    }
}

async fn a_cancelled_hand_over_changes_nothing() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    // While verdicts are owed.
    let held = hold(&mut queue, &traffic, 0..5).await;
    traffic.send(5..10);
    assert!(queue.hand_over(ENOUGH).now_or_never().is_none());
    held.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    traffic.expect(0..5).await;
    goes_on(&mut queue, &traffic, 5..10).await;
    // While the successor is awaited.
    let (here, there) = connection();
    traffic.send(20..30);
    let handover = queue.hand_over(ENOUGH).await.unwrap();
    assert!(handover.send(here, ENOUGH).now_or_never().is_none());
    let late = soon("the error", take_over(there, Queue::builder(0))).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::TimedOut);
    goes_on(&mut queue, &traffic, 20..30).await;
}

async fn a_predecessor_that_disappears_leaves_the_queue_to_the_successor() {
    let (queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    traffic.send(0..10);
    let sink = queue.sink();
    let handover = queue.hand_over(ENOUGH).await.unwrap();
    // What a process that is killed leaves: the message, and no connection. (A `Handover` takes the
    // queue back when it is dropped, so this one is kept.)
    let descriptors = handover.descriptors().unwrap();
    let (here, there) = connection();
    send(&here, &header(1), &descriptors.iter().map(AsFd::as_fd).collect::<Vec<_>>());
    drop((here, descriptors));
    let mut successor = soon("the takeover", take_over(there, Queue::builder(0))).await.unwrap();
    handover.release();
    drop((queue, sink));
    goes_on(&mut successor, &traffic, 0..10).await;
}

async fn a_predecessor_that_sends_nothing_is_an_error() {
    for sent in [0, 1, 19] {
        let (mut here, there) = connection();
        here.write_all(&header(1)[..sent]).await.unwrap();
        drop(here);
        let error = soon("the error", Takeover::receive(there)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Disconnected, "{sent}: {error}");
    }
}

async fn garbage_instead_of_a_hand_over_is_an_error() {
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"t", &[0; 100], &[0xff; 4096], b"tokio-nfqueue\0hO\x01\0\0\0"] {
        let (mut here, there) = connection();
        here.write_all(garbage).await.unwrap();
        drop(here);
        let error = soon("the error", Takeover::receive(there)).await.unwrap_err();
        let expected = if garbage == b"t" { ErrorKind::Disconnected } else { ErrorKind::Malformed };
        assert_eq!(error.kind(), expected, "{garbage:?}: {error}");
    }
}

async fn garbage_instead_of_an_acknowledgement_is_an_error() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    let (here, mut there) = connection();
    traffic.send(0..10);
    let handover = queue.hand_over(ENOUGH).await.unwrap();
    there.write_all(b"hello").await.unwrap();
    let error = soon("the error", handover.send(here, ENOUGH)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
    let mut rest = Vec::new();
    let _ = there.read_to_end(&mut rest).await;
    assert!(rest.ends_with(b"B"), "it is told that the queue was taken back");
    goes_on(&mut queue, &traffic, 0..10).await;
}

async fn another_version_is_an_error_that_names_both() {
    let (mut here, there) = connection();
    here.write_all(&header(7)).await.unwrap();
    let named = |error: Error| {
        assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
        let text = error.to_string();
        assert!(text.contains('7') && text.contains('1'), "{text}");
    };
    named(soon("the error", Takeover::receive(there)).await.unwrap_err());
    let mut memory = memory(&header(7));
    named(Takeover::from_descriptors([memory.try_clone().unwrap().into()]).unwrap_err());
    memory.write_all(&[0; 100]).unwrap();
    named(Takeover::from_descriptors([memory.into()]).unwrap_err());
}

async fn damaged_descriptors_are_an_error() {
    let (queue, _divert) = start(Queue::builder(0));
    let handover = queue.hand_over(ENOUGH).await.unwrap();
    let descriptors = handover.descriptors().unwrap();
    let malformed = |error: Error, what: &str| assert_eq!(error.kind(), ErrorKind::Malformed, "{what}: {error}");

    malformed(Takeover::from_descriptors([]).unwrap_err(), "nothing");
    let copies = || descriptors.iter().map(|fd| fd.try_clone().unwrap());
    malformed(Takeover::from_descriptors(copies().skip(1)).unwrap_err(), "no record");
    malformed(Takeover::from_descriptors(copies().take(1)).unwrap_err(), "no socket");
    for other in ["/dev/null", "/dev/zero", "/proc/self/status", "/proc/version"] {
        malformed(Takeover::from_descriptors([File::open(other).unwrap().into()]).unwrap_err(), other);
    }
    malformed(Takeover::from_descriptors([memory(&header(1)).into()]).unwrap_err(), "a header");
    // Another descriptor beside the right ones does no harm, and the kernel's table may be missing.
    let files = ["/dev/null", "/dev/zero", "/proc/self/status"].map(|path| File::open(path).unwrap().into());
    let others = files.into_iter().chain([UnixStream::pair().unwrap().0.into_std().unwrap().into()]);
    let mut takeover = Takeover::from_descriptors(copies().take(2).chain(others)).unwrap();
    let _never_accepted = Queue::builder(0).take_over(&mut takeover).unwrap();
}

async fn a_second_hand_over_at_the_same_time_is_an_error() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    traffic.send(0..10);
    let first = queue.hand_over(ENOUGH).await.unwrap();
    let error = queue.hand_over(ENOUGH).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(queue.recv().now_or_never().is_none(), "the first one holds");
    drop(first);
    goes_on(&mut queue, &traffic, 0..10).await;
}

async fn a_queue_that_is_not_taken_over_is_an_error() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    traffic.send(0..10);
    let (here, there) = connection();
    let handover = queue.hand_over(ENOUGH).await.unwrap();
    let wrong = async {
        let mut takeover = Takeover::receive(there).await.unwrap();
        let error = Queue::builder(1).take_over(&mut takeover).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        let error = Queue::builder(0).receive_buffer(0).take_over(&mut takeover).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        takeover.accept().await.unwrap_err()
    };
    let (sent, error) = tokio::join!(handover.send(here, ENOUGH), wrong);
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(error.to_string().contains("queue 0"), "{error}");
    assert_eq!(sent.unwrap_err().kind(), ErrorKind::Disconnected);
    goes_on(&mut queue, &traffic, 0..10).await;
}

async fn a_close_during_a_failed_hand_over_happens_afterwards() {
    for how in ["close", "drop"] {
        let (queue, divert) = start(Queue::builder(0).on_unanswered(Action::Accept));
        let traffic = Traffic::new(100);
        traffic.send(0..10);
        queued(0, 10);
        let sink = queue.sink();
        let handover = sink.hand_over(ENOUGH).await.unwrap();
        let closing = match how {
            "close" => Some(tokio::spawn(queue.close())),
            _ => {
                drop(queue);
                None
            }
        };
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert!(account(0).is_some());
        drop(handover);
        if let Some(closing) = closing {
            soon("the shutdown", closing).await.unwrap().unwrap();
        }
        freed(0).await;
        traffic.expect(0..10).await;
        drop_now(divert);
    }
}

async fn a_hand_over_waits_no_longer_for_verdicts_than_a_close() {
    let (mut queue, _divert) = start(Queue::builder(0).close_timeout(Duration::from_millis(20)));
    let traffic = Traffic::new(100);
    let _held = hold(&mut queue, &traffic, 0..5).await;
    let sink = queue.sink();
    let mut waiting = Box::pin(sink.hand_over(Duration::from_secs(3600)));
    assert!((&mut waiting).now_or_never().is_none());
    let closing = tokio::spawn(queue.close_with(Action::Accept));
    let handover = soon("the hand-over", waiting).await.unwrap();
    assert_eq!(handover.unanswered(), 5);
    traffic.expect(0..5).await;
    drop(handover);
    soon("the shutdown", closing).await.unwrap().unwrap();
    freed(0).await;
}

async fn a_queue_that_is_dropped_during_a_hand_over_goes_to_the_successor() {
    let (queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    traffic.send(0..10);
    let handover = queue.hand_over(ENOUGH).await.unwrap();
    let sink = queue.sink();
    let closing = tokio::spawn(queue.close());
    eventually("the shutdown waits", || !closing.is_finished()).await;
    let (here, there) = connection();
    let (sent, successor) = tokio::join!(handover.send(here, ENOUGH), take_over(there, Queue::builder(0)));
    sent.unwrap();
    soon("the end", closing).await.unwrap().unwrap();
    drop(sink);
    goes_on(&mut successor.unwrap(), &traffic, 0..10).await;
}

async fn a_successor_that_drops_the_queue_early_closes_it() {
    let (queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(100);
    traffic.send(0..10);
    let handover = queue.hand_over(ENOUGH).await.unwrap();
    let (here, there) = connection();
    let (sent, ()) = tokio::join!(handover.send(here, ENOUGH), async {
        let mut takeover = Takeover::receive(there).await.unwrap();
        drop(Queue::builder(0).on_unanswered(Action::Accept).take_over(&mut takeover).unwrap());
        takeover.accept().await.unwrap();
    });
    sent.unwrap();
    freed(0).await;
    traffic.expect(0..10).await;
}

async fn without_the_capability_there_is_no_hand_over() {
    // So that this thread sends its verdicts, and not the timer thread, which has the capability.
    let (mut queue, _divert) = start(Queue::builder(0).flush_policy(FlushPolicy::immediate()));
    let traffic = Traffic::new(100);
    traffic.send(0..10);
    let (here, there) = connection();
    let handover = queue.hand_over(ENOUGH).await.unwrap();
    let (sent, ()) = tokio::join!(handover.send(here, ENOUGH), async {
        let mut takeover = Takeover::receive(there).await.unwrap();
        let error = without_net_admin(|| Queue::builder(0).take_over(&mut takeover)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotPermitted, "{error}");
        assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
    });
    assert_eq!(sent.unwrap_err().kind(), ErrorKind::Disconnected);
    goes_on(&mut queue, &traffic, 0..10).await;

    // Verdicts that cannot be sent are not left to the successor, which does not know them.
    let held = hold(&mut queue, &traffic, 20..25).await;
    let begun = Instant::now();
    let refused = without_net_admin(|| {
        held.into_iter().for_each(|packet| packet.accept().submit().unwrap());
        queue.hand_over(Duration::from_millis(10)).now_or_never()
    });
    if begun.elapsed() > Duration::from_millis(300) {
        // The timer thread may have sent them.
        return;
    }
    if let Some(result) = refused {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::TimedOut);
    }
    goes_on(&mut queue, &traffic, 40..40).await;
}

async fn the_queue_of_a_simulated_kernel_stays_in_its_process() {
    let (_kernel, queue) = tokio_nfqueue::simulated::queue(Queue::builder(0)).unwrap();
    let error = queue.hand_over(ENOUGH).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(!queue.is_closed());
}

/// The beginning of a message in the format of this version.
fn header(version: u8) -> [u8; 20] {
    let mut header = *b"tokio-nfqueue\0ho\0\0\0\0";
    header[16] = version;
    header
}

fn memory(content: &[u8]) -> File {
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(content).unwrap();
    file
}

fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let message = SendAncillaryMessage::ScmRights(descriptors);
    let mut space = vec![MaybeUninit::uninit(); message.size()];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
    sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty()).unwrap();
}
