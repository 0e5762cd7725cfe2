//! Queues in other network namespaces.

use std::{fs, path::PathBuf};

use nfqueue_divert::Divert;
use tokio::runtime::Handle;
use tokio_nfqueue::{Error, ErrorKind, NetworkNamespace, Queue};

use crate::{
    common::{Traffic, account, divert, give_up_capabilities, hold, soon, start, udp_in},
    support,
};

tests![
    both a_queue_is_bound_in_another_namespace,
    one queues_of_one_number_in_two_namespaces_are_separate,
    one already_bound_is_detected_in_another_namespace,
    one a_namespace_opened_by_path_outlives_its_threads,
    one the_namespace_of_a_socket_is_where_it_was_opened,
    one of_socket_needs_the_capability,
    one of_socket_refuses_other_files,
    one invalid_names_are_refused,
    one files_that_are_not_network_namespaces_are_refused,
    one without_cap_sys_admin_the_error_names_only_this_capability,
    one the_error_of_an_unreadable_file_names_no_capability,
];

fn elsewhere() -> (support::Namespace, NetworkNamespace) {
    let namespace = support::Namespace::new();
    let handle = namespace.run(|| NetworkNamespace::current().unwrap());
    (namespace, handle)
}

fn present() -> PathBuf {
    fs::read_link("/proc/thread-self/ns/net").unwrap()
}

fn install_there(namespace: &NetworkNamespace) -> Result<Divert, Error> {
    namespace.run(|| Divert::builder().rule(udp_in().accept()).install())?
}

/// Rules and traffic in a namespace: sockets belong to the namespace in which they were opened.
fn traffic_in(namespace: &support::Namespace) -> (Divert, Traffic) {
    let runtime = Handle::current();
    namespace.run(|| {
        let _entered = runtime.enter();
        (divert([udp_in().to_queue(0)]), Traffic::new(100))
    })
}

async fn a_queue_is_bound_in_another_namespace() {
    let (namespace, handle) = elsewhere();
    let before = present();
    let mut queue = Queue::builder(0).namespace(handle).bind().await.unwrap();
    assert_eq!(present(), before, "this thread has not moved");
    assert_eq!(account(0), None, "nothing is bound here");
    assert!(namespace.run(|| account(0)).is_some());

    let (_divert, traffic) = traffic_in(&namespace);
    for packet in hold(&mut queue, &traffic, 0..20).await {
        let lo = packet.interface_in().unwrap();
        assert_eq!(packet.interface_name(lo).unwrap(), "lo");
        packet.accept().submit().unwrap();
    }
    traffic.expect(0..20).await;
    assert_eq!(queue.sink().kernel_stats().unwrap().last_id, 20);
    soon("the shutdown", queue.close()).await.unwrap();
    assert_eq!(namespace.run(|| account(0)), None);
}

async fn queues_of_one_number_in_two_namespaces_are_separate() {
    let (namespace, handle) = elsewhere();
    let (mut here, _divert_here) = start(Queue::builder(0));
    let mut there = Queue::builder(0).namespace(handle).bind().await.unwrap();
    let (_divert_there, traffic_there) = traffic_in(&namespace);
    let traffic_here = Traffic::new(100);
    let held_here = hold(&mut here, &traffic_here, 0..10).await;
    let held_there = hold(&mut there, &traffic_there, 10..20).await;
    // A verdict reaches its own queue through any sink.
    for packet in held_here {
        packet.accept().submit().unwrap();
    }
    for packet in held_there {
        packet.accept().submit().unwrap();
    }
    traffic_here.expect(0..10).await;
    traffic_there.expect(10..20).await;
    assert_eq!((here.stats().sent.gone_at_least, there.stats().sent.gone_at_least), (0, 0));
}

async fn already_bound_is_detected_in_another_namespace() {
    let (_namespace, handle) = elsewhere();
    let _first = Queue::builder(7).namespace(handle.clone()).bind().await.unwrap();
    let error = Queue::builder(7).namespace(handle).bind().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyBound, "{error}");
    Queue::builder(7).bind().await.unwrap();
}

async fn a_namespace_opened_by_path_outlives_its_threads() {
    let (ready, path) = std::sync::mpsc::channel();
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let thread = support::Namespace::new().spawn(move || {
        let id = rustix::thread::gettid();
        ready.send(format!("/proc/self/task/{}/ns/net", id.as_raw_nonzero())).unwrap();
        let _ = wait.recv();
    });
    let handle = NetworkNamespace::open(path.recv().unwrap()).unwrap();
    drop(done);
    thread.join().unwrap();
    let queue = Queue::builder(0).namespace(handle.clone()).bind().await.unwrap();
    assert_eq!(account(0), None);
    assert_eq!(Queue::builder(0).namespace(handle).bind().await.unwrap_err().kind(), ErrorKind::AlreadyBound);
    drop(queue);
}

async fn the_namespace_of_a_socket_is_where_it_was_opened() {
    let namespace = support::Namespace::new();
    let socket = namespace.run(|| support::udp("127.0.0.1:0"));
    let handle = NetworkNamespace::of_socket(&socket).unwrap();
    let before = present();
    let _queue = Queue::builder(0).namespace(handle).bind().await.unwrap();
    assert_eq!((present(), account(0)), (before, None));
    assert!(namespace.run(|| account(0)).is_some());

    let here = NetworkNamespace::of_socket(support::udp("127.0.0.1:0")).unwrap();
    let _queue = Queue::builder(0).namespace(here).bind().await.unwrap();
    assert!(account(0).is_some());
}

async fn of_socket_needs_the_capability() {
    let socket = support::udp("127.0.0.1:0");
    give_up_capabilities();
    let error = NetworkNamespace::of_socket(socket).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotPermitted, "{error}");
    let text = error.to_string();
    assert!(text.contains("CAP_NET_ADMIN is needed in") && !text.contains("CAP_SYS_ADMIN"), "{text}");
}

async fn of_socket_refuses_other_files() {
    for path in ["/dev/null", "/proc/self/ns/net", "/proc/self/status"] {
        let error = NetworkNamespace::of_socket(fs::File::open(path).unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert_eq!(error.to_string(), "find the network namespace of a socket: invalid value: not a socket");
    }
}

async fn invalid_names_are_refused() {
    for name in ["", ".", "..", "a/b", "/etc/passwd", "a\0b"] {
        assert_eq!(NetworkNamespace::named(name).unwrap_err().kind(), ErrorKind::InvalidInput, "{name:?}");
    }
    let error = NetworkNamespace::named("no namespace has this name").unwrap_err();
    assert_eq!((error.kind(), error.packet_id()), (ErrorKind::Other, None), "{error}");
    assert!(error.to_string().contains("no namespace has this name"), "{error}");
}

async fn files_that_are_not_network_namespaces_are_refused() {
    for path in ["/proc/self/status", "/proc/self/ns/uts"] {
        let handle = NetworkNamespace::open(path).unwrap();
        let before = present();
        for error in
            [Queue::builder(0).namespace(handle.clone()).bind().await.unwrap_err(), install_there(&handle).unwrap_err()]
        {
            assert_eq!(error.kind(), ErrorKind::Other, "{error}");
            assert!(error.to_string().contains("namespace"), "{error}");
        }
        assert_eq!((present(), account(0)), (before, None));
    }
}

async fn without_cap_sys_admin_the_error_names_only_this_capability() {
    let (_namespace, handle) = elsewhere();
    give_up_capabilities();
    for error in
        [Queue::builder(0).namespace(handle.clone()).bind().await.unwrap_err(), install_there(&handle).unwrap_err()]
    {
        assert_eq!(error.kind(), ErrorKind::NotPermitted, "{error}");
        let text = error.to_string();
        assert!(text.contains("CAP_SYS_ADMIN is needed in") && !text.contains("CAP_NET_ADMIN"), "{text}");
    }
}

async fn the_error_of_an_unreadable_file_names_no_capability() {
    give_up_capabilities();
    // Process 1 has capabilities, so its state may not be read.
    let error = NetworkNamespace::open("/proc/1/ns/net").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotPermitted, "{error}");
    assert!(!error.to_string().contains("CAP_"), "{error}");
}
