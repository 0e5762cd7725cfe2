//! The service that asks a person.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::Path,
    pin::pin,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::watch,
};

use super::end_signal;

pub(crate) async fn run(path: &Path) -> io::Result<()> {
    let mut end = pin!(end_signal()?);
    let listener = listen(path)?;
    eprintln!("ready");
    let mut person = Person::new();
    let result = tokio::select! {
        result = serve(&listener, &mut person) => result,
        () = &mut end => Ok(()),
    };
    let _ = fs::remove_file(path);
    println!("\n{} connections allowed, {} denied", person.allowed, person.denied);
    result
}

/// Listens for a firewall of the same user or of root.
fn listen(path: &Path) -> io::Result<UnixListener> {
    // What an earlier prompt has left.
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves one firewall after the other, until the person has left.
async fn serve(listener: &UnixListener, person: &mut Person) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        match converse(stream, person).await {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => eprintln!("\nfirewall: the connection has ended: {error}"),
        }
    }
}

/// Returns whether the person is still there.
async fn converse(mut stream: UnixStream, person: &mut Person) -> io::Result<bool> {
    let (reader, mut writer) = stream.split();
    let mut questions = BufReader::new(reader).lines();
    while let Some(question) = questions.next_line().await? {
        let words: Vec<&str> = question.splitn(7, ' ').collect();
        let &["ask", id, protocol, _, destination, user, name] = words.as_slice() else {
            return Err(io::Error::other(format!("not a question: {question:?}")));
        };
        let Some(allow) = person.asked(&format!("{name} (uid {user}) wants {destination} ({protocol})")).await? else {
            return Ok(false);
        };
        let answer = if allow { "allow" } else { "deny" };
        writer.write_all(format!("{answer} {id}\n").as_bytes()).await?;
    }
    Ok(true)
}

struct Person {
    /// The last line of the input.
    lines: watch::Receiver<String>,
    allowed: u64,
    denied: u64,
}

impl Person {
    fn new() -> Self {
        let (sender, lines) = watch::channel(String::new());
        // A thread, which the end of the program does not wait for.
        std::thread::spawn(move || {
            io::stdin().lines().map_while(Result::ok).for_each(|line| _ = sender.send_replace(line));
        });
        Self { lines, allowed: 0, denied: 0 }
    }

    /// Whether to allow it, or `None` at the end of the input.
    async fn asked(&mut self, question: &str) -> io::Result<Option<bool>> {
        loop {
            // What was typed before is no answer to this question.
            self.lines.borrow_and_update();
            print!("{question} [y/n]? ");
            io::stdout().flush()?;
            if self.lines.changed().await.is_err() {
                return Ok(None);
            }
            match self.lines.borrow().trim() {
                "y" => {
                    self.allowed += 1;
                    return Ok(Some(true));
                }
                "n" => {
                    self.denied += 1;
                    return Ok(Some(false));
                }
                _ => {}
            }
        }
    }
}
