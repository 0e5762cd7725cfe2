//! A client for the examples that serve HTTP.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
};

use crate::common::PATIENCE;

/// The status and the content of the response.
pub(super) fn request(server: SocketAddr, method: &str, path: &str) -> (u16, String) {
    let mut stream = connect(server);
    stream.write_all(head(method, path).as_bytes()).unwrap();
    response(stream)
}

pub(super) fn connect(server: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(server).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

pub(super) fn head(method: &str, path: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: example\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
}

/// Reads it up to the end of the connection.
pub(super) fn response(mut stream: TcpStream) -> (u16, String) {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, content) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("{text:?}")), content.to_owned())
}
