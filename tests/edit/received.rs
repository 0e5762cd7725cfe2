//! Edits of packets that a queue has received, from a simulated kernel.

use tokio::runtime::{Builder, Runtime};
use tokio_nfqueue::{
    Error, Hook, Queue,
    edit::Edit,
    simulated::{self, Kernel, TestPacket},
};

pub(crate) struct Received {
    runtime: Runtime,
    kernel: Kernel,
    queue: Queue,
}

impl Received {
    pub(crate) fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let (kernel, queue) = runtime.block_on(async { simulated::queue(Queue::builder(0)) }).unwrap();
        Self { runtime, kernel, queue }
    }

    /// What [`Packet::edit`](tokio_nfqueue::Packet::edit) says of a packet that this host sends.
    pub(crate) fn edit(&mut self, packet: TestPacket) -> Result<Edit, Error> {
        let _sent = self.kernel.send(packet.hook(Hook::Output));
        let packet = self.runtime.block_on(self.queue.recv()).expect("the queue is open").expect("a packet");
        packet.edit()
    }

    /// Whether the packet's checksum counts as incomplete: such a packet can be edited, even though
    /// the kernel says that its checksum is not ready.
    pub(crate) fn is_incomplete(&mut self, packet: &[u8]) -> bool {
        self.edit(TestPacket::raw(packet.to_vec()).checksum_unfinished()).is_ok()
    }
}
