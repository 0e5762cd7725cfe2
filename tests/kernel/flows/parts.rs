//! Tables whose rules do not fit in the send buffer.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread::JoinHandle,
};

use tokio_nfqueue::{
    Error, ErrorKind, Hook, Rule,
    divert::{DivertBuilder, Match},
};

use super::{DECISIONS, LOOPBACKS, Talk, bind, confirm, queue_is_empty, sent, table, to_port};
use crate::{
    common::{Divert, next},
    support,
};

tests![
    one a_table_that_does_not_fit_in_one_transaction_is_installed_in_parts,
    one no_packet_passes_while_a_table_that_stays_is_replaced_in_parts,
    one no_packet_passes_while_two_processes_replace_a_table_in_parts,
    sync what_does_not_fit_in_parts_replaces_nothing,
];

/// Installs a table in a thread whose sockets keep their send buffers, as those of an ordinary user
/// do where `net.core.wmem_max` is not larger. `None`: not tried.
fn install(builder: DivertBuilder) -> Option<Result<Divert, Error>> {
    if cfg!(target_arch = "x86") {
        println!("not tried: on this processor the filter cannot tell options");
        return None;
    }
    let installing = support::Namespace::current().spawn(move || {
        support::keep_send_buffers().unwrap();
        builder.install()
    });
    Some(installing.join().unwrap())
}

async fn a_table_that_does_not_fit_in_one_transaction_is_installed_in_parts() {
    for address in LOOPBACKS {
        for decision in DECISIONS {
            let talk = Talk::loopback(address);
            let mut queue = bind();
            let rule = to_port(Hook::Output, talk.port()).to_queue(0);
            let Some(divert) = install(table([rule])) else { return };
            let divert = divert.unwrap();
            talk.obeys(decision, &mut queue).await;
            divert.close().unwrap();
        }
    }
}

/// Datagrams of a client, as many as a thread can send.
struct Flood {
    sending: JoinHandle<()>,
    done: Arc<AtomicBool>,
}

impl Flood {
    fn start(talk: &Talk) -> Self {
        let (sender, done) = (talk.client.try_clone().unwrap(), Arc::new(AtomicBool::new(false)));
        let count = Arc::new(AtomicU64::new(0));
        let sending = support::Namespace::current().spawn({
            let (done, count) = (Arc::clone(&done), Arc::clone(&count));
            move || {
                while !done.load(SeqCst) {
                    sent(|| sender.send(&[0]));
                    count.fetch_add(1, SeqCst);
                }
            }
        });
        support::wait_until("the flood", || count.load(SeqCst) > 100);
        Self { sending, done }
    }

    fn end(self) {
        self.done.store(true, SeqCst);
        self.sending.join().unwrap();
    }
}

/// A table that stays and lets datagrams of the client to a queue.
fn closed(talk: &Talk) -> DivertBuilder {
    table([to_port(Hook::Output, talk.port()).to_queue(0)]).table("stays").fail_closed()
}

async fn no_packet_passes_while_a_table_that_stays_is_replaced_in_parts() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let Some(divert) = install(closed(&talk)) else { return };
    // The table stays.
    drop(divert.unwrap());
    let flood = Flood::start(&talk);
    for _ in 0..5 {
        drop(install(closed(&talk)).unwrap().unwrap());
    }
    let divert = install(closed(&talk)).unwrap().unwrap();
    flood.end();
    talk.silent();
    let mut queue = bind();
    talk.ask(1);
    confirm(next(&mut queue).await.accept().for_flow()).await.unwrap();
    talk.asked(1);
    talk.ask(2);
    talk.asked(2);
    queue_is_empty(&mut queue);
    divert.close().unwrap();
    talk.answer(3);
    talk.answered(3);
}

/// Before Linux 6.9 such tables have no owner, so that one process may replace that of another.
async fn no_packet_passes_while_two_processes_replace_a_table_in_parts() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let Some(divert) = install(closed(&talk)) else { return };
    drop(divert.unwrap());
    let flood = Flood::start(&talk);
    let installers = [(); 2].map(|()| {
        let builder = closed(&talk);
        support::Namespace::current().spawn(move || {
            for _ in 0..10 {
                if let Err(error) = install(builder.clone()).unwrap() {
                    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
                }
            }
        })
    });
    for installer in installers {
        installer.join().unwrap();
    }
    drop(install(closed(&talk)).unwrap().unwrap());
    flood.end();
    talk.silent();
    let mut queue = bind();
    talk.ask(1);
    confirm(next(&mut queue).await.drop()).await.unwrap();
}

fn what_does_not_fit_in_parts_replaces_nothing() {
    let talk = Talk::loopback(LOOPBACKS[0]);
    let closed = |rules: Vec<Rule>| table(rules).table("stays").fail_closed();
    let Some(divert) = install(closed(vec![to_port(Hook::Output, 1).to_queue(0)])) else { return };
    drop(divert.unwrap());
    for count in [1, 400, 1500] {
        let rules = (0..count).map(|port| to_port(Hook::Output, port).when(Match::mark(1, 1)).to_queue(0));
        let divert = install(closed(rules.collect())).unwrap();
        if let Err(error) = &divert {
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
            assert!(error.to_string().contains("net.core.wmem_max"), "{error}");
        }
        assert_eq!(divert.is_ok(), count == 1);
        // Another port.
        talk.ask(1);
        talk.asked(1);
    }
}
