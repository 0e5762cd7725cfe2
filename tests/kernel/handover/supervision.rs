//! A queue that dies says why, and what to do.

use std::fs::File;

use tokio_nfqueue::{Error, ErrorKind, NetworkNamespace, Queue, TryRecvError};

use crate::{
    common::{Traffic, account, descriptor_of, divert, hold, next, soon, start, udp_in},
    support,
};

tests![
    both a_broken_socket_ends_the_stream_with_a_reason,
    one a_broken_socket_is_an_error_of_try_recv,
    both a_queue_keeps_its_namespace_in_existence,
];

/// After this, every system call on the queue's socket fails with `ENOTSOCK`.
fn break_socket(queue: u16) {
    support::replace_descriptor(descriptor_of(queue), File::open("/dev/null").unwrap()).unwrap();
    assert_eq!(account(queue), None, "it was the only copy");
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
    let mut queue = Queue::builder(0).bind().unwrap();
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

async fn a_queue_keeps_its_namespace_in_existence() {
    let namespace = support::Namespace::new();
    let handle = namespace.run(|| NetworkNamespace::current().unwrap());
    let mut queue = Queue::builder(0).namespace(handle).bind().unwrap();
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
    assert_eq!(queue.kernel_stats().unwrap().last_id, 20);
    drop(divert);
    // Only the queue is left.
    assert_eq!(queue.kernel_stats().unwrap().last_id, 20);
    soon("the shutdown", queue.close()).await.unwrap();
}
