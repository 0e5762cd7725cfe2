//! A program in a terminal that the test controls.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    path::Path,
    process::{Child, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use nfqueue_testbed::wait_until;
use nix::{
    pty::{Winsize, openpty},
    sys::{
        signal::{Signal, kill},
        termios::{Termios, tcgetattr},
    },
    unistd::Pid,
};
use rustix::termios::tcsetwinsize;

use crate::children;

pub(crate) struct PseudoTerminal {
    /// The test's end.
    master: File,
    /// The program's end.
    slave: OwnedFd,
    settings: Termios,
    screen: Arc<Mutex<vt100::Parser>>,
    program: Child,
}

impl PseudoTerminal {
    /// 24 lines of 80 characters.
    pub(crate) fn start(program: &Path, arguments: &[&str]) -> Self {
        let (rows, columns) = (24, 80);
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).unwrap();
        let settings = tcgetattr(&pty.slave).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let mut command = children::in_terminal(program);
        let program = command.args(arguments).stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        let screen = Arc::new(Mutex::new(vt100::Parser::new(rows, columns, 0)));
        let master = File::from(pty.master);
        let (mut output, shown) = (master.try_clone().unwrap(), Arc::clone(&screen));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // It ends with an error when all of the other ends are closed.
            while let Ok(count) = output.read(&mut buffer) {
                shown.lock().unwrap().process(&buffer[..count]);
            }
        });
        Self { master, slave: pty.slave, settings, screen, program }
    }

    pub(crate) fn rows(&self) -> Vec<String> {
        let screen = self.screen.lock().unwrap();
        let width = screen.screen().size().1;
        screen.screen().rows(0, width).collect()
    }

    pub(crate) fn text(&self) -> String {
        self.rows().join("\n")
    }

    #[track_caller]
    pub(crate) fn wait_for(&self, text: &str) {
        wait_until(&format!("the screen shows {text:?}"), || self.text().contains(text));
    }

    pub(crate) fn press(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        self.screen.lock().unwrap().screen_mut().set_size(rows, columns);
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).unwrap();
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.program.id() as i32), signal).unwrap();
    }

    pub(crate) fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the program ends", || {
            status = self.program.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    pub(crate) fn assert_restored(&self) {
        assert_eq!(tcgetattr(&self.slave).unwrap(), self.settings);
        // The last bytes may not have been read yet.
        wait_until("the screen is the one before, with its cursor", || {
            let screen = self.screen.lock().unwrap();
            !screen.screen().alternate_screen() && !screen.screen().hide_cursor()
        });
    }
}

impl Drop for PseudoTerminal {
    fn drop(&mut self) {
        // If a test has failed before.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}
