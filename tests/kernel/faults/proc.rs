//! A process without `/proc`, as in a chroot.

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use tokio_nfqueue::{Action, Advice, ErrorKind, NetworkNamespace, Queue};

use super::process::{in_a_process, in_runtime};
use crate::common::{Traffic, divert, give_up_capabilities, hold, soon, udp_in};

tests![
    sync without_proc_a_queue_works_and_errors_name_the_reason,
    sync without_proc_a_missing_capability_is_named,
];

fn without_proc_a_queue_works_and_errors_name_the_reason() {
    in_a_process("proc");
}

fn without_proc_a_missing_capability_is_named() {
    in_a_process("proc, no capability");
}

/// Hides `/proc` from this process.
fn hide() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    // An ordinary user cannot unmount it.
    mount(Some("none"), "/proc", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    assert!(!std::fs::exists("/proc/self").unwrap());
}

pub(super) fn hidden() {
    hide();
    in_runtime(async {
        let _divert = divert([udp_in().to_queue(0)]);
        let traffic = Traffic::new(10);
        let mut queue = Queue::builder(0).on_unanswered(Action::Accept).bind().await.unwrap();
        for packet in hold(&mut queue, &traffic, 0..10).await {
            packet.accept().submit().unwrap();
        }
        traffic.expect(0..10).await;

        let error = queue.sink().kernel_stats().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("/proc is not mounted"), "{error}");
        let advice = queue.sink().advice();
        assert!(matches!(advice[..], [Advice::KernelCountersUnreadable { .. }]), "{advice:?}");
        let text = advice[0].to_string();
        assert!(text.contains("mount") && !text.contains("CAP_DAC_READ_SEARCH"), "{text}");

        let error = Queue::builder(0).bind().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyBound, "{error}");
        let error = NetworkNamespace::current().unwrap_err();
        assert!(error.to_string().contains("/proc is not mounted"), "{error}");
        soon("the shutdown", queue.close()).await.unwrap();
    });
}

pub(super) fn without_capability() {
    hide();
    give_up_capabilities();
    in_runtime(async {
        let error = Queue::builder(0).bind().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotPermitted, "{error}");
        assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
    });
}
