//! The hooks of connection tracking and of defragmentation.

use rustix::io::Errno;

use super::{
    checked::KernelRule,
    encoder::{Encoding, QueueMethod},
    failure::subject,
    nft::{Batch, Creation, Ownership, Subject},
    socket::{Connection, Outcome},
};

/// Which hooks beside the base chains the table keeps registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Hooks {
    /// Connection tracking, and with it defragmentation.
    pub(super) tracking: bool,
    /// Only defragmentation.
    pub(super) defragment: bool,
    /// Whether a rule may switch defragmentation on.
    pub(super) allowed: bool,
}

impl Hooks {
    /// With what these rules need in addition.
    pub(super) fn needed(rules: &[KernelRule<'_>], connection: &mut Connection, present: Self) -> Self {
        let tracking = present.tracking || rules.iter().any(KernelRule::tracks);
        let hooks = Self { tracking, ..present };
        if hooks.allowed && rules.iter().any(KernelRule::needs_reassembly) {
            return hooks.with_reassembly(connection);
        }
        hooks
    }

    /// What a table with `present` must add: connection tracking, defragmentation.
    pub(super) fn beyond(self, present: Self) -> (bool, bool) {
        (self.tracking && !present.tracking, self.defragment && !present.defragment)
    }

    pub(super) fn reassembles(self) -> bool {
        self.tracking || self.defragment
    }

    pub(super) fn with_reassembly(self, connection: &mut Connection) -> Self {
        if self.reassembles() {
            self
        } else if has_expression(connection, "tproxy") {
            Self { defragment: true, ..self }
        } else {
            Self { tracking: has_expression(connection, "ct"), ..self }
        }
    }
}

/// Whether the kernel has an expression. A rule with an incomplete one is refused, but not with
/// `ENOENT` if the kernel has it.
fn has_expression(connection: &mut Connection, name: &str) -> bool {
    let table = format!("tokio_nfqueue_{}_probe", connection.port());
    let mut batch = Batch::new(&table, Encoding { method: QueueMethod::Expression, trial: true });
    batch.create_table(Creation { ownership: Ownership::Process, replaces: false });
    batch.probe(name);
    let refusal = connection.transact(&batch.commands, Outcome::Abort).err();
    let refused = refusal.filter(|refusal| matches!(subject(refusal, &batch.commands), Some(Subject::Hooks(_))));
    refused.is_some_and(|refusal| refusal.error.raw_os_error() == Some(Errno::INVAL.raw_os_error()))
}
