//! Errors of transactions.

use rustix::io::Errno;

use nfqueue_proto::types::{Error, ErrorKind};

use super::{
    checked::KernelRule,
    nft::{Command, Subject},
    socket::Refusal,
};

/// Whether the kernel lacks the expression or the target that sends packets to a queue. For a rule
/// with the action queue, `ENOENT` has no other cause.
pub(super) fn lacks_queue(refusal: &Refusal, commands: &[Command], rules: &[KernelRule<'_>]) -> bool {
    lacks_expression(refusal, commands, rules).is_some_and(KernelRule::queues)
}

/// The rule with an expression that the kernel lacks.
fn lacks_expression<'a, 'b>(
    refusal: &Refusal,
    commands: &[Command],
    rules: &'b [KernelRule<'a>],
) -> Option<&'b KernelRule<'a>> {
    let Some(Subject::Rule(index)) = subject(refusal, commands) else { return None };
    let lacking = errno(refusal) == Some(Errno::NOENT);
    // Of the rules of the kernel that a rule becomes, rather the one that sends to a queue.
    rules.iter().filter(|rule| lacking && rule.index == Some(*index)).max_by_key(|rule| rule.queues())
}

pub(super) fn subject<'a>(refusal: &Refusal, commands: &'a [Command]) -> Option<&'a Subject> {
    Some(&commands.get(refusal.command?)?.subject)
}

pub(super) fn errno(refusal: &Refusal) -> Option<Errno> {
    refusal.error.raw_os_error().map(Errno::from_raw_os_error)
}

/// Builds the error for a failed transaction, with the refused table, chain, set or rule and the
/// reason, if they are known.
pub(super) fn refused(operation: String, commands: &[Command], rules: &[KernelRule<'_>], refusal: Refusal) -> Error {
    let subject = subject(&refusal, commands);
    let operation = match subject {
        Some(Subject::Rule(index)) => format!("{operation}, rule {index}"),
        Some(Subject::Chain(name)) => format!("{operation}, chain {name}"),
        Some(Subject::Set(name)) => format!("{operation}, set {name}"),
        Some(Subject::Hooks(name)) => format!("{operation}, {name}"),
        Some(Subject::Flows) => format!("{operation}, flow marks"),
        Some(Subject::Flowtable | Subject::PastFlowtable) => format!("{operation}, offload"),
        Some(Subject::Table | Subject::Predecessor | Subject::Marker) | None => operation,
    };
    let lacking = lacks_expression(&refusal, commands, rules);
    let (kind, hint) = match (errno(&refusal), subject) {
        // The kernel checks the capability once for the whole batch, and replies to its first
        // message.
        (Some(Errno::PERM), None) => (
            ErrorKind::NotPermitted,
            Some("CAP_NET_ADMIN is needed in the user namespace that owns the network namespace"),
        ),
        (Some(Errno::PERM), Some(Subject::Table | Subject::Predecessor)) => {
            (ErrorKind::AlreadyExists, Some("another socket owns a table of this name"))
        }
        (Some(Errno::NOENT), Some(Subject::Marker)) => {
            (ErrorKind::AlreadyExists, Some("another process has replaced the table meanwhile"))
        }
        (Some(Errno::EXIST), Some(Subject::Table)) => (ErrorKind::AlreadyExists, Some("a table of this name exists")),
        // The kernel can create tables of this kind, so it refuses to adopt one of another kind.
        (Some(Errno::OPNOTSUPP), Some(Subject::Predecessor)) => {
            (ErrorKind::AlreadyExists, Some("a table of this name exists that `fail_closed` has not left behind"))
        }
        (Some(Errno::NFILE), Some(Subject::Set(_))) => (ErrorKind::InvalidInput, Some("the set is full")),
        (Some(Errno::OPNOTSUPP), None) => (ErrorKind::Unsupported, Some("the kernel has no nf_tables")),
        (Some(Errno::OPNOTSUPP | Errno::INVAL), Some(Subject::Table)) => {
            (ErrorKind::Unsupported, Some("tables with an owner need Linux 5.12 or later"))
        }
        (Some(Errno::NOENT | Errno::OPNOTSUPP), Some(Subject::Flowtable)) => (
            ErrorKind::Unsupported,
            Some("the kernel has no flowtables (NF_FLOW_TABLE_INET, NFT_FLOW_OFFLOAD), or an interface has gone"),
        ),
        // nft_payload_set_init
        (Some(Errno::PERM), Some(Subject::PastFlowtable)) => (
            ErrorKind::Unsupported,
            Some(
                "this kernel lets rules change packets only if the network namespace is of the initial user namespace",
            ),
        ),
        (Some(Errno::NOENT), Some(Subject::Hooks(_) | Subject::Flows)) => (ErrorKind::Unsupported, None),
        (Some(Errno::OPNOTSUPP | Errno::AFNOSUPPORT), _) => (ErrorKind::Unsupported, None),
        // nf_ct_netns_do_get
        (Some(Errno::PROTO), _) => (
            ErrorKind::Unsupported,
            Some("the kernel has no connection tracking for this family; for bridges it is NF_CONNTRACK_BRIDGE"),
        ),
        (Some(Errno::MSGSIZE), None) => (
            ErrorKind::InvalidInput,
            Some("too many rules for one transaction: the send buffer cannot be larger (net.core.wmem_max)"),
        ),
        (Some(Errno::AGAIN), None) => (ErrorKind::TimedOut, Some("the kernel did not reply")),
        _ => match lacking {
            Some(rule) if rule.queues() => (
                ErrorKind::Unsupported,
                Some("the kernel has neither NFT_QUEUE nor NFT_COMPAT with the NFQUEUE target"),
            ),
            Some(rule) if rule.rejects() => {
                (ErrorKind::Unsupported, Some("the kernel has no NFT_REJECT for this family"))
            }
            Some(_) => (ErrorKind::Unsupported, Some("the kernel lacks an expression that the rule needs")),
            None => (ErrorKind::Other, None),
        },
    };
    let error = Error::new(kind, operation).with_source(refusal.error);
    match (refusal.text, hint) {
        (Some(text), _) => error.with_detail(text),
        (None, Some(hint)) => error.with_detail(hint),
        (None, None) => error,
    }
}
