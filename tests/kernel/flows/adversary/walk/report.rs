//! What is said about a broken promise.

use super::{
    Adversary,
    model::{Time, Violation},
};

/// For how many broken promises of each kind the history is kept.
const KEPT: usize = 2;

impl Adversary {
    pub(super) fn log_of(&mut self, id: usize, at: Time, text: String) {
        let all = self.connections.iter_mut().chain(self.retired.values_mut());
        if let Some(connection) = { all }.find(|other| other.id == id) {
            connection.log.push((at, text));
        }
    }

    pub(super) fn report(&mut self, violation: Option<Violation>) {
        let Some(Violation { promise, connection, detail }) = violation else { return };
        let history = self.history(connection, &detail);
        let (count, kept) = self.broken.entry(promise).or_default();
        *count += 1;
        if kept.len() < KEPT {
            kept.push(history);
        }
        // What follows from it is not another one.
        self.model.of(connection).uncertain = true;
        self.retire(connection);
    }

    /// What has happened to a connection.
    pub(super) fn history(&self, id: usize, detail: &str) -> String {
        let all = self.connections.iter().chain(self.retired.values());
        let own = { all }.find(|connection| connection.id == id).map_or(&[][..], |connection| &connection.log);
        let mut events: Vec<&(Time, String)> = own.iter().chain(&self.log).collect();
        events.sort();
        let lines: Vec<String> = events.iter().map(|(at, text)| format!("    {at:>8}  {text}")).collect();
        let present: Vec<&str> = self.strangers.iter().map(|stranger| &*stranger.what).collect();
        format!("  {detail}; connection {id}; strangers: {present:?}\n{}", lines.join("\n"))
    }
}
