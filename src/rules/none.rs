//! No rules: the feature `divert` is off.

use std::{ops::RangeInclusive, sync::Arc};

#[cfg(feature = "handover")]
use crate::handover::{Handover, Takeover};
use crate::{
    io::Shared,
    rules::How,
    types::{Error, FlowMarks},
};

#[derive(Debug, Clone)]
pub(crate) struct Wanted;

impl Wanted {
    pub(crate) fn none() -> Self {
        Self
    }

    pub(crate) fn fail_closed(&self) -> bool {
        false
    }

    pub(crate) fn flow_marks(&self, of_queue: Option<FlowMarks>) -> Result<Option<FlowMarks>, &'static str> {
        Ok(of_queue)
    }

    #[cfg(feature = "test-util")]
    pub(crate) fn validate(&self) -> Result<(), Error> {
        Ok(())
    }

    pub(crate) fn prepare(&self, _: RangeInclusive<u16>, _: Option<FlowMarks>) -> Result<PreparedRules, Error> {
        Ok(PreparedRules)
    }

    #[cfg(feature = "handover")]
    pub(crate) fn take_over(
        &self,
        _: &mut Takeover,
        _: &[Arc<Shared>],
        _: Option<FlowMarks>,
    ) -> Result<Option<Arc<Rules>>, Error> {
        Ok(None)
    }
}

pub(crate) struct PreparedRules;

impl PreparedRules {
    #[cfg(feature = "test-util")]
    pub(crate) fn none() -> Self {
        Self
    }

    pub(crate) async fn install(self, _: &[Arc<Shared>]) -> Result<Option<Arc<Rules>>, Error> {
        Ok(None)
    }

    pub(crate) async fn install_when_free(self, _: &[Arc<Shared>]) -> Result<Option<Arc<Rules>>, Error> {
        Ok(None)
    }
}

/// There are none.
pub(crate) enum Rules {}

impl Rules {
    pub(crate) fn fail_closed(&self) -> bool {
        match *self {}
    }

    pub(crate) fn divided(&self, _: usize) {
        match *self {}
    }

    pub(crate) fn stream_dropped(self: &Arc<Self>) -> bool {
        match **self {}
    }

    pub(crate) async fn close(self: &Arc<Self>, _: impl Fn(&Shared) -> How + Send + 'static) -> Result<(), Error> {
        match **self {}
    }

    #[cfg(feature = "handover")]
    pub(crate) async fn go_with(&self, _: Handover) -> Result<Handover, Error> {
        match *self {}
    }
}
