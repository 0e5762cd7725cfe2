//! Other programs of this host: tables with chains at the same hooks, and marks of their own.

use nfqueue_divert::Divert;
use tokio_nfqueue::{
    FlowMarks, Hook, Protocol, Rule,
    divert::{ConnectionState, Match},
};

use crate::common::Random;

/// A table of another program.
pub(crate) struct Stranger {
    pub(crate) what: String,
    /// It overwrites the marks of connections that are known.
    pub(super) overwrites: bool,
    _table: Divert,
}

/// Marks of programs, among them zapret, Mullvad and Calico, and marks that have some of the bits
/// of verdicts.
fn mark(random: &mut Random) -> u32 {
    let marks = FlowMarks::default();
    let of_verdicts = [marks.accepted(), marks.accepting(), marks.denied(), marks.begun_again()];
    loop {
        let low = marks.mask() & marks.mask().wrapping_neg();
        let mark = match random.below(6) {
            0 => 0x4000_0000,
            1 => 0x6d6f_6c65,
            2 => 0xffff_0000,
            3 => (random.below(8) as u32 * low) & marks.mask(),
            4 => (random.below(8) as u32 * low) & marks.mask() | 0x77,
            _ => 1 + random.below(0xffff) as u32,
        };
        if mark != 0 && !of_verdicts.contains(&(mark & marks.mask())) {
            return mark;
        }
    }
}

impl Stranger {
    /// Comes at a hook at which the queue's rules may be. `overwriting`: one that marks every
    /// packet's connection is allowed.
    pub(crate) fn new(random: &mut Random, number: u32, hooks: &[Hook], overwriting: bool) -> Self {
        let hook = hooks[random.below(hooks.len())];
        let priority = [-150, -1, 0, 0, 1, 20][random.below(6)];
        let builder = Divert::builder().table(format!("stranger_{number}"));
        let protocol = if random.one_in(2) { Protocol::Tcp } else { Protocol::Udp };
        let rule = || Rule::new(hook).priority(priority).protocol(protocol);
        let mark = mark(random);
        // Until the other side replies, all packets of a connection are new.
        let new = |rule: Rule| {
            rule.when(Match::connection_state([ConnectionState::New])).when(Match::connection_mark(0, u32::MAX))
        };
        let (what, overwrites, builder) = match random.below(if overwriting { 5 } else { 4 }) {
            0 | 1 => ("an empty chain".to_owned(), false, builder.chain(hook, Some(priority.into()))),
            2 => (
                format!("packet mark {mark:#x} for {protocol:?}"),
                false,
                builder.rule(rule().set_mark(mark, u32::MAX)),
            ),
            3 => (
                format!("connection mark {mark:#x} for new {protocol:?}"),
                false,
                builder.rule(new(rule()).set_connection_mark(mark, u32::MAX)),
            ),
            _ => (
                format!("connection mark {mark:#x} for all {protocol:?}"),
                true,
                builder.rule(rule().set_connection_mark(mark, u32::MAX)),
            ),
        };
        let table = builder.install().expect("install another program's table");
        Self { what: format!("{what} at {hook:?}, priority {priority}"), overwrites, _table: table }
    }
}
