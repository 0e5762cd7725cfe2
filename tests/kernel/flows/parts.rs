//! Tables whose rules do not fit in the send buffer.

use tokio_nfqueue::{Error, ErrorKind, Hook, divert::DivertBuilder};

use super::{DECISIONS, Decision, LOOPBACKS, Talk, bind, confirm, queue_is_empty, table, to_port};
use crate::{
    common::{Divert, next},
    support,
};

tests![
    one a_table_that_does_not_fit_in_one_transaction_is_installed_in_parts,
    sync a_table_that_stays_must_fit_in_one_transaction,
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
            talk.ask(1);
            confirm(decision.for_flow(next(&mut queue).await)).await.unwrap();
            match decision {
                Decision::Accept => talk.asked(1),
                Decision::Reject => talk.refused("the first"),
                Decision::Drop => talk.silent(),
            }
            talk.ask(2);
            match decision {
                Decision::Accept => talk.asked(2),
                Decision::Reject => talk.refused("the second"),
                Decision::Drop => talk.silent(),
            }
            queue_is_empty(&mut queue);
            divert.close().unwrap();
        }
    }
}

fn a_table_that_stays_must_fit_in_one_transaction() {
    let Some(divert) = install(table([to_port(Hook::Output, 1).to_queue(0)]).table("stays").fail_closed()) else {
        return;
    };
    let error = divert.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(error.to_string().contains("net.core.wmem_max"), "{error}");
    // Nothing is left.
    table([to_port(Hook::Output, 1).to_queue(0)]).table("stays").install().unwrap();
}
