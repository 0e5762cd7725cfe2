//! What happens to filters, and what must hold after it.

use std::{io, thread, time::Duration};

use netlink_packet_netfilter::NetfilterProtoFamily;
use tokio_nfqueue::Hook;

use super::{
    Conversation, Life, PATIENCE, Port, STEPS, TABLE,
    filter::Origin,
    flow,
    process::Process,
    traffic::{ask, connect, talk},
};
use crate::{support, walk::strangers::Stranger};

/// Where tables of other programs have chains.
const HOOKS: &[Hook] = &[Hook::Prerouting, Hook::Input, Hook::Output];
/// How often a new connection is tried that must work.
const TRIES: usize = 40;
/// How long a connection is tried that must not work.
const BRIEFLY: Duration = Duration::from_millis(20);

impl Life {
    pub(super) fn live(&mut self) -> Result<(), String> {
        self.start()?;
        self.check()?;
        for _ in 0..STEPS {
            self.quiet()?;
            let step = self.random.below(20);
            match (self.process.is_some(), step) {
                (_, 0 | 1) => self.stranger()?,
                (_, 2) => self.flap()?,
                (true, 3..6) => self.kill()?,
                (true, 6..9) => self.stop()?,
                (true, 9) => self.lose()?,
                (true, 10 | 11) => self.heir()?,
                (true, 12..15) => self.hand_over()?,
                (true, 15) => self.kill_slow_successor()?,
                (true, 16) => self.kill_predecessor_of_slow_successor()?,
                (true, 17) => self.kill_some_successor()?,
                (true, _) => self.kill_some_predecessor()?,
                (false, _) => self.start()?,
            }
            self.check()?;
        }
        self.quiet()?;
        if self.process.is_none() {
            self.start()?;
            self.check()?;
        }
        self.stop()
    }

    /// Nothing happens but traffic, which is then in order.
    fn quiet(&mut self) -> Result<(), String> {
        let ordered = self.traits.ordered && self.process.is_some();
        self.in_order = ordered.then(|| self.flood.sent() + 1);
        let count = 20 + self.random.below(60) as u32;
        self.traffic(count)?;
        if let Some(first) = self.in_order {
            self.until("allowed datagrams arrive", |life| life.last > first)?;
        }
        self.in_order = None;
        Ok(())
    }

    fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("a filter")
    }

    fn new_process(&mut self, from: Origin) -> Process {
        self.processes += 1;
        let (number, traits) = (self.processes, self.traits);
        self.note(format!("filter {number} starts, from {from:?}"));
        Process::start(number, from, traits)
    }

    /// Waits until another filter has said something; one that has ended says nothing more.
    fn says(&mut self, process: &mut Process, line: &str) -> Result<String, String> {
        let mut said = None;
        let number = process.number;
        let result = self.until(&format!("filter {number} says {line:?}"), |_| {
            let ended = process.ended().is_some();
            said = process.said(line);
            said.is_some() || ended
        });
        let lines = process.lines().join(" | ");
        let queues = || (0..self.traits.numbers).filter_map(support::queue_line).collect::<Vec<_>>();
        result.map_err(|wrong| {
            format!("{wrong}; it has said: {lines}; queues: {:?}; its threads:{}", queues(), process.threads())
        })?;
        let said = said.ok_or_else(|| format!("filter {number} ended and has not said {line:?}, but: {lines}"))?;
        self.note(format!("filter {number}: {said}"));
        Ok(said)
    }

    /// A filter begins, and replaces what another one has left.
    fn start(&mut self) -> Result<(), String> {
        self.totals.starts += 1;
        self.forget();
        self.shut = None;
        let mut new = self.new_process(Origin::Nothing);
        self.says(&mut new, "ready anew")?;
        self.guard();
        self.process = Some(new);
        Ok(())
    }

    /// The filter ends by a failure.
    fn fails(&mut self) -> Result<(), String> {
        if !self.traits.closed {
            self.unguard()?;
            self.forget();
        }
        Ok(())
    }

    fn kill(&mut self) -> Result<(), String> {
        self.totals.kills += 1;
        self.fails()?;
        self.note("the filter is killed");
        self.process().kill();
        self.failed()
    }

    /// It sends verdicts without the capability, and ends.
    fn lose(&mut self) -> Result<(), String> {
        self.totals.capabilities_lost += 1;
        self.fails()?;
        self.note("the filter loses its capabilities");
        self.process().command("lose");
        self.until("the filter ends, because it may not send", |life| life.process().ended().is_some())?;
        if self.process().ended() == Some(true) {
            return Err("the filter ended without an error".to_owned());
        }
        self.failed()
    }

    /// What holds after a failure.
    fn failed(&mut self) -> Result<(), String> {
        self.process = None;
        let numbers = self.traits.numbers;
        self.until("the queues are unbound", |_| (0..numbers).all(|number| support::queue_line(number).is_none()))?;
        if self.traits.closed {
            self.shut = Some(self.flood.sent() + 1);
            self.note("nothing passes");
            self.traffic(30)
        } else {
            self.no_table()?;
            self.everything_passes()
        }
    }

    /// The table is removed. Another one's cannot be removed, so this removes none that is in use.
    fn no_table(&mut self) -> Result<(), String> {
        let mut left = false;
        self.until("the table is removed", |_| {
            match support::rules::remove(NetfilterProtoFamily::Inet, TABLE) {
                Ok(()) => left = true,
                Err(error) => return error.kind() == io::ErrorKind::NotFound,
            }
            true
        })?;
        if left { Err("a table was left behind".to_owned()) } else { Ok(()) }
    }

    fn everything_passes(&mut self) -> Result<(), String> {
        let mark = self.flood.sent();
        self.until("without rules everything passes", |life| life.leaked && life.last > mark)?;
        self.note("everything passes");
        Ok(())
    }

    /// SIGTERM.
    fn stop(&mut self) -> Result<(), String> {
        self.totals.stops += 1;
        self.forget();
        self.unguard()?;
        let from = self.flood.sent();
        self.note("the filter is stopped");
        // So that some come between any two steps of the shutdown.
        self.flood.dense(true);
        self.process().terminate();
        let process = self.process.take().expect("a filter");
        let ended = self.has_ended(process);
        self.flood.dense(false);
        ended?;
        let bound: Vec<u16> =
            (0..self.traits.numbers).filter(|number| support::queue_line(*number).is_some()).collect();
        if !bound.is_empty() {
            return Err(format!("after a clean stop, queues are bound: {bound:?}"));
        }
        match support::rules::remove(NetfilterProtoFamily::Inet, TABLE) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return Err(format!("a clean stop leaves the table: {other:?}")),
        }
        self.everything_passes()?;
        if self.traits.closed { Ok(()) } else { self.nothing_lost_since(from) }
    }

    /// It ends by its own doing, and has decided all that it received.
    fn has_ended(&mut self, mut process: Process) -> Result<(), String> {
        let number = process.number;
        let end = self.says(&mut process, "end ")?;
        self.until(&format!("filter {number} ends"), |_| process.ended().is_some())?;
        if process.ended() != Some(true) {
            return Err(format!("filter {number} ended with an error: {}", process.lines().join(" | ")));
        }
        let numbers: Vec<u64> = end.split(' ').skip(1).map(|word| word.parse().expect("a number")).collect();
        let [received, settled, in_flight, _lost] = numbers[..] else { return Err(format!("{end:?}")) };
        if (received, in_flight) != (settled, 0) {
            return Err(format!("filter {number} received {received}, decided {settled}, holds {in_flight}"));
        }
        Ok(())
    }

    /// All allowed datagrams since then arrive.
    fn nothing_lost_since(&mut self, from: u32) -> Result<(), String> {
        let to = self.flood.sent();
        let missing = |life: &Self| -> Vec<u32> { (from..to).filter(|at| !life.allowed.contains(at)).collect() };
        let result = self.until("all allowed datagrams arrive", |life| missing(life).is_empty());
        result.map_err(|wrong| format!("{wrong}; of {from} to {to} are lost: {:?}", missing(self)))
    }

    fn hand_over(&mut self) -> Result<(), String> {
        self.totals.hand_overs += 1;
        let from = self.flood.sent();
        let mut old = self.process.take().expect("a filter");
        let mut new = self.new_process(Origin::Predecessor(old.number));
        let ready = self.says(&mut new, "ready taken");
        let lines = old.lines().join(" | ");
        ready.map_err(|wrong| format!("{wrong}; the predecessor has said: {lines}"))?;
        self.has_ended(old)?;
        self.process = Some(new);
        self.nothing_lost_since(from)
    }

    /// The filter, and a successor that has received its queue and waits before it accepts.
    fn received_and_not_accepted(&mut self) -> Result<(Process, Process), String> {
        self.totals.killed_hand_overs += 1;
        let old = self.process.take().expect("a filter");
        let mut new = self.new_process(Origin::Slowly(old.number));
        self.says(&mut new, "received")?;
        let count = self.random.below(20) as u32;
        self.traffic(count)?;
        Ok((old, new))
    }

    /// "The new process is killed before it accepts: the old process keeps the queue."
    fn kill_slow_successor(&mut self) -> Result<(), String> {
        let from = self.flood.sent();
        let (mut old, mut new) = self.received_and_not_accepted()?;
        self.note("the successor is killed");
        new.kill();
        self.says(&mut old, "continues")?;
        // So that the next time it is said anew.
        old.command("ping");
        self.says(&mut old, "pong")?;
        old.forget_lines();
        self.process = Some(old);
        self.nothing_lost_since(from)
    }

    /// "The old process is killed before the new one accepts: the new process gets the queue."
    fn kill_predecessor_of_slow_successor(&mut self) -> Result<(), String> {
        let from = self.flood.sent();
        let (mut old, mut new) = self.received_and_not_accepted()?;
        self.note("the predecessor is killed");
        old.kill();
        new.command("go");
        self.says(&mut new, "ready taken")?;
        self.process = Some(new);
        self.nothing_lost_since(from)
    }

    /// Lets a successor begin, and returns it after some time.
    fn some_successor(&mut self) -> Result<Process, String> {
        self.totals.killed_hand_overs += 1;
        self.fails()?;
        let number = self.process().number;
        let mut new = self.new_process(Origin::Predecessor(number));
        let until = Duration::from_micros(self.random.below(12_000) as u64);
        thread::sleep(until);
        self.note(format!("after {until:?} it has said {:?}", new.lines()));
        Ok(new)
    }

    /// If the successor has the queue by then, the queue ends with it.
    fn kill_some_successor(&mut self) -> Result<(), String> {
        let mut new = self.some_successor()?;
        self.note("the successor is killed");
        new.kill();
        self.process().command("ping");
        self.until("the predecessor continues, or has ended", |life| {
            life.process().said("pong").is_some() || life.process().ended().is_some()
        })?;
        if self.process().ended().is_none() {
            self.note("the predecessor continues");
            self.process().forget_lines();
            self.guard();
            return Ok(());
        }
        let old = self.process.take().expect("a filter");
        self.has_ended(old)?;
        self.failed()
    }

    fn kill_some_predecessor(&mut self) -> Result<(), String> {
        let mut new = self.some_successor()?;
        self.note("the predecessor is killed");
        self.process().kill();
        self.forget();
        self.says(&mut new, "ready")?;
        self.guard();
        self.process = Some(new);
        Ok(())
    }

    /// A filter that waits for the end of the other one.
    fn heir(&mut self) -> Result<(), String> {
        self.totals.kills += 1;
        self.totals.starts += 1;
        let mut new = self.new_process(Origin::Nothing);
        let count = self.random.below(60) as u32;
        self.traffic(count)?;
        if new.said("ready").is_some() {
            return Err("two filters have the same queue".to_owned());
        }
        self.fails()?;
        self.forget();
        self.note("the filter is killed");
        self.process().kill();
        self.says(&mut new, "ready anew")?;
        self.guard();
        self.process = Some(new);
        Ok(())
    }

    /// A table of another program comes or goes.
    fn stranger(&mut self) -> Result<(), String> {
        self.totals.strangers += 1;
        if !self.strangers.is_empty() && self.random.one_in(2) {
            let stranger = self.strangers.pop().expect("a stranger");
            self.note(format!("goes: {}", stranger.what));
        } else {
            let stranger = Stranger::new(&mut self.random, self.totals.strangers as u32, HOOKS, false);
            self.note(format!("comes: {}", stranger.what));
            self.strangers.push(stranger);
        }
        self.receive()
    }

    fn flap(&mut self) -> Result<(), String> {
        self.totals.flaps += 1;
        self.note("the interface goes down and up");
        support::link_down(&self.peer.near);
        self.traffic(5)?;
        support::link_up(&self.peer.near);
        self.receive()
    }

    /// What holds after each step.
    fn check(&mut self) -> Result<(), String> {
        let works = self.shut.is_none();
        if works {
            let mark = self.flood.sent();
            self.until("allowed datagrams arrive", |life| life.last > mark)?;
            self.open_works()?;
        } else if connect(&self.peer, Port::Open, BRIEFLY).is_some() {
            return Err("a connection was made after the filter had ended, though it fails closed".to_owned());
        }
        if self.guarded && connect(&self.peer, Port::Denied, BRIEFLY).is_some() {
            return Err("a forbidden connection was made".to_owned());
        }
        self.flows_hold()?;
        if self.process.is_some() {
            self.new_flow()?;
            self.new_stream()?;
        }
        self.receive()
    }

    /// A connection that is accepted packet by packet survives the filters. It is made anew if it
    /// has waited for too long.
    fn open_works(&mut self) -> Result<(), String> {
        for _ in 0..TRIES {
            if self.open.is_none() {
                self.open = connect(&self.peer, Port::Open, Duration::from_secs(2));
            }
            if self.open.as_mut().is_some_and(|stream| ask(stream, 0, Duration::from_secs(1))) {
                return Ok(());
            }
            self.receive()?;
            self.open = None;
        }
        Err(format!("a connection that is allowed does not work, {TRIES} times tried"))
    }

    /// Verdicts for connections hold as long as the table exists.
    fn flows_hold(&mut self) -> Result<(), String> {
        for index in 0..self.conversations.len() {
            let Conversation { number, accepted, .. } = self.conversations[index];
            let kind = if accepted { flow::DROP_ALONE } else { flow::ACCEPT_ALONE };
            self.heard = None;
            let mut sent = 0;
            self.until(&format!("a datagram of the accepted flow {number} arrives"), |life| {
                // Some may be lost while the other host is not reachable.
                if sent % 40 == 0 {
                    say(&life.conversations[index], kind);
                }
                sent += 1;
                !accepted || life.heard == Some(number)
            })?;
        }
        let Some(stream) = &mut self.stream else { return Ok(()) };
        if !ask(stream, flow::DROP_ALONE, PATIENCE) {
            return Err("an accepted connection of TCP does not work".to_owned());
        }
        Ok(())
    }

    /// A connection of UDP whose first packet says what becomes of it.
    fn new_flow(&mut self) -> Result<(), String> {
        let kind = [flow::ACCEPT, flow::DROP, flow::REJECT][self.random.below(3)];
        for _ in 0..TRIES {
            self.totals.flows += 1;
            self.flows += 1;
            let (number, accepted) = (self.flows, kind == flow::ACCEPT);
            let conversation = Conversation { number, accepted, socket: talk(&self.peer, Port::Flow) };
            // One packet alone: of two that wait at once, only one is accepted.
            say(&conversation, kind);
            let (mut left, line) = (1000, format!("flow {number}"));
            self.until("a verdict for a connection", |life| {
                left -= 1;
                left == 0 || life.process().said(&line).is_some()
            })?;
            let said = self.process().said(&line);
            self.note(format!("flow {number} ({}): {said:?}", char::from(kind)));
            // The first packet may have been lost. So may its verdict.
            if said.is_some_and(|said| said == line) {
                self.conversations.push(conversation);
                return Ok(());
            }
        }
        Err(format!("no connection gets a verdict, {TRIES} times tried"))
    }

    fn new_stream(&mut self) -> Result<(), String> {
        for _ in 0..TRIES {
            if self.stream.is_some() {
                return Ok(());
            }
            self.stream = connect(&self.peer, Port::Stream, Duration::from_secs(2));
            self.receive()?;
        }
        Err(format!("no connection is accepted, {TRIES} times tried"))
    }
}

fn say(conversation: &Conversation, kind: u8) {
    let [a, b, c, d] = conversation.number.to_be_bytes();
    // An ICMP error may have come before, and the other host may not be reachable.
    let _ = conversation.socket.send(&[kind, a, b, c, d]);
}
