//! A web client: a page over a connection of its own.

use super::OPERATION_BOUND;
use crate::artifacts::service::{HTTP_PORT, PAGE};
use crate::host::client::Client;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const ANSWER_MAX: u64 = 64 << 10;

/// Gets the page once.
///
/// # Errors
/// The connection's, and `InvalidData` when it is not the page.
pub fn get(client: &Client, address: Ipv4Addr) -> io::Result<()> {
    ask(client.tcp(SocketAddr::from((address, HTTP_PORT)), OPERATION_BOUND)?)
}

/// Gets the page, trying until the web server is up.
pub fn get_retry(client: &Client, address: Ipv4Addr, bound: Duration) -> io::Result<()> {
    let deadline = Instant::now() + bound;
    let left = || deadline.saturating_duration_since(Instant::now());
    ask(client.tcp_retry(SocketAddr::from((address, HTTP_PORT)), left())?)
}

fn ask(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(OPERATION_BOUND))?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: guest\r\n\r\n")?;
    let mut text = String::new();
    stream.take(ANSWER_MAX).read_to_string(&mut text)?;
    let page = text.split_once("\r\n\r\n").map(|(_, page)| page);
    if text.starts_with("HTTP/1.") && text.contains(" 200 ") && page == Some(PAGE) {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the web server answers {text:?}"),
        ))
    }
}
