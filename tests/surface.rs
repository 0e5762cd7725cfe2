//! The public types as their users combine them.

use std::fmt::Debug;

use tokio_nfqueue::{
    Action, Advice, Changes, Confirm, DetachedPacket, Error, ErrorKind, Family, FlowMarks, FlushPolicy, Hook,
    NetworkNamespace, Packet, PacketId, PacketStream, Queue, QueueBuilder, QueueNumbers, Reconfigure, Refusals, Stats,
    TryRecvError, Verdict, VerdictSink, Vlan,
    flush::{FlushContext, FlushDecision, FlushReason},
    handover::{Handover, Takeover},
    inject::{Injector, InjectorBuilder, TrySendError},
    simulated,
    stats::{self, KernelStats},
};

fn send<T: Send + Unpin + 'static>() {}
fn sync<T: Sync>() {}
fn clone<T: Clone>() {}
fn debug<T: Debug>() {}

macro_rules! assert_traits {
    ($check:ident: $($ty:ty),* $(,)?) => { $($check::<$ty>();)* };
}

#[test]
fn every_type_can_be_sent_between_threads() {
    assert_traits!(send: Action, Advice, Changes<'static>, Confirm, DetachedPacket, Error, ErrorKind, Family,
        FlowMarks, FlushContext, FlushDecision, FlushPolicy, FlushReason, Handover, Hook, Injector, InjectorBuilder,
        KernelStats, NetworkNamespace, Packet, PacketId, PacketStream, Queue, QueueBuilder, QueueNumbers, Reconfigure, Refusals,
        Stats, Takeover, TryRecvError, TrySendError, Verdict, VerdictSink, Vlan, stats::Decided, stats::Fill, stats::Held, stats::Lost,
        stats::QueueLimits, stats::Received, stats::Sent);
    assert_traits!(send: tokio_nfqueue::conntrack::Conntrack, tokio_nfqueue::conntrack::ConnectionState, tokio_nfqueue::conntrack::Direction, tokio_nfqueue::conntrack::ConntrackStatus,
        tokio_nfqueue::conntrack::FlowTuple, tokio_nfqueue::conntrack::Expectation);
    assert_traits!(send: tokio_nfqueue::divert::ConnectionState, tokio_nfqueue::divert::Direction, tokio_nfqueue::Divert,
        tokio_nfqueue::divert::DivertBuilder, tokio_nfqueue::divert::DivertSet, tokio_nfqueue::divert::Match, tokio_nfqueue::divert::NamedSet,
        tokio_nfqueue::divert::PacketField, tokio_nfqueue::divert::PortRange, tokio_nfqueue::divert::Priority, tokio_nfqueue::Protocol,
        tokio_nfqueue::divert::Rate, tokio_nfqueue::Rule, tokio_nfqueue::divert::RuleCounter, tokio_nfqueue::divert::SetElement,
        tokio_nfqueue::divert::SetField, tokio_nfqueue::divert::SetValue, tokio_nfqueue::divert::FlowTuple, tokio_nfqueue::divert::TableFamily, tokio_nfqueue::divert::TcpFlags);
    assert_traits!(send: tokio_nfqueue::edit::Edit, tokio_nfqueue::edit::PacketView<'static>, tokio_nfqueue::edit::TcpFields,
        tokio_nfqueue::edit::Unreachable);
    assert_traits!(send: simulated::Cause, simulated::Connection, simulated::Kernel, simulated::Outcome,
        simulated::RawSocket, simulated::Sent, simulated::TestPacket);
}

/// A `FlushPolicy` and with it a `QueueBuilder` is not `Sync`: its closure need not be.
#[test]
fn what_tasks_share_is_sync() {
    assert_traits!(sync: Action, Advice, Changes<'static>, Confirm, DetachedPacket, Error, Handover,
        Injector, InjectorBuilder, KernelStats, NetworkNamespace, Packet, PacketId, PacketStream, Queue, QueueNumbers, Reconfigure, Refusals,
        Stats, Takeover, TryRecvError, TrySendError, Verdict, VerdictSink);
    assert_traits!(sync: tokio_nfqueue::Divert, tokio_nfqueue::divert::DivertSet, tokio_nfqueue::divert::Match,
        tokio_nfqueue::divert::NamedSet, tokio_nfqueue::Rule);
    assert_traits!(sync: tokio_nfqueue::edit::Edit, tokio_nfqueue::edit::PacketView<'static>);
    assert_traits!(sync: simulated::Cause, simulated::Connection, simulated::Kernel, simulated::Outcome,
        simulated::RawSocket, simulated::Sent, simulated::TestPacket);
}

#[test]
fn settings_and_sinks_can_be_cloned() {
    assert_traits!(clone: FlushPolicy, QueueNumbers, Injector, InjectorBuilder, NetworkNamespace, QueueBuilder, Reconfigure,
        VerdictSink, Stats);
    assert_traits!(clone: simulated::Connection, simulated::Kernel, simulated::Outcome, simulated::Sent,
        simulated::TestPacket);
    assert_traits!(clone: tokio_nfqueue::divert::DivertBuilder, tokio_nfqueue::divert::Match, tokio_nfqueue::divert::NamedSet,
        tokio_nfqueue::Rule, tokio_nfqueue::divert::SetElement);
}

#[test]
fn every_type_can_be_printed() {
    assert_traits!(debug: Changes<'static>, Confirm, DetachedPacket, Error, FlushPolicy,
        Handover, Injector, InjectorBuilder, NetworkNamespace, Packet, PacketStream, Queue, QueueBuilder, QueueNumbers, Reconfigure, Refusals, Stats,
        Takeover, TryRecvError, TrySendError, Verdict, VerdictSink);
    assert_traits!(debug: simulated::Connection, simulated::Kernel, simulated::Outcome, simulated::RawSocket, simulated::Sent,
        simulated::TestPacket);
}

/// The cause of an error is its source, and `Display` does not repeat it.
#[test]
fn the_cause_of_an_error_is_not_repeated() {
    let error = NetworkNamespace::open("/does/not/exist").unwrap_err();
    let source = std::error::Error::source(&error).expect("a cause").to_string();
    assert!(source.contains("No such file"), "{source}");
    assert!(!error.to_string().contains("No such file"), "{error}");
    assert_eq!(error.raw_os_error(), Some(2));
}

#[test]
fn one_line_can_have_the_cause() {
    let error = NetworkNamespace::open("/does/not/exist").unwrap_err();
    assert!(format!("{error:#}").contains("No such file"), "{error:#}");
    let failed = TryRecvError::Failed(error);
    let source = std::error::Error::source(&failed).expect("a cause").to_string();
    assert!(source.contains("No such file") && !failed.to_string().contains("No such file"), "{failed}: {source}");
}
