//! Changes the elements of named sets.

use std::{fmt, time::Duration};

use rustix::io::Errno;

use nfqueue_proto::types::{Error, ErrorKind};

use super::{
    Divert, dump,
    encoder::Encoding,
    failure::{errno, refused},
    nft::{self, Batch, Element},
    set::{NamedSet, SetElement, check_timeout},
    socket::{Outcome, Refusal},
};

/// A named set of an installed table, from [`Divert::set`].
///
/// The methods block the thread until the kernel has applied the change. They return these errors:
///
/// * [`InvalidInput`](ErrorKind::InvalidInput): the table has no such set, an element does not fit
///   its fields, the set is full, or the elements do not fit into one transaction (some thousands
///   do; there is no limit with `CAP_NET_ADMIN` in the initial user namespace).
/// * [`NotPermitted`](ErrorKind::NotPermitted): the thread has lost `CAP_NET_ADMIN`.
/// * [`Other`](ErrorKind::Other): the kernel returns another error.
///
/// ```no_run
/// use std::{net::Ipv4Addr, time::Duration};
/// use nfqueue_divert::{Divert, Hook, Match, NamedSet, PacketField, Rule, SetField};
///
/// # fn main() -> Result<(), nfqueue_divert::Error> {
/// let blocked = Match::in_set("blocked", [PacketField::SourceAddress]);
/// let divert = Divert::builder()
///     .set(NamedSet::new("blocked", [SetField::Ipv4Address]))
///     .rule(Rule::new(Hook::Input).when(blocked).drop())
///     .install()?;
/// divert.set("blocked").insert(Ipv4Addr::new(192, 0, 2, 1), Duration::from_secs(60))?;
/// # Ok(())
/// # }
/// ```
pub struct DivertSet<'a> {
    divert: &'a Divert,
    name: String,
}

impl<'a> DivertSet<'a> {
    pub(super) fn new(divert: &'a Divert, name: String) -> Self {
        Self { divert, name }
    }

    /// Inserts an element. The kernel removes it after `timeout`; `None` is the time-out of the
    /// set.
    ///
    /// If the element exists, its time-out begins anew.
    ///
    /// # Errors
    ///
    /// See [`DivertSet`].
    pub fn insert(&self, element: impl Into<SetElement>, timeout: impl Into<Option<Duration>>) -> Result<(), Error> {
        self.insert_all([element], timeout)
    }

    /// Inserts several elements in one transaction: all of them, or none if there is an error. See
    /// [`insert`](Self::insert).
    ///
    /// # Errors
    ///
    /// See [`DivertSet`].
    pub fn insert_all<E: Into<SetElement>>(
        &self,
        elements: impl IntoIterator<Item = E>,
        timeout: impl Into<Option<Duration>>,
    ) -> Result<(), Error> {
        let operation = "insert into";
        let set = self.declaration(operation)?;
        let timeout = timeout.into();
        if let Some(timeout) = timeout {
            check_timeout(timeout).map_err(|reason| self.invalid(operation, reason))?;
        }
        let mut keys = self.keys(set, operation, elements)?;
        // The kernel would refuse a repeated element.
        keys.sort();
        keys.dedup();
        let elements: Vec<Element> = keys.into_iter().map(|key| (key, timeout)).collect();
        if elements.is_empty() {
            return Ok(());
        }
        let result = self.transact(operation, |batch| batch.insert_elements(&self.name, &elements, true));
        match result {
            Err(Failure { errno: Some(Errno::EXIST), .. }) => {}
            result => return result.map_err(|failure| failure.error),
        }
        // An element exists. Kernels before 6.12 do not change its time-out, so it is replaced. To
        // insert all elements first makes it certain that all can be deleted.
        let result = self.transact(operation, |batch| {
            batch.insert_elements(&self.name, &elements, false);
            batch.delete_elements(&self.name, &elements);
            batch.insert_elements(&self.name, &elements, true);
        });
        result.map_err(|failure| failure.error)
    }

    /// Removes an element. Returns whether it was in the set.
    ///
    /// # Errors
    ///
    /// See [`DivertSet`].
    pub fn remove(&self, element: impl Into<SetElement>) -> Result<bool, Error> {
        let operation = "remove from";
        let set = self.declaration(operation)?;
        let elements: Vec<Element> = self.keys(set, operation, [element])?.into_iter().map(|key| (key, None)).collect();
        match self.transact(operation, |batch| batch.delete_elements(&self.name, &elements)) {
            Ok(()) => Ok(true),
            Err(Failure { errno: Some(Errno::NOENT), .. }) => Ok(false),
            Err(failure) => Err(failure.error),
        }
    }

    /// Removes several elements in one transaction. Elements that are not in the set are no error.
    ///
    /// # Errors
    ///
    /// As [`elements`](Self::elements), by which it finds out which elements are in the set if not
    /// all are.
    pub fn remove_all<E: Into<SetElement>>(&self, elements: impl IntoIterator<Item = E>) -> Result<(), Error> {
        let operation = "remove from";
        let set = self.declaration(operation)?;
        let mut keys = self.keys(set, operation, elements)?;
        keys.sort();
        keys.dedup();
        let mut elements: Vec<Element> = keys.into_iter().map(|key| (key, None)).collect();
        while !elements.is_empty() {
            match self.transact(operation, |batch| batch.delete_elements(&self.name, &elements)) {
                Err(Failure { errno: Some(Errno::NOENT), .. }) => {}
                result => return result.map_err(|failure| failure.error),
            }
            // One of them is not in the set, or no longer. Each failure costs milliseconds.
            let there = dump::keys(&self.list(operation)?);
            elements.retain(|(key, _)| there.contains(key));
        }
        Ok(())
    }

    /// Removes all elements.
    ///
    /// # Errors
    ///
    /// See [`DivertSet`].
    pub fn clear(&self) -> Result<(), Error> {
        let operation = "clear";
        self.declaration(operation)?;
        self.transact(operation, |batch| batch.clear_set(&self.name)).map_err(|failure| failure.error)
    }

    /// The elements, and the time after which the kernel removes each.
    ///
    /// # Errors
    ///
    /// See [`DivertSet`]; [`Other`](ErrorKind::Other) also if other programs change nf_tables all
    /// the time, so that the kernel cannot list the elements.
    pub fn elements(&self) -> Result<Vec<(SetElement, Option<Duration>)>, Error> {
        let operation = "list";
        let set = self.declaration(operation)?;
        let lists = self.list(operation)?;
        let elements = lists.iter().flat_map(|list| dump::elements(list));
        Ok(elements.filter_map(|(key, expires)| Some((set.decode(&key)?, expires))).collect())
    }

    /// The number of elements.
    ///
    /// # Errors
    ///
    /// As [`elements`](Self::elements), which it calls.
    pub fn len(&self) -> Result<usize, Error> {
        Ok(self.elements()?.len())
    }

    /// Whether there is no element.
    ///
    /// # Errors
    ///
    /// As [`elements`](Self::elements), which it calls.
    pub fn is_empty(&self) -> Result<bool, Error> {
        Ok(self.len()? == 0)
    }

    fn declaration(&self, operation: &str) -> Result<&'a NamedSet, Error> {
        let found = self.divert.sets.iter().find(|set| set.name() == self.name);
        found.ok_or_else(|| self.invalid(operation, "the table has no such set".to_owned()))
    }

    fn keys<E: Into<SetElement>>(
        &self,
        set: &NamedSet,
        operation: &str,
        elements: impl IntoIterator<Item = E>,
    ) -> Result<Vec<Vec<u8>>, Error> {
        let keys = elements.into_iter().map(|element| set.encode(&element.into()));
        keys.collect::<Result<_, _>>().map_err(|reason| self.invalid(operation, reason))
    }

    fn list(&self, operation: &str) -> Result<Vec<Vec<u8>>, Error> {
        let request = nft::get_elements(&self.divert.table, &self.name);
        let dumped = self.divert.lock().connection.dump(&request);
        dumped.map_err(|error| Error::os(self.operation(operation), error))
    }

    fn transact(&self, operation: &str, fill: impl FnOnce(&mut Batch<'_>)) -> Result<(), Failure> {
        let mut state = self.divert.lock();
        let mut batch = Batch::new(&self.divert.table, Encoding { method: state.method, trial: false });
        fill(&mut batch);
        let result = state.connection.transact(&batch.commands, Outcome::Commit);
        result.map_err(|refusal: Refusal| Failure {
            errno: errno(&refusal),
            error: refused(self.operation(operation), &batch.commands, &[], refusal),
        })
    }

    fn operation(&self, operation: &str) -> String {
        format!("{operation} set {} of table {}", self.name, self.divert.table)
    }

    fn invalid(&self, operation: &str, reason: String) -> Error {
        Error::new(ErrorKind::InvalidInput, self.operation(operation)).with_detail(reason)
    }
}

impl fmt::Debug for DivertSet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DivertSet").field("name", &self.name).finish_non_exhaustive()
    }
}

struct Failure {
    errno: Option<Errno>,
    error: Error,
}
