//! Tables for porting programs from other libraries.
//!
//! What differs, whatever the library:
//!
//! - **Order.** The other libraries send each verdict at once. This crate sends the verdicts of one
//!   flush in the order of the packets' ids, whatever the order of `submit`. A program that
//!   releases packets in another order than they came in says
//!   [`in_submission_order`](crate::QueueBuilder::in_submission_order).
//! - **GSO** is on here, and off in libnetfilter_queue: packets of up to 64 KiB arrive, with
//!   unfinished checksums. [`gso(false)`](crate::QueueBuilder::gso) gives what the other libraries
//!   give.
//! - **Ranges.** A copy range of 0 or 0xffff is 65 531 bytes, as in the kernel. A queue of length 0
//!   drops everything there; here it has the length 1. `NFQNL_COPY_NONE` has no counterpart: bind
//!   the queue when its packets are wanted.
//! - **After a verdict** the packet is gone, by type. What a callback reads after its verdict is
//!   read before it here; [`payload_bytes`](crate::Packet::payload_bytes) keeps the bytes.
//! - **Batches up to an id** decide everything up to it, also packets that the program has not
//!   seen. Here a batch decides only what the program has decided, so there is nothing to port.
//! - **Errors.** `nfq_handle_packet` returns errors of single messages; here they are in
//!   [`refusals`](crate::VerdictSink::refusals), and an error of the stream is its end.
//! - **Loops of one's own**, with `poll(2)` or `epoll(7)`, are possible: see the
//!   [next section](#a-loop-of-ones-own).
//! - **`nfq_open_nfnl`** shares a socket with other uses; here a queue has a socket of its own.
//!
//! # A loop of one's own
//!
//! A queue is bound in a runtime, because the stream needs its I/O driver. A program that does not
//! use the stream need not drive that runtime afterwards.
//!
#![doc = include_str!("poll_loop.md")]
//!
//! | part | in a runtime that is not driven |
//! |---|---|
//! | [`readable_fd`], [`try_recv`], [`try_recv_many`], [`submit`], [`flush_now`], [`Refusals::try_recv`] | as in one that is driven |
//! | time limits of flush policies, [`deadline`], the time-out of [`close`] | kept by the crate's timer thread |
//! | [`confirm`], [`reconfigure`], [`close`], [`flush`], the methods of [`Divert`] | awaited by any executor, such as `futures::executor::block_on` |
//! | the queue as a stream, [`recv`], [`recv_many`], [`serve`] | do not wake: they need a runtime that is driven |
//! | [`FlushReason::TasksRan`] | is not reported; the policy is asked when the delay is over |
//!
//! A verdict is sent by the flush policy: with the default at once if no other packet is undecided,
//! and after 500 µs at the latest. `try_recv` and `try_recv_many` send what is gathered before they
//! return `Empty`; `flush_now` sends it at any time. If the runtime is dropped, all this stays as
//! it is, except that each verdict is sent at once, in a message of its own.
//!
//! [`readable_fd`]: crate::PacketStream::readable_fd
//! [`try_recv`]: crate::PacketStream::try_recv
//! [`try_recv_many`]: crate::PacketStream::try_recv_many
//! [`submit`]: crate::Verdict::submit
//! [`flush_now`]: crate::VerdictSink::flush_now
//! [`Refusals::try_recv`]: crate::Refusals::try_recv
//! [`deadline`]: crate::QueueBuilder::deadline
//! [`close`]: crate::VerdictSink::close
//! [`confirm`]: crate::Verdict::confirm
//! [`reconfigure`]: crate::VerdictSink::reconfigure
//! [`flush`]: crate::VerdictSink::flush
//! [`Divert`]: crate::Divert
//! [`recv`]: crate::PacketStream::recv
//! [`recv_many`]: crate::PacketStream::recv_many
//! [`serve`]: crate::Queue::serve
//! [`FlushReason::TasksRan`]: crate::flush::FlushReason::TasksRan
//!
//! # libnetfilter_queue
//!
//! | other library | this crate |
//! |---|---|
//! | `nfq_open`, `nfq_open_nfnl`, `nfq_create_queue` | [`Queue::builder`](crate::Queue::builder), [`bind`](crate::QueueBuilder::bind) |
//! | `nfq_bind_pf`, `nfq_unbind_pf` | not needed: they do nothing since Linux 3.8 |
//! | `nfq_destroy_queue`, `nfq_close` | [`close`](crate::VerdictSink::close), a graceful shutdown; or drop it |
//! | `nfq_set_mode` | [`copy_range`](crate::QueueBuilder::copy_range), [`copy_metadata`](crate::QueueBuilder::copy_metadata) |
//! | `nfq_set_queue_maxlen` | [`max_len`](crate::QueueBuilder::max_len) |
//! | `nfq_set_queue_flags` | [`fail_open`](crate::QueueBuilder::fail_open), [`conntrack`](crate::QueueBuilder::conntrack), [`gso`](crate::QueueBuilder::gso), [`uid_gid`](crate::QueueBuilder::uid_gid), [`security_context`](crate::QueueBuilder::security_context) |
//! | any of these settings on a bound queue | [`reconfigure`](crate::VerdictSink::reconfigure) |
//! | `nfq_fd`, `nfq_handle_packet`, the callback | the [`Stream`](crate::PacketStream) of packets; without Tokio [`readable_fd`](crate::PacketStream::readable_fd) and [`try_recv`](crate::PacketStream::try_recv) |
//! | `nfnl_rcvbufsiz` | [`receive_buffer`](crate::QueueBuilder::receive_buffer); on a bound queue [`Reconfigure::receive_buffer`](crate::Reconfigure::receive_buffer) |
//! | `NETLINK_NO_ENOBUFS` | always set |
//! | `nfq_set_verdict` | [`submit`](crate::Verdict::submit); with a buffer: [`Verdict::payload`](crate::Verdict::payload) |
//! | `nfq_set_verdict2`, `nfq_set_verdict_mark` | [`Verdict::mark`](crate::Verdict::mark) |
//! | `nfq_set_verdict_batch`, `nfq_set_verdict_batch2` | automatic: a batch decides only packets that were all given this verdict |
//! | `NF_DROP`, `NF_ACCEPT`, `NF_QUEUE`, `NF_REPEAT`, `NF_STOP` | [`Action`](crate::Action), and a method of [`Packet`](crate::Packet) for each |
//! | `NF_STOLEN` | the kernel refuses it from programs |
//! | `nfq_get_msg_packet_hdr` | [`Packet::id`](crate::Packet::id), [`hw_protocol`](crate::Packet::hw_protocol), [`hook`](crate::Packet::hook) |
//! | `nfq_get_nfmark` | [`Packet::mark`](crate::Packet::mark) |
//! | `nfq_get_timestamp` | [`Packet::timestamp`](crate::Packet::timestamp) |
//! | `nfq_get_indev`, `_outdev`, `_physindev`, `_physoutdev` | [`interface_in`](crate::Packet::interface_in), [`interface_out`](crate::Packet::interface_out), [`physical_in`](crate::Packet::physical_in), [`physical_out`](crate::Packet::physical_out) |
//! | `nfq_get_indev_name` and its like, `nlif_*` | [`Packet::interface_name`](crate::Packet::interface_name) |
//! | `nfq_get_packet_hw` | [`Packet::hardware_address`](crate::Packet::hardware_address) |
//! | `nfq_get_skbinfo` | [`is_checksum_ready`](crate::Packet::is_checksum_ready), [`is_gso`](crate::Packet::is_gso), [`is_checksum_unverified`](crate::Packet::is_checksum_unverified) |
//! | `nfq_get_uid`, `nfq_get_gid` | [`Packet::uid`](crate::Packet::uid), [`Packet::gid`](crate::Packet::gid); at the input hook they are the receiver's in either library |
//! | `nfq_get_secctx` | [`Packet::security_context`](crate::Packet::security_context) |
//! | `nfq_get_payload` | [`Packet::payload`](crate::Packet::payload), [`Packet::payload_bytes`](crate::Packet::payload_bytes) |
//! | `nfq_nlmsg_parse` and the attributes by number | [`Packet::attribute`](crate::Packet::attribute), [`Packet::attributes`](crate::Packet::attributes) |
//! | `nfq_nlmsg_verdict_put`, `_put_mark`, `_put_pkt` | [`Verdict`](crate::Verdict) |
//! | `nfq_nlmsg_cfg_put_cmd`, `_params`, `_qmaxlen` | [`QueueBuilder`](crate::QueueBuilder): one message, acknowledged |
//! | `NFQA_CT` in verdicts | [`connection_mark`](crate::Verdict::connection_mark), [`connection_labels`](crate::Verdict::connection_labels), [`connection_timeout`](crate::Verdict::connection_timeout) |
//! | `NFQA_EXP` in verdicts | [`expectation`](crate::Verdict::expectation) |
//! | `NFQA_VLAN`, `NFQA_L2HDR` | [`Packet::vlan`](crate::Packet::vlan), [`Packet::layer2_header`](crate::Packet::layer2_header), [`Verdict::vlan`](crate::Verdict::vlan), [`Verdict::layer2_header`](crate::Verdict::layer2_header) |
//! | `nfq_ip_*`, `nfq_ip6_*`, `nfq_tcp_*`, `nfq_udp_*`, `nfq_icmp_*`, `pktb_*` | [`Edit`](crate::edit::Edit), which has a separate table |
//! | `nfq_snprintf_xml` | none; `Debug` prints one line |
//! | reading `/proc/net/netfilter/nfnetlink_queue` | [`kernel_stats`](crate::VerdictSink::kernel_stats), [`advice`](crate::VerdictSink::advice) |
//!
//! # florianl/go-nfqueue
//!
//! | other library | this crate |
//! |---|---|
//! | `Config.NfQueue` | [`Queue::builder`](crate::Queue::builder) |
//! | `Config.MaxQueueLen` | [`max_len`](crate::QueueBuilder::max_len) |
//! | `Config.MaxPacketLen`, `Config.Copymode` | [`copy_range`](crate::QueueBuilder::copy_range), [`copy_metadata`](crate::QueueBuilder::copy_metadata) |
//! | `Config.Flags` | a method of [`QueueBuilder`](crate::QueueBuilder) for each |
//! | `Config.NetNS` | [`namespace`](crate::QueueBuilder::namespace) |
//! | `Config.AfFamily` | not needed: a queue takes packets of every family |
//! | `Config.ReadTimeout` | any timeout around [`recv`](crate::PacketStream::recv), which is cancel safe |
//! | `Config.WriteTimeout` | not needed: a send to the kernel does not wait |
//! | `Config.Logger` | `tracing` |
//! | `Register`, `RegisterWithErrorFunc` | the stream; errors of single verdicts: [`refusals`](crate::VerdictSink::refusals) |
//! | `SetVerdict` | [`submit`](crate::Verdict::submit) |
//! | `SetVerdictWithOption`: `WithMark`, `WithConnMark`, `WithLabel`, `WithAlteredPacket` | [`mark`](crate::Verdict::mark), [`connection_mark`](crate::Verdict::connection_mark), [`connection_labels`](crate::Verdict::connection_labels), [`payload`](crate::Verdict::payload) |
//! | `SetVerdictBatch` | automatic |
//! | `Con`, `SetOption` | not needed: `NETLINK_NO_ENOBUFS` and the receive buffer are set |
//! | `Close` | [`close`](crate::VerdictSink::close) |
//!
//! # NetfilterQueue (Python)
//!
//! | other library | this crate |
//! |---|---|
//! | `bind(queue, callback, max_len, mode, range, sock_len)` | [`Queue::builder`](crate::Queue::builder), [`max_len`](crate::QueueBuilder::max_len), [`copy_range`](crate::QueueBuilder::copy_range), [`receive_buffer`](crate::QueueBuilder::receive_buffer) |
//! | `run`, `run_socket`, `get_fd` | the stream |
//! | `unbind` | [`close`](crate::VerdictSink::close) |
//! | `packet.retain()` | not needed: a packet owns its bytes; [`detach`](crate::Packet::detach) frees them |
//! | `set_payload`, `set_mark`, `accept`, `drop`, `repeat` | [`Verdict`](crate::Verdict) and the methods of [`Packet`](crate::Packet) |
//! | `get_hw`, `indev`, `outdev`, `physindev`, `physoutdev`, `get_timestamp`, `hook`, `hw_protocol`, `id` | as for libnetfilter_queue |
//!
//! # Suricata's NFQ mode
//!
//! | other library | this crate |
//! |---|---|
//! | `mode: accept` | [`Packet::accept`](crate::Packet::accept) |
//! | `mode: repeat`, `repeat-mark`, `repeat-mask` | [`Packet::repeat_marked`](crate::Packet::repeat_marked) |
//! | `mode: route`, `route-queue` | [`Packet::requeue`](crate::Packet::requeue), [`Packet::requeue_bypass`](crate::Packet::requeue_bypass) |
//! | `bypass-mark`, `bypass-mask` | [`Packet::mark_with`](crate::Packet::mark_with) with [`Verdict::mark`](crate::Verdict::mark) and a rule that saves the mark in the connection; or [`Verdict::connection_mark`](crate::Verdict::connection_mark) |
//! | `batchcount` | [`FlushPolicy`](crate::FlushPolicy), in all modes |
//! | `fail-open` | [`fail_open`](crate::QueueBuilder::fail_open) |
//! | `-q 0 -q 1 ...`, `-q 0:3` | [`Queue::builder(0..4)`](crate::Queue::builder) |
