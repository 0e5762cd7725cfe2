//! A packet that arrives between the call that finds the socket empty and the time at which Tokio
//! learns of that.

use std::{
    os::unix::net::UnixDatagram,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use super::*;

/// A kernel to which a packet comes as soon as its socket has been found empty.
#[derive(Debug)]
struct Late {
    kernel: Kernel,
    packet: Mutex<Option<TestPacket>>,
    /// Becomes readable after the socket, so that the runtime learns of both or of the socket.
    mark: UnixDatagram,
    noticed: AtomicBool,
}

impl MemoryKernel for Late {
    fn receive_two(&self, port: u32, buffers: [&mut BytesMut; 2]) -> Result<(usize, bool), Errno> {
        let received = self.kernel.0.receive_two(port, buffers)?;
        if let ((1, true), Some(packet)) = (received, self.packet.lock().unwrap().take()) {
            self.kernel.send(packet);
            self.mark.send(b"mark").unwrap();
            let start = Instant::now();
            while !self.noticed.load(Ordering::SeqCst) && start.elapsed() < Duration::from_secs(10) {
                thread::yield_now();
            }
        }
        Ok(received)
    }

    fn open(&self, signal: Signal, flow_marks: Option<FlowMarks>) -> u32 {
        self.kernel.0.open(signal, flow_marks)
    }

    fn close(&self, port: u32) {
        self.kernel.0.close(port);
    }

    fn send(&self, port: u32, datagram: &[u8]) -> Result<(), Errno> {
        MemoryKernel::send(&*self.kernel.0, port, datagram)
    }

    fn wake(&self) {
        self.kernel.0.wake();
    }

    fn receive(&self, port: u32, buffer: &mut BytesMut) -> Result<(), Errno> {
        self.kernel.0.receive(port, buffer)
    }

    fn set_receive_buffer(&self, port: u32, bytes: usize) -> usize {
        self.kernel.0.set_receive_buffer(port, bytes)
    }

    fn is_capable(&self) -> bool {
        self.kernel.0.is_capable()
    }

    fn was_capable(&self) -> bool {
        self.kernel.0.was_capable()
    }

    fn interface_name(&self, index: u32) -> Result<String, Errno> {
        self.kernel.0.interface_name(index)
    }

    fn stats(&self, queue: u16) -> Option<KernelStats> {
        MemoryKernel::stats(&*self.kernel.0, queue)
    }

    fn first_id(&self) -> u32 {
        self.kernel.0.first_id()
    }

    fn clock(&self) -> Arc<MemoryClock> {
        MemoryKernel::clock(&*self.kernel.0)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_packet_that_comes_after_the_socket_was_found_empty_wakes_the_task() {
    let packet = || {
        let [from, to] = ["10.0.0.1:4000", "10.0.0.2:53"].map(|address| address.parse().unwrap());
        TestPacket::udp(from, to, b"late")
    };
    let kernel = Kernel::new();
    let (mark, watched) = UnixDatagram::pair().unwrap();
    watched.set_nonblocking(true).unwrap();
    let watched = tokio::net::UnixDatagram::from_std(watched).unwrap();
    let late =
        Arc::new(Late { kernel: kernel.clone(), packet: Mutex::new(None), mark, noticed: AtomicBool::new(false) });
    let namespace = NetworkNamespace::in_memory(Arc::clone(&late) as Arc<dyn MemoryKernel>);
    let mut queue = Queue::builder(0).namespace(namespace).bind().await.unwrap();
    *late.packet.lock().unwrap() = Some(packet());
    // Workers that have something to do look for events in between.
    let busy = [(); 4].map(|()| {
        tokio::spawn(async {
            loop {
                tokio::task::yield_now().await;
            }
        })
    });
    tokio::spawn({
        let late = Arc::clone(&late);
        async move {
            watched.readable().await.unwrap();
            late.noticed.store(true, Ordering::SeqCst);
        }
    });
    // A task that polls nothing else, so that only the socket can wake it.
    let received = tokio::spawn(async move {
        // After a verdict the timer would look for replies.
        let held = [queue.recv().await.unwrap().unwrap(), queue.recv().await.unwrap().unwrap()];
        drop(held);
        queue
    });
    kernel.send(packet());
    let received = tokio::time::timeout(Duration::from_secs(10), received).await;
    busy.iter().for_each(|task| task.abort());
    received.expect("the task is woken").unwrap().close().await.unwrap();
    assert!(late.noticed.load(Ordering::SeqCst), "the runtime has looked for events");
}
