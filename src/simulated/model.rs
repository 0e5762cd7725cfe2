//! nfnetlink_queue and its sockets as a pure model: messages in, messages out, the time handed in.
//! The names of the kernel's functions stand beside what is taken from them.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use rustix::io::Errno;

use super::{
    connection::Connections,
    flows::{ChainVerdict, FlowPacket, Flows},
    message::{SMALL, charge, fields, linear_charge},
    outcome::{Cause, Outcome},
    packet::TestPacket,
    segment::segments,
    socket::Socket,
};
use crate::{
    io::kernel::KernelStats,
    types::{Action, FlowMarks, PacketId},
    wire::{
        MAX_PAYLOAD,
        config::{FLAG_CONNTRACK, FLAG_FAIL_OPEN, FLAG_GSO, FLAGS_ALL},
        kernel_side::{ConfigOrder, Order, Request, VerdictOrder, encode_packet, encode_reply, requests},
        verdict::{action_of, code},
    },
};

/// The kernel. `T` says whose packet it is.
#[derive(Debug)]
pub(super) struct Model<T> {
    sockets: BTreeMap<u32, Socket>,
    queues: BTreeMap<u16, Queue<T>>,
    connections: Connections,
    /// What a `Divert` with flow marks does.
    flows: Flows,
    next_port: u32,
    /// The id of the first packet of a queue that is bound later.
    pub(super) first_id: u32,
    /// Whether senders have CAP_NET_ADMIN.
    pub(super) capable: bool,
    /// What the smallest head of a message takes, in bytes.
    pub(super) small_head: usize,
    /// The queue that was bound first: that of packets that name none.
    default_queue: Option<u16>,
    /// The flags of queues that this kernel supports.
    pub(super) known_flags: u32,
    /// Errors that the next system calls return.
    pub(super) send_errors: VecDeque<Errno>,
    pub(super) receive_errors: VecDeque<Errno>,
    /// Packets that have left the kernel, to be taken by the caller.
    pub(super) finished: Vec<Finished<T>>,
    /// Sockets that have become readable, to be taken by the caller.
    pub(super) readable: Vec<u32>,
}

/// A packet that has left the kernel.
#[derive(Debug)]
pub(super) struct Finished<T> {
    pub(super) tag: T,
    /// Its index and number, if the packet was segmented.
    pub(super) segment: (u32, u32),
    pub(super) outcome: Outcome,
}

/// A packet in the kernel (`struct sk_buff`, `struct nf_queue_entry`).
#[derive(Debug)]
struct Skb<T> {
    tag: T,
    segment: (u32, u32),
    packet: TestPacket,
    /// The last verdict.
    action: Option<Action>,
    verdicts: u32,
    /// The last queue and id.
    place: Option<(u16, u32)>,
    replaced: bool,
    /// If rules with flow marks have seen it.
    flow: Option<FlowPacket>,
}

/// A bound queue (`struct nfqnl_instance`).
#[derive(Debug)]
struct Queue<T> {
    port: u32,
    copy_mode: u8,
    copy_range: u32,
    max_len: u32,
    flags: u32,
    /// By serial number, whose lower 32 bits are the id.
    entries: BTreeMap<u64, Box<Skb<T>>>,
    last: u64,
    dropped_queue: u32,
    dropped_socket: u32,
}

impl<T> Queue<T> {
    fn serial(&self, id: u32) -> u64 {
        self.last - u64::from((self.last as u32).wrapping_sub(id))
    }
}

/// Why a packet was not queued.
struct NotQueued {
    cause: Cause,
    accepted: bool,
}

impl<T> Default for Model<T> {
    fn default() -> Self {
        Self {
            sockets: BTreeMap::new(),
            queues: BTreeMap::new(),
            connections: Connections::default(),
            flows: Flows::default(),
            // As the kernel's, for all but a process's first socket: negative.
            next_port: 0x8000_0001,
            first_id: 1,
            capable: true,
            small_head: SMALL,
            default_queue: None,
            known_flags: FLAGS_ALL,
            send_errors: VecDeque::new(),
            receive_errors: VecDeque::new(),
            finished: Vec::new(),
            readable: Vec::new(),
        }
    }
}

// Sockets.

impl<T: Clone> Model<T> {
    /// Opens a socket, and returns its port id. `flow_marks`: its queues have flow marks.
    pub(super) fn open(&mut self, no_enobufs: bool, flow_marks: Option<FlowMarks>) -> u32 {
        let port = self.next_port;
        self.next_port = self.next_port.wrapping_add(1);
        self.sockets.insert(port, Socket::new(no_enobufs, flow_marks));
        port
    }

    /// Closes a socket: what is queued for it is dropped (`nfqnl_rcv_nl_event`).
    pub(super) fn close(&mut self, port: u32, now: Duration) {
        self.sockets.remove(&port);
        let queues: Vec<u16> = self.queues.iter().filter(|(_, queue)| queue.port == port).map(|(n, _)| *n).collect();
        for queue in queues {
            self.unbind(queue, now);
        }
    }

    /// Returns the resulting size.
    pub(super) fn set_receive_buffer(&mut self, port: u32, bytes: usize) -> usize {
        self.sockets.get_mut(&port).map_or(bytes, |socket| socket.set_receive_buffer(bytes))
    }

    pub(super) fn is_readable(&self, port: u32) -> bool {
        !self.receive_errors.is_empty() || self.sockets.get(&port).is_some_and(Socket::is_readable)
    }

    /// Appends a datagram to `buffer`, up to its capacity.
    pub(super) fn receive(&mut self, port: u32, buffer: &mut BytesMut) -> Result<(), Errno> {
        if let Some(errno) = self.receive_errors.pop_front() {
            return Err(errno);
        }
        self.sockets.get_mut(&port).ok_or(Errno::BADF)?.receive(buffer)
    }

    /// Whether the next attempt to receive fails, although there may be a datagram.
    pub(super) fn next_receive_fails(&self, port: u32) -> bool {
        !self.receive_errors.is_empty() || self.sockets.get(&port).is_none_or(Socket::has_overrun)
    }

    /// Whether the message found room.
    fn deliver(&mut self, port: u32, fill: impl FnOnce(&mut Vec<u8>), charge: usize) -> bool {
        let Some(socket) = self.sockets.get_mut(&port) else { return false };
        let was_empty = socket.is_empty();
        let found_room = socket.deliver(fill, charge);
        if found_room && was_empty {
            self.readable.push(port);
        }
        found_room
    }

    /// A datagram of any content reaches the socket of a queue.
    pub(super) fn forge(&mut self, number: u16, datagram: &[u8]) {
        if let Some(port) = self.queues.get(&number).map(|queue| queue.port) {
            self.deliver(
                port,
                |bytes| bytes.extend_from_slice(datagram),
                linear_charge(datagram.len(), self.small_head),
            );
        }
    }

    /// `netlink_sendmsg`, and everything that the kernel does within it.
    pub(super) fn send(&mut self, port: u32, datagram: &[u8], now: Duration) -> Result<(), Errno> {
        if let Some(errno) = self.send_errors.pop_front() {
            return Err(errno);
        }
        if datagram.len() > MAX_SEND {
            return Err(Errno::MSGSIZE);
        }
        for request in requests(datagram) {
            // nfnetlink_rcv
            if !self.capable {
                self.reply(port, Some(Errno::PERM), request);
                break;
            }
            // netlink_rcv_skb
            let result = if request.is_executed() { self.execute(port, request, now) } else { Ok(()) };
            if result.is_err() || request.wants_acknowledgement() {
                self.reply(port, result.err(), request);
            }
        }
        Ok(())
    }

    /// `netlink_ack`: a reply that finds no room is lost.
    fn reply(&mut self, port: u32, error: Option<Errno>, request: Request<'_>) {
        // struct nlmsghdr, error number, and what is echoed.
        let length = 20 + if error.is_some() { request.length() } else { 16 };
        self.deliver(port, |bytes| encode_reply(bytes, port, error, request), linear_charge(length, self.small_head));
    }

    fn execute(&mut self, port: u32, request: Request<'_>, now: Duration) -> Result<(), Errno> {
        match request.parse()? {
            None => Ok(()),
            Some((queue, Order::Verdict(order))) => self.verdict(port, queue, &order, now),
            Some((queue, Order::Batch(order))) => self.batch(port, queue, &order, now),
            Some((queue, Order::Config(order))) => self.configure(port, queue, &order, now),
        }
    }
}

// Configuration.

impl<T: Clone> Model<T> {
    /// `nfqnl_recv_config`
    fn configure(&mut self, port: u32, number: u16, order: &ConfigOrder, now: Duration) -> Result<(), Errno> {
        const BIND: u8 = 1;
        const UNBIND: u8 = 2;
        const PF_COMMANDS: [u8; 2] = [3, 4];
        if order.command.is_some_and(|command| PF_COMMANDS.contains(&command)) {
            return Ok(());
        }
        let flags = match (order.flags, order.mask) {
            (None, _) => None,
            (Some(_), None) => return Err(Errno::INVAL),
            (Some(flags), Some(mask)) if flags & !FLAGS_ALL != 0 || flags & mask & !self.known_flags != 0 => {
                return Err(Errno::OPNOTSUPP);
            }
            (Some(flags), Some(mask)) => Some((flags, mask)),
        };
        let owner = self.queues.get(&number).map(|queue| queue.port);
        if owner.is_some_and(|owner| owner != port) {
            return Err(Errno::PERM);
        }
        match (order.command, owner) {
            (None, _) => {}
            (Some(BIND), Some(_)) => return Err(Errno::BUSY),
            (Some(BIND), None) => self.bind(port, number),
            (Some(UNBIND), None) => return Err(Errno::NODEV),
            (Some(UNBIND), Some(_)) => {
                self.unbind(number, now);
                return Ok(());
            }
            (Some(_), _) => return Err(Errno::OPNOTSUPP),
        }
        let queue = self.queues.get_mut(&number).ok_or(Errno::NODEV)?;
        // nfqnl_set_mode: an unknown mode is ignored.
        match order.copy {
            Some((_, mode @ 0..=1)) => (queue.copy_mode, queue.copy_range) = (mode, 0),
            Some((range, 2)) => {
                let most = MAX_PAYLOAD as u32;
                (queue.copy_mode, queue.copy_range) = (2, if range == 0 { most } else { range.min(most) });
            }
            _ => {}
        }
        if let Some(max_len) = order.max_len {
            queue.max_len = max_len;
        }
        if let Some((flags, mask)) = flags {
            queue.flags = queue.flags & !mask | flags & mask;
        }
        Ok(())
    }

    fn bind(&mut self, port: u32, number: u16) {
        let queue = Queue {
            port,
            copy_mode: 0,
            copy_range: 0,
            max_len: 1024,
            flags: 0,
            entries: BTreeMap::new(),
            // Far from 0, so that serial numbers of earlier ids exist.
            last: (1 << 32) + u64::from(self.first_id) - 1,
            dropped_queue: 0,
            dropped_socket: 0,
        };
        self.queues.insert(number, queue);
        self.flows.bound(number, self.sockets.get(&port).and_then(|socket| socket.flow_marks));
        self.default_queue.get_or_insert(number);
    }

    fn unbind(&mut self, number: u16, now: Duration) {
        let Some(queue) = self.queues.remove(&number) else { return };
        for skb in queue.entries.into_values() {
            self.finish(*skb, Cause::Unbound, false, now);
        }
    }

    pub(super) fn stats(&self, number: u16) -> Option<KernelStats> {
        let queue = self.queues.get(&number)?;
        Some(KernelStats {
            port_id: queue.port,
            queued: queue.entries.len() as u32,
            copy_range: queue.copy_range,
            dropped_queue: queue.dropped_queue,
            dropped_socket: queue.dropped_socket,
            last_id: queue.last as u32,
        })
    }
}

// Packets.

impl<T: Clone> Model<T> {
    /// A packet reaches its rule.
    pub(super) fn packet(&mut self, tag: T, packet: TestPacket, now: Duration) {
        if let Some(connection) = packet.connection() {
            self.connections.add(connection, &packet.payload);
        }
        let skb =
            Skb { tag, segment: (0, 1), packet, action: None, verdicts: 0, place: None, replaced: false, flow: None };
        self.evaluate(Box::new(skb), now);
    }

    /// The rule that sends packets to a queue.
    fn evaluate(&mut self, mut skb: Box<Skb<T>>, now: Duration) {
        let packet = &mut skb.packet;
        let matches = packet.unless.is_none_or(|(value, mask)| packet.mark & mask != value & mask);
        let (queue, bypass) = (packet.queue.or(self.default_queue), packet.bypass);
        // Flow marks do not work in the bridge family.
        if let Some(codes) = queue.and_then(|queue| self.flows.codes(queue)).filter(|_| !packet.is_bridge()) {
            let flow = skb.flow.get_or_insert_with(|| self.flows.track(&packet.payload, packet.hook, codes, now));
            if let Some(verdict) = self.flows.before_queue(flow, &mut packet.priority, matches, now) {
                return self.leave(*skb, Cause::FlowVerdict, verdict, now);
            }
        }
        if !matches {
            return self.finish(*skb, Cause::Rule, true, now);
        }
        match queue {
            Some(queue) => self.enqueue(skb, queue, bypass, now),
            None => self.finish(*skb, Cause::NotBound, bypass, now),
        }
    }

    /// `nf_queue`, `nfqnl_enqueue_packet`
    fn enqueue(&mut self, skb: Box<Skb<T>>, number: u16, bypass: bool, now: Duration) {
        let Some(queue) = self.queues.get(&number) else {
            return self.finish(*skb, Cause::NotBound, bypass, now);
        };
        if queue.copy_mode == 0 {
            return self.finish(*skb, Cause::NotBound, false, now);
        }
        if skb.packet.segment_size == 0 || queue.flags & FLAG_GSO != 0 {
            if let Err((skb, NotQueued { cause, accepted })) = self.enqueue_one(skb, number, now) {
                self.finish(*skb, cause, accepted, now);
            }
            return;
        }
        let parts = segments(&skb.packet);
        let count = parts.len() as u32;
        let mut failed = None;
        for (index, packet) in (0..).zip(parts) {
            let part = Skb { tag: skb.tag.clone(), segment: (index, count), packet, place: None, ..*skb };
            // After a segment that is not queued, the rest is dropped.
            let result = match failed {
                None => self.enqueue_one(Box::new(part), number, now),
                Some(cause) => Err((Box::new(part), NotQueued { cause, accepted: false })),
            };
            if let Err((part, NotQueued { cause, accepted })) = result {
                failed = failed.or((!accepted).then_some(cause));
                self.finish(*part, cause, accepted, now);
            }
        }
    }

    /// `__nfqnl_enqueue_packet`
    fn enqueue_one(
        &mut self,
        mut skb: Box<Skb<T>>,
        number: u16,
        now: Duration,
    ) -> Result<(), (Box<Skb<T>>, NotQueued)> {
        /// NFQNL_HASH_MAX_SIZE
        const MOST: usize = 65_536;
        let Some(queue) = self.queues.get_mut(&number) else {
            return Err((skb, NotQueued { cause: Cause::NotBound, accepted: false }));
        };
        let fail_open = queue.flags & FLAG_FAIL_OPEN != 0;
        if queue.entries.len() >= (queue.max_len as usize).min(MOST) {
            if !fail_open {
                queue.dropped_queue = queue.dropped_queue.wrapping_add(1);
            }
            return Err((skb, NotQueued { cause: Cause::QueueFull, accepted: fail_open }));
        }
        queue.last += 1;
        let (serial, port) = (queue.last, queue.port);
        skb.place = Some((number, serial as u32));
        let (copy_mode, copy_range, flags) = (queue.copy_mode, queue.copy_range as usize, queue.flags);
        let connection = skb.packet.connection().filter(|_| flags & FLAG_CONNTRACK != 0);
        let connection = connection.map(|connection| (self.connections.encode(connection.id), connection.state));
        let copy_range = (copy_mode == 2).then_some(copy_range);
        // skb_csum_unnecessary, before nf_queue_checksum_help.
        let unverified = skb.packet.is_unverified();
        if copy_mode == 2 && flags & FLAG_GSO == 0 {
            skb.packet.finish_checksum();
        }
        let fields = fields(&skb.packet, unverified, serial as u32, copy_range, flags, connection.as_ref(), now);
        let charge = charge(fields.payload.len(), fields.connection.map_or(0, <[u8]>::len), self.small_head);
        if !self.deliver(port, |bytes| encode_packet(bytes, number, &fields), charge) {
            if let Some(queue) = self.queues.get_mut(&number).filter(|_| !fail_open) {
                queue.dropped_socket = queue.dropped_socket.wrapping_add(1);
            }
            return Err((skb, NotQueued { cause: Cause::ReceiveBufferFull, accepted: fail_open }));
        }
        if let Some(queue) = self.queues.get_mut(&number) {
            queue.entries.insert(serial, skb);
        }
        Ok(())
    }

    /// The packet leaves the queue, or is not queued. If it is accepted, the rules behind the queue
    /// come next.
    fn finish(&mut self, mut skb: Skb<T>, cause: Cause, accepted: bool, now: Duration) {
        let verdict = match &mut skb.flow {
            _ if !accepted => ChainVerdict::Dropped,
            None => ChainVerdict::Accepted,
            Some(flow) => {
                let stops = skb.action == Some(Action::Stop);
                self.flows.behind_queue(flow, &mut skb.packet.priority, stops, now)
            }
        };
        // What was accepted on its way from the queue, and is not, had a verdict that denies.
        if accepted && verdict != ChainVerdict::Accepted {
            skb.action = Some(Action::Drop);
        }
        self.leave(skb, cause, verdict, now);
    }

    fn leave(&mut self, skb: Skb<T>, cause: Cause, verdict: ChainVerdict, now: Duration) {
        let Skb { tag, segment, packet, action, verdicts, place, replaced, flow } = skb;
        let accepted = verdict == ChainVerdict::Accepted;
        let own_priority = flow.filter(|_| !accepted).map(|flow| flow.own_priority(packet.priority));
        let outcome = Outcome {
            accepted,
            rejected: verdict == ChainVerdict::Rejected,
            cause,
            action,
            verdicts,
            mark: packet.mark,
            priority: own_priority.unwrap_or(packet.priority),
            vlan: packet.vlan(),
            layer2_header: packet.layer2().map(Bytes::copy_from_slice),
            connection_mark: packet.connection().and_then(|connection| self.connections.mark(connection.id)),
            payload: packet.payload,
            payload_replaced: replaced,
            queue: place.map(|(queue, _)| queue),
            id: place.map(|(_, id)| PacketId::new(id)),
            at: now,
            segments: Vec::new(),
        };
        self.finished.push(Finished { tag, segment, outcome });
    }

    /// Forgets the verdicts for connections.
    pub(super) fn forget_flows(&mut self) {
        self.flows.forget();
    }

    pub(super) fn connection_mark(&self, id: u32) -> Option<u32> {
        self.connections.mark(id)
    }
}

// Verdicts.

impl<T: Clone> Model<T> {
    /// `verdict_instance_lookup`, `verdicthdr_get`
    fn decided(
        &mut self,
        port: u32,
        number: u16,
        order: &VerdictOrder<'_>,
    ) -> Result<(&mut Queue<T>, u32, u32), Errno> {
        let queue = self.queues.get_mut(&number).ok_or(Errno::NODEV)?;
        if queue.port != port {
            return Err(Errno::PERM);
        }
        let (word, id) = order.header.ok_or(Errno::INVAL)?;
        const NF_STOLEN: u32 = 2;
        match word & 0xffff {
            NF_STOLEN => Err(Errno::INVAL),
            low if low & 0xff > code::STOP => Err(Errno::INVAL),
            _ => Ok((queue, word, id)),
        }
    }

    /// `nfqnl_recv_verdict`
    fn verdict(&mut self, port: u32, number: u16, order: &VerdictOrder<'_>, now: Duration) -> Result<(), Errno> {
        let (queue, word, id) = self.decided(port, number, order)?;
        let conntrack = queue.flags & FLAG_CONNTRACK != 0;
        let serial = queue.serial(id);
        let mut skb = queue.entries.remove(&serial).ok_or(Errno::NOENT)?;
        if let (Some(change), Some(connection)) = (order.conntrack.filter(|_| conntrack), skb.packet.connection()) {
            self.connections.change(connection.id, &change);
        }
        if skb.packet.is_bridge() {
            skb.packet.change_layer2(order.vlan, order.layer2_header);
        }
        if let Some(payload) = order.payload {
            // nfqnl_mangle
            if skb.packet.replace(payload) {
                skb.replaced = true;
            } else {
                skb.action = Some(Action::Drop);
                skb.verdicts += 1;
                self.finish(*skb, Cause::BadPayload, false, now);
                return Ok(());
            }
        }
        self.reinject(skb, word, order, now);
        Ok(())
    }

    /// `nfqnl_recv_verdict_batch`
    fn batch(&mut self, port: u32, number: u16, order: &VerdictOrder<'_>, now: Duration) -> Result<(), Errno> {
        let (queue, word, max) = self.decided(port, number, order)?;
        let mut covered = Vec::new();
        while let Some(first) = queue.entries.first_entry() {
            if (*first.key() as u32).wrapping_sub(max) as i32 > 0 {
                break;
            }
            covered.push(first.remove());
        }
        if covered.is_empty() {
            return Err(Errno::NOENT);
        }
        for skb in covered {
            self.reinject(skb, word, order, now);
        }
        Ok(())
    }

    /// `nf_reinject`
    fn reinject(&mut self, mut skb: Box<Skb<T>>, word: u32, order: &VerdictOrder<'_>, now: Duration) {
        if let Some(mark) = order.mark {
            skb.packet.mark = mark;
        }
        if let Some(priority) = order.priority {
            skb.packet.priority = priority;
        }
        skb.action = action_of(word);
        skb.verdicts += 1;
        match skb.action {
            Some(Action::Accept | Action::Stop) => self.finish(*skb, Cause::Verdict, true, now),
            // The first rules carry a verdict that denies out, as those behind the queue would.
            Some(Action::Repeat) if skb.flow.is_some_and(|flow| flow.denied_by(skb.packet.priority)) => {
                self.finish(*skb, Cause::Verdict, true, now);
            }
            Some(Action::Repeat) => self.evaluate(skb, now),
            Some(Action::Requeue { queue, bypass }) => self.enqueue(skb, queue, bypass, now),
            // `Drop`, and unknown actions.
            _ => self.finish(*skb, Cause::Verdict, false, now),
        }
    }
}

// What happens to the kernel.

impl<T: Clone> Model<T> {
    /// `nfqnl_dev_drop`
    pub(super) fn device_down(&mut self, index: u32, now: Duration) {
        self.drop_if(|packet| packet.interfaces().contains(&index), Cause::DeviceDown, now);
    }

    /// `nfqnl_nf_hook_drop`
    pub(super) fn hook_unregistered(&mut self, now: Duration) {
        self.drop_if(|_| true, Cause::HookUnregistered, now);
    }

    fn drop_if(&mut self, condition: impl Fn(&TestPacket) -> bool, cause: Cause, now: Duration) {
        let mut dropped = Vec::new();
        for queue in self.queues.values_mut() {
            let serials = queue.entries.iter().filter(|(_, skb)| condition(&skb.packet)).map(|(serial, _)| *serial);
            let serials: Vec<u64> = serials.collect();
            dropped.extend(serials.iter().filter_map(|serial| queue.entries.remove(serial)));
        }
        for skb in dropped {
            self.finish(*skb, cause, false, now);
        }
    }
}

/// `netlink_sendmsg` refuses what is longer than `sk_sndbuf - 32`.
const MAX_SEND: usize = 212_992 - 32;
