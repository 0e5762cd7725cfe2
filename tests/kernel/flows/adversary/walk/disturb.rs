//! What happens to tables meanwhile.

use tokio_nfqueue::Rule;

use super::{Adversary, strangers::Stranger};

impl Adversary {
    /// Another program's table comes or goes.
    pub(super) fn stranger(&mut self) {
        if self.strangers.len() > 2 || (!self.strangers.is_empty() && self.random.one_in(2)) {
            let index = self.random.below(self.strangers.len());
            let stranger = self.strangers.remove(index);
            self.note(format!("goes: {}", stranger.what));
            drop(stranger);
        } else {
            self.totals.strangers += 1;
            let number = self.totals.strangers as u32;
            let stranger = Stranger::new(&mut self.random, number, self.round.hooks, self.round.overwriting);
            self.note(format!("comes: {}", stranger.what));
            self.accepts_lost |= stranger.overwrites;
            self.strangers.push(stranger);
        }
        self.churn += 1;
    }

    /// Other rules, which ask about the same packets.
    pub(super) fn replace(&mut self) {
        self.totals.replaced += 1;
        let more = self.random.one_in(2);
        let rules = self.rules(more);
        self.note("the rules are replaced".to_owned());
        self.churn += 1;
        self.divert.as_ref().expect("a table").replace_rules(rules).expect("replace the rules");
    }

    /// Packets that wait are decided while no rule asks about any. Those that come back, because a
    /// chain has come before theirs, must not pass for that reason. Nothing is sent meanwhile.
    pub(super) async fn ambush(&mut self) {
        self.stranger();
        self.note("the rules are replaced, and ask about nothing".to_owned());
        let nothing = self.round.hooks.iter().map(|hook| Rule::new(*hook).count());
        self.divert.as_ref().expect("a table").replace_rules(nothing).expect("replace the rules");
        while !self.waiting.is_empty() {
            let all = 0..self.waiting.len();
            self.decide(all.collect()).await;
        }
        self.replace();
        // Accepts of packets that have come back hold for nothing: no rule has asked again.
        self.accepts_lost = true;
    }

    pub(super) fn forget(&mut self) {
        self.totals.forgotten += 1;
        self.note("all flows are forgotten".to_owned());
        self.divert.as_ref().expect("a table").forget_flows().expect("forget all flows");
        self.model.forget();
    }
}
