//! What only a verdict message for a single packet can carry.

use bytes::Bytes;
use futures::channel::oneshot;

use crate::{
    state::Carried,
    types::{Error, Vlan},
    wire::verdict::Attachments,
};

#[derive(Debug, Default)]
pub(crate) struct VerdictExtras {
    pub(crate) payload: Option<Bytes>,
    pub(crate) vlan: Option<Vlan>,
    pub(crate) layer2_header: Option<Bytes>,
    /// Encoded.
    pub(crate) conntrack: Option<Vec<u8>>,
    /// Encoded.
    pub(crate) expectation: Option<Vec<u8>>,
    /// The kernel replies also on success.
    acknowledged: bool,
    /// Who waits for the reply. While the message is being sent, the machine has it.
    confirm: Option<oneshot::Sender<Result<(), Error>>>,
}

impl VerdictExtras {
    /// The waiter gets the kernel's reply.
    pub(super) fn confirm(&mut self, waiter: oneshot::Sender<Result<(), Error>>) {
        (self.acknowledged, self.confirm) = (true, Some(waiter));
    }
}

impl Carried for Box<VerdictExtras> {
    type Waiter = oneshot::Sender<Result<(), Error>>;

    fn attachments(&self) -> Attachments<'_> {
        Attachments {
            payload: self.payload.as_deref(),
            vlan: self.vlan,
            layer2_header: self.layer2_header.as_deref(),
            conntrack: self.conntrack.as_deref(),
            expectation: self.expectation.as_deref(),
        }
    }

    fn is_acknowledged(&self) -> bool {
        self.acknowledged
    }

    fn take_waiter(&mut self) -> Option<Self::Waiter> {
        self.confirm.take()
    }

    fn put_waiter(&mut self, waiter: Self::Waiter) {
        self.confirm = Some(waiter);
    }
}
