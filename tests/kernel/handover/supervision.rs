//! A queue that fails says why, and what to do.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio_nfqueue::{Error, ErrorKind, NetworkNamespace, Queue, TryRecvError};

use super::pass_on;
use crate::{
    common::{Traffic, account, descriptor_of, divert, eventually, hold, next, soon, start, udp_in},
    support,
};

tests![
    both a_broken_socket_ends_the_stream_with_a_reason,
    one a_broken_socket_is_an_error_of_try_recv,
    both readable_fd_reports_the_end_of_the_stream,
    both readable_fd_of_a_group_reports_the_end_of_the_stream,
    both a_queue_keeps_its_namespace_in_existence,
];

/// After this, every system call on the queue's socket fails with `ENOTSOCK`.
fn break_socket(queue: u16) {
    support::replace_descriptor(descriptor_of(queue), File::open("/dev/null").unwrap()).unwrap();
    support::wait_until("the only copy is gone", || account(queue).is_none());
}

fn says_what_to_do(error: &Error) {
    assert_eq!(error.kind(), ErrorKind::Other, "{error}");
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NOTSOCK.raw_os_error()));
    assert!(error.to_string().contains("drop the queue and bind it again"), "{error}");
}

async fn a_broken_socket_ends_the_stream_with_a_reason() {
    let (mut queue, _divert) = start(Queue::builder(0));
    let traffic = Traffic::new(20);
    let held = hold(&mut queue, &traffic, 0..5).await;
    break_socket(0);
    // The stream waits for packets, which will not come. The verdicts find out.
    let waiting = tokio::spawn(async move {
        let error = queue.recv().await.expect("an error").expect_err("no packet");
        assert!(queue.recv().await.is_none(), "it is the last item");
        (error, queue)
    });
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    held.into_iter().for_each(|packet| packet.accept().submit().unwrap());
    let (error, queue) = soon("the error", waiting).await.unwrap();
    says_what_to_do(&error);
    // What it says works.
    drop(queue);
    let mut queue = Queue::builder(0).bind().await.unwrap();
    traffic.send(5..10);
    for _ in 5..10 {
        next(&mut queue).await.accept().submit().unwrap();
    }
    traffic.expect(5..10).await;
}

async fn a_broken_socket_is_an_error_of_try_recv() {
    let (mut queue, _divert) = start(Queue::builder(0));
    break_socket(0);
    let Err(TryRecvError::Failed(error)) = queue.try_recv() else { panic!("no error") };
    says_what_to_do(&error);
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&Timespec::default())) == Ok(1)
}

async fn readable_fd_reports_the_end_of_the_stream() {
    for how in ["close", "hand over", "broken socket"] {
        for early in [true, false] {
            if how == "broken socket" && !early {
                // `epoll_ctl` refuses what is in the socket's place.
                continue;
            }
            let (mut queue, _divert) = start(Queue::builder(0));
            if early {
                assert!(!is_readable(queue.readable_fd().unwrap()));
            }
            let traffic = Traffic::new(5);
            let mut held = hold(&mut queue, &traffic, 0..5).await;
            assert!(matches!(queue.try_recv(), Err(TryRecvError::Empty)));
            let mut successor = None;
            match how {
                "close" => {
                    held.clear();
                    soon("the shutdown", queue.sink().close()).await.unwrap();
                }
                "hand over" => {
                    held.clear();
                    successor = Some(pass_on(&queue.sink(), Queue::builder(0)).await);
                }
                _ => {
                    break_socket(0);
                    // A verdict finds out.
                    held.drain(..).for_each(|packet| packet.accept().submit().unwrap());
                }
            }
            eventually(&format!("{how} is seen, {early}"), || is_readable(queue.readable_fd().unwrap())).await;
            match queue.try_recv() {
                Err(TryRecvError::Failed(error)) if how == "broken socket" => says_what_to_do(&error),
                Err(TryRecvError::Closed) if how != "broken socket" => {}
                other => panic!("{how}: {other:?}"),
            }
            drop(queue);
            if let Some(successor) = successor {
                soon("the shutdown", successor.close()).await.unwrap();
            }
        }
    }
}

async fn readable_fd_of_a_group_reports_the_end_of_the_stream() {
    let mut group = Queue::builder(0..=2).bind().await.unwrap();
    let fd = group.readable_fd().unwrap().try_clone_to_owned().unwrap();
    assert!(matches!(group.try_recv(), Err(TryRecvError::Empty)));
    assert!(!is_readable(fd.as_fd()));
    for (index, sink) in group.sink().each().enumerate() {
        soon("the shutdown", sink.close()).await.unwrap();
        assert!(is_readable(fd.as_fd()), "{index}");
        match group.try_recv() {
            Err(TryRecvError::Empty) if index < 2 => assert!(!is_readable(fd.as_fd()), "{index}"),
            Err(TryRecvError::Closed) if index == 2 => {}
            other => panic!("{index}: {other:?}"),
        }
    }
}

async fn a_queue_keeps_its_namespace_in_existence() {
    let namespace = support::Namespace::new();
    let handle = namespace.run(|| NetworkNamespace::current().unwrap());
    let mut queue = Queue::builder(0).namespace(handle).bind().await.unwrap();
    let runtime = tokio::runtime::Handle::current();
    let (divert, traffic) = namespace.run(|| {
        let _entered = runtime.enter();
        (divert([udp_in().to_queue(0)]), Traffic::new(20))
    });
    // No process and no name is left: what `ip netns delete` does after the processes have ended.
    drop(namespace);
    traffic.send(0..20);
    for _ in 0..20 {
        next(&mut queue).await.accept().submit().unwrap();
    }
    traffic.expect(0..20).await;
    drop(traffic);
    divert.remove_rules().unwrap();
    assert_eq!(queue.sink().kernel_stats().unwrap().last_id, 20);
    drop(divert);
    // Only the queue is left.
    assert_eq!(queue.sink().kernel_stats().unwrap().last_id, 20);
    soon("the shutdown", queue.close()).await.unwrap();
}
