//! The conversation of a hand-over, on a connected Unix stream socket.
//!
//! | from | message |
//! |---|---|
//! | predecessor | the header of a record, with descriptors (`SCM_RIGHTS`); the first is the record |
//! | successor | [`TAKEN`] |
//! | predecessor | instead of waiting any longer: [`TAKEN_BACK`] |
//!
//! The queue changes hands when the successor's message has been sent. If the predecessor does not
//! wait any longer, it first shuts its receiving side down. The kernel puts a message into the
//! receiver's queue and checks for the shutdown under one lock (`unix_stream_sendmsg`). So either
//! the message is there and is found, or it can never be sent, and the successor gets an error.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
    time::Instant,
};

use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, Shutdown,
    },
};
use tokio::{io::Interest, net::UnixStream};

use super::{clock::QueueClock, task_timer::TaskTimer};
use crate::{
    record::{self, HEADER, Unreadable},
    types::{Error, ErrorKind},
};

const TAKEN: u8 = b'T';
const TAKEN_BACK: u8 = b'B';

/// As many descriptors as the kernel passes in one message (`SCM_MAX_FD`).
const MOST_DESCRIPTORS: usize = 253;

/// Sends the descriptors. What is sent fits into any socket buffer.
pub(crate) async fn send_descriptors(stream: &UnixStream, descriptors: &[BorrowedFd<'_>]) -> Result<(), Error> {
    if descriptors.len() > MOST_DESCRIPTORS {
        let error = Error::new(ErrorKind::InvalidInput, HAND_OVER);
        return Err(error.with_detail("more queues than one message can pass; use several connections"));
    }
    let header = record::header();
    let message = SendAncillaryMessage::ScmRights(descriptors);
    let mut space = vec![MaybeUninit::uninit(); message.size()];
    let send = || {
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        Ok(rustix::net::sendmsg(stream, &[IoSlice::new(&header)], &mut ancillary, SendFlags::NOSIGNAL)?)
    };
    match stream.async_io(Interest::WRITABLE, send).await {
        Ok(HEADER) => Ok(()),
        Ok(_) => Err(failed(HAND_OVER, Errno::MSGSIZE.into())),
        Err(source) => Err(failed(HAND_OVER, source)),
    }
}

/// Waits until the successor has taken the queue over.
///
/// # Errors
/// It has not, until `limit` or because it has ended; but it may do so until [`take_back`].
pub(crate) async fn await_acknowledgement(stream: &UnixStream, limit: Option<Instant>) -> Result<(), Error> {
    let timer = TaskTimer::new(QueueClock::System).map_err(|source| Error::os(HAND_OVER, source))?;
    let mut byte = [0];
    let reply = std::pin::pin!(stream.async_io(Interest::READABLE, || peek(stream, &mut byte)));
    let time = std::pin::pin!(timer.wait(limit));
    match futures::future::select(reply, time).await {
        futures::future::Either::Left((Ok(1), _)) => Ok(()),
        futures::future::Either::Left((Ok(_), _)) => Err(Error::new(ErrorKind::Disconnected, HAND_OVER)),
        futures::future::Either::Left((Err(source), _)) => Err(failed(HAND_OVER, source)),
        futures::future::Either::Right(_) => {
            Err(Error::new(ErrorKind::TimedOut, HAND_OVER).with_detail("the successor has not taken it over"))
        }
    }
}

fn peek(stream: &UnixStream, byte: &mut [u8; 1]) -> io::Result<usize> {
    Ok(rustix::net::recv(stream, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT)?.0)
}

/// Ends the waiting. Returns whether the successor has taken the queue over; from now on it cannot
/// any more.
pub(crate) fn take_back(stream: &UnixStream) -> Result<bool, Error> {
    let _ = rustix::net::shutdown(stream, Shutdown::Read);
    let mut byte = [0];
    match rustix::net::recv(stream, &mut byte[..], RecvFlags::DONTWAIT) {
        Ok((1, _)) if byte == [TAKEN] => return Ok(true),
        Ok((1, _)) => {
            let error = Error::new(ErrorKind::Malformed, HAND_OVER);
            let _ = rustix::net::send(stream, &[TAKEN_BACK], SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            return Err(error.with_detail("the reply is not one of tokio-nfqueue"));
        }
        _ => {}
    }
    // If it cannot be sent, the successor has ended.
    let _ = rustix::net::send(stream, &[TAKEN_BACK], SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    Ok(false)
}

/// Waits for descriptors. The first of them is the record.
pub(crate) async fn receive_descriptors(stream: &UnixStream) -> Result<Vec<OwnedFd>, Error> {
    let mut header = [0; HEADER];
    let mut filled = 0;
    let mut descriptors = Vec::new();
    while filled < HEADER {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let receive = || {
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let room = &mut [IoSliceMut::new(&mut header[filled..])];
            let received = rustix::net::recvmsg(stream, room, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(passed) = message {
                    descriptors.extend(passed);
                }
            }
            Ok((received.bytes, received.flags))
        };
        let (length, flags) =
            stream.async_io(Interest::READABLE, receive).await.map_err(|source| failed(TAKE_OVER, source))?;
        if length == 0 {
            return Err(Error::new(ErrorKind::Disconnected, TAKE_OVER));
        }
        if flags.contains(ReturnFlags::CTRUNC) {
            let error = Error::new(ErrorKind::Other, TAKE_OVER);
            return Err(error.with_detail("descriptors were lost: the limit of open files is too low"));
        }
        filled += length;
        // Another program's greeting may be shorter than a header.
        let known = filled.min(record::MAGIC.len());
        if header[..known] != record::MAGIC[..known] {
            return Err(unreadable(Unreadable::Malformed));
        }
    }
    record::check_header(&header).map_err(unreadable)?;
    Ok(descriptors)
}

/// Takes the queue over.
///
/// # Errors
/// The predecessor has taken it back.
pub(crate) async fn acknowledge(stream: &UnixStream) -> Result<(), Error> {
    match rustix::net::send(stream, &[TAKEN], SendFlags::NOSIGNAL) {
        Ok(_) => return Ok(()),
        Err(Errno::PIPE | Errno::CONNRESET) => {}
        Err(errno) => return Err(failed(TAKE_OVER, errno.into())),
    }
    // The predecessor has taken it back and says so, or it has ended without that. Then no other
    // process has the queue.
    let mut byte = [0];
    let receive = || Ok(rustix::net::recv(stream, &mut byte[..], RecvFlags::DONTWAIT)?.0);
    match stream.async_io(Interest::READABLE, receive).await {
        Ok(1) => {
            let error = Error::new(ErrorKind::TimedOut, TAKE_OVER);
            Err(error.with_detail("the predecessor has not waited any longer, and keeps the queue"))
        }
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(Errno::CONNRESET.raw_os_error()) => Ok(()),
        Err(source) => Err(failed(TAKE_OVER, source)),
    }
}

pub(super) fn unreadable(reason: Unreadable) -> Error {
    match reason {
        Unreadable::Malformed => {
            Error::new(ErrorKind::Malformed, TAKE_OVER).with_detail("it is not a hand-over of tokio-nfqueue")
        }
        Unreadable::Version(version) => {
            let detail = format!("its format is {version}, that of this version is {}", record::VERSION);
            Error::new(ErrorKind::Incompatible, TAKE_OVER).with_detail(detail)
        }
    }
}

fn failed(operation: &'static str, source: io::Error) -> Error {
    let gone = matches!(source.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
    let error = Error::os(operation, source);
    if gone { error.with_kind(ErrorKind::Disconnected) } else { error }
}

pub(super) const HAND_OVER: &str = "hand over";
pub(super) const TAKE_OVER: &str = "take over";
