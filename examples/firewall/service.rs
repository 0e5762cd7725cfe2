//! The connection to the service: questions out, answers in.

use std::{future::pending, io, mem, path::PathBuf};

use tokio::net::UnixStream;

/// The longest line of a service, in bytes.
const LONGEST: usize = 64;

pub(crate) struct Service {
    path: PathBuf,
    stream: Option<UnixStream>,
    /// The beginning of the next line.
    partial: Vec<u8>,
}

pub(crate) enum Answer {
    /// To the question with this number: whether to allow the connection.
    To(u64, bool),
    Nonsense,
}

impl Service {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, stream: None, partial: Vec::new() }
    }

    /// Connects if there is no connection. It never waits for the service.
    pub(crate) async fn connect(&mut self) -> io::Result<()> {
        if self.stream.is_none() {
            self.stream = Some(UnixStream::connect(&self.path).await?);
        }
        Ok(())
    }

    /// Sends a question. It never waits for the service: if the service has not read so many
    /// questions that the socket is full, this is an error.
    pub(crate) fn ask(&self, question: &str) -> io::Result<()> {
        let Some(stream) = &self.stream else { return Err(io::ErrorKind::NotConnected.into()) };
        match stream.try_write(question.as_bytes()) {
            Ok(written) if written == question.len() => Ok(()),
            Ok(_) => Err(io::Error::other("it does not read")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::Error::other("it does not read")),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn disconnect(&mut self) {
        self.stream = None;
        self.partial.clear();
    }

    /// The next answers, or why the connection has ended. Pending while there is none.
    ///
    /// Cancel safe: nothing is read before the last await.
    pub(crate) async fn answers(&mut self) -> io::Result<Vec<Answer>> {
        let Some(stream) = &self.stream else { return pending().await };
        if self.partial.len() > LONGEST {
            return Err(io::Error::other("it sends a line that does not end"));
        }
        let mut bytes = [0; 1024];
        loop {
            stream.readable().await?;
            match stream.try_read(&mut bytes) {
                Ok(0) => return Err(io::Error::other("it has closed the connection")),
                Ok(count) => {
                    self.partial.extend(&bytes[..count]);
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        let end = self.partial.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let rest = self.partial.split_off(end);
        let lines = mem::replace(&mut self.partial, rest);
        Ok(String::from_utf8_lossy(&lines).lines().map(answer).collect())
    }
}

fn answer(line: &str) -> Answer {
    let answer = match line.split_once(' ') {
        Some(("allow", id)) => id.parse().map(|id| Answer::To(id, true)),
        Some(("deny", id)) => id.parse().map(|id| Answer::To(id, false)),
        _ => return Answer::Nonsense,
    };
    answer.unwrap_or(Answer::Nonsense)
}
