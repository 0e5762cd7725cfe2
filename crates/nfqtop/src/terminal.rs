//! The program in a terminal.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use ratatui::DefaultTerminal;

use crate::{
    keys::Keys,
    reader::Reader,
    screen::{Next, Screen},
    signals::{Signals, Woken},
    view::History,
};

/// Until q, ctrl-c or a signal.
pub(crate) fn run(interval: Duration, namespace: &str) -> Result<(), String> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err("standard input and output are no terminal: use --once or --json".to_owned());
    }
    let signals = Signals::new().map_err(|error| format!("handle signals: {error}"))?;
    in_terminal(|terminal| show(terminal, signals, interval, namespace))
        .and_then(|result| result)
        .map_err(|error| format!("terminal: {error}"))
}

/// Runs `body` with the terminal in raw mode and the alternate screen, and restores it at every
/// end, also by a panic.
fn in_terminal<T>(body: impl FnOnce(&mut DefaultTerminal) -> T) -> io::Result<T> {
    struct Restore;
    impl Drop for Restore {
        fn drop(&mut self) {
            ratatui::restore();
        }
    }
    let _restore = Restore;
    // It also restores the terminal before a panic is printed.
    Ok(body(&mut ratatui::try_init()?))
}

fn show(terminal: &mut DefaultTerminal, mut signals: Signals, interval: Duration, namespace: &str) -> io::Result<()> {
    let (mut reader, mut history, mut screen) = (Reader::new(), History::default(), Screen::default());
    let mut keys = Keys::default();
    let mut next = Instant::now();
    let mut draw = true;
    loop {
        if Instant::now() >= next && !screen.is_paused() {
            screen.show(history.update(&reader.read()));
            next = Instant::now() + interval;
            draw = true;
        }
        if draw {
            terminal.draw(|frame| {
                screen.draw(frame.area(), frame.buffer_mut(), namespace);
            })?;
            draw = false;
        }
        match signals.wait((!screen.is_paused()).then_some(next), Some(io::stdin()))? {
            Woken::End => return Ok(()),
            Woken::Time => {}
            Woken::Resized => draw = true,
            Woken::Input => {
                let mut bytes = [0; 256];
                let count = rustix::io::read(io::stdin(), &mut bytes)?;
                if count == 0 {
                    // The terminal has gone.
                    return Ok(());
                }
                for key in keys.read(&bytes[..count]) {
                    match screen.key(key) {
                        Next::Nothing => {}
                        Next::Draw => draw = true,
                        Next::Refresh => (next, draw) = (Instant::now(), true),
                        Next::Quit => return Ok(()),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::Read,
        process::{Command, Stdio},
    };

    use nix::{pty::openpty, sys::termios::tcgetattr};

    use super::*;

    /// The test runs itself once more, in a terminal of its own, where it panics.
    #[test]
    fn a_panic_restores_the_terminal() {
        const PANICS: &str = "NFQTOP_TEST_PANICS";
        if std::env::var_os(PANICS).is_some() {
            let _ = in_terminal(|_| panic!("a panic in a terminal"));
            return;
        }
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "terminal::tests::a_panic_restores_the_terminal", "--nocapture"])
            .env(PANICS, "1")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        // All of the output fits into the terminal's buffer.
        assert!(!child.wait().unwrap().success());
        assert_eq!(tcgetattr(&pty.slave).unwrap(), before);
        drop(pty.slave);
        let (mut output, mut terminal) = (Vec::new(), File::from(pty.master));
        // It ends with an error: there is no other end any more.
        let _ = terminal.read_to_end(&mut output);
        let output = String::from_utf8_lossy(&output);
        let position = |text| output.find(text).unwrap_or_else(|| panic!("no {text:?} in {output:?}"));
        assert!(position("\x1b[?1049h") < position("\x1b[?1049l"));
        assert!(position("\x1b[?1049l") < position("a panic in a terminal"), "the message can be read: {output:?}");
    }
}
