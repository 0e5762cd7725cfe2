//! Limits on the rate of packets or bytes.

use netlink_packet_core::DefaultNla;

use super::{
    super::{
        encoder::{Encoder, number},
        facts::Facts,
    },
    Condition, Match, Order,
};

impl Match {
    /// Packets as long as they do not exceed the rate. The packets above it do not match.
    ///
    /// Only packets that meet all other conditions of the rule count. The kernel checks this
    /// condition last.
    pub fn rate_below(rate: Rate) -> Self {
        Self::new(Limit { rate, over: false })
    }

    /// Packets that exceed the rate: those that [`rate_below`](Self::rate_below) leaves.
    pub fn rate_above(rate: Rate) -> Self {
        Self::new(Limit { rate, over: true })
    }
}

/// A rate of packets or bytes, for [`Match::rate_below`].
///
/// It is a token bucket: after a pause, `burst` packets or bytes are allowed at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rate {
    count: u64,
    /// In seconds.
    period: u64,
    burst: u32,
    bytes: bool,
}

impl Rate {
    /// So many packets per second, with a burst of 5 packets.
    pub fn packets_per_second(count: u32) -> Self {
        Self { count: count.into(), period: 1, burst: 5, bytes: false }
    }

    /// So many packets per minute, with a burst of 5 packets.
    pub fn packets_per_minute(count: u32) -> Self {
        Self { period: 60, ..Self::packets_per_second(count) }
    }

    /// So many packets per hour, with a burst of 5 packets.
    pub fn packets_per_hour(count: u32) -> Self {
        Self { period: 3600, ..Self::packets_per_second(count) }
    }

    /// So many bytes per second, without a burst: the bucket holds the bytes of one second.
    pub fn bytes_per_second(count: u32) -> Self {
        Self { count: count.into(), period: 1, burst: 0, bytes: true }
    }

    /// Sets the burst, in packets or in bytes. For packets it is at least 1.
    pub fn burst(mut self, burst: u32) -> Self {
        self.burst = burst;
        self
    }

    fn unit(self) -> &'static str {
        match self.period {
            1 => "second",
            60 => "minute",
            _ => "hour",
        }
    }
}

#[derive(Debug)]
struct Limit {
    rate: Rate,
    over: bool,
}

impl Condition for Limit {
    fn field(&self) -> &'static str {
        "rate"
    }

    fn order(&self) -> Order {
        Order::Rate
    }

    fn check(&self, _facts: &Facts<'_>, _negated: bool) -> Result<(), String> {
        if self.rate.count == 0 {
            return Err("the rate is 0".to_owned());
        }
        if self.rate.burst == 0 && !self.rate.bytes {
            return Err("the burst is 0".to_owned());
        }
        Ok(())
    }

    fn encode(&self, _facts: &Facts<'_>, negated: bool, encoder: &mut Encoder) {
        let long = |kind, value: u64| DefaultNla::new(kind, value.to_be_bytes().to_vec());
        let attributes = [
            long(NFTA_LIMIT_RATE, self.rate.count),
            long(NFTA_LIMIT_UNIT, self.rate.period),
            number(NFTA_LIMIT_BURST, self.rate.burst),
            number(NFTA_LIMIT_TYPE, u32::from(self.rate.bytes)),
            number(NFTA_LIMIT_FLAGS, u32::from(self.over != negated)),
        ];
        encoder.expression("limit", &attributes);
    }

    fn nft(&self, _facts: &Facts<'_>, negated: bool) -> String {
        let over = if self.over == negated { "" } else { "over " };
        let (unit, burst) = (self.rate.unit(), self.rate.burst);
        match (self.rate.bytes, burst) {
            (false, _) => format!("limit rate {over}{}/{unit} burst {burst} packets", self.rate.count),
            (true, 0) => format!("limit rate {over}{} bytes/{unit}", self.rate.count),
            (true, _) => format!("limit rate {over}{} bytes/{unit} burst {burst} bytes", self.rate.count),
        }
    }
}

// uapi/linux/netfilter/nf_tables.h
const NFTA_LIMIT_RATE: u16 = 1;
const NFTA_LIMIT_UNIT: u16 = 2;
const NFTA_LIMIT_BURST: u16 = 3;
const NFTA_LIMIT_TYPE: u16 = 4;
const NFTA_LIMIT_FLAGS: u16 = 5;
