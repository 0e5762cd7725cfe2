//! Changing settings while the queue runs.

use std::{
    future::Future,
    sync::{Arc, atomic::Ordering},
};

use futures::channel::oneshot;

use super::{
    limits::receive_buffer,
    send::SETTING_RETRIES,
    shared::{Shared, lock},
};
use crate::{
    types::{Error, ErrorKind},
    wire::config::Config,
};

impl Shared {
    /// Changes settings in one message, which is sent before this returns. No packet is lost:
    /// queued packets stay queued, and packets that arrive meanwhile are kept.
    pub(crate) fn reconfigure(
        self: &Arc<Self>,
        changes: Result<(Config, Option<usize>), &'static str>,
    ) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        let shared = Arc::clone(self);
        let begun = self.begin_reconfigure(changes);
        async move {
            let result = match begun {
                Ok((config, reply)) => shared.finish_reconfigure(config, reply).await,
                Err(error) => Err(error),
            };
            shared.trace.reconfigured(&result);
            result
        }
    }

    fn begin_reconfigure(
        &self,
        changes: Result<(Config, Option<usize>), &'static str>,
    ) -> Result<(Config, oneshot::Receiver<Result<(), Error>>), Error> {
        let (config, receive_buffer) = changes.map_err(|what| {
            let error = Error::new(ErrorKind::InvalidInput, format!("reconfigure queue {}", self.settings.queue));
            error.with_detail(what)
        })?;
        let reply = self.begin_configure(RECONFIGURE, &config, true, receive_buffer)?;
        Ok((config, reply))
    }

    async fn finish_reconfigure(
        &self,
        config: Config,
        mut reply: oneshot::Receiver<Result<(), Error>>,
    ) -> Result<(), Error> {
        let mut tries = 0;
        loop {
            let result = std::future::poll_fn(|cx| self.poll_reply(&mut reply, cx)).await;
            let result = result.unwrap_or_else(|| Err(Error::new(ErrorKind::Unconfirmed, RECONFIGURE)));
            match result {
                Err(error) if error.kind() == ErrorKind::Unconfirmed && tries < SETTING_RETRIES => {
                    // The reply was lost. Setting the same values again does no harm, and causes
                    // another reply.
                    tries += 1;
                    reply = self.begin_configure(RECONFIGURE, &config, true, None)?;
                }
                result => {
                    let named = |error: Error| error.with_operation(format!("{RECONFIGURE} {}", self.settings.queue));
                    return result.map_err(|error| self.explain(named(error), &config));
                }
            }
        }
    }

    /// Makes room for what the kernel may send once it has carried out the configuration messages
    /// whose replies are awaited. Neither size ever shrinks, unless this size of the receive buffer
    /// is requested. The caller holds `outbox`, so that no other change comes in between.
    pub(super) fn make_room(&self, requested: Option<usize>) -> Result<(), Error> {
        let limits = self.core().machine.highest_limits();
        lock(&self.receiver).grow(limits.payload);
        let present = self.socket.receive_buffer();
        if let Some(bytes) = requested {
            self.requested_buffer.store(bytes, Ordering::Relaxed);
        }
        let wanted = requested.unwrap_or_else(|| match self.requested_buffer.load(Ordering::Relaxed) {
            0 => receive_buffer(limits, self.settings.attributes).max(present),
            _ => present,
        });
        if wanted == present {
            return Ok(());
        }
        // Until the size is known, no reply is certain to have found room.
        self.core().machine.set_receive_buffer(0);
        let result = self.socket.set_receive_buffer(wanted);
        self.core().machine.set_receive_buffer(self.socket.receive_buffer());
        result
    }

    /// The receive buffer that was requested, or that a full queue needs; in bytes.
    pub(crate) fn wanted_receive_buffer(&self) -> usize {
        match self.requested_buffer.load(Ordering::Relaxed) {
            0 => receive_buffer(self.core().machine.limits(), self.settings.attributes),
            bytes => bytes,
        }
    }
}

const RECONFIGURE: &str = "reconfigure queue";
