//! Calls to the admin listener of the running proxy.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::{Instant, sleep, timeout};

use super::{NO, UNREACHED, complain, load, say};
use crate::body::BoxError;
use crate::config::Config;
use crate::config::tokens::Right;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long something is followed that takes its time.
const LONGEST: Duration = Duration::from_secs(3600);
/// Between two looks at it.
const BETWEEN: Duration = Duration::from_millis(200);

/// The admin listener of the configured proxy.
pub struct Client {
    config: Config,
    runtime: Runtime,
}

impl Client {
    /// A client with the address and the tokens that a configuration names.
    ///
    /// # Errors
    /// The exit code, once the reason was told.
    pub fn new(path: &Path) -> Result<Self, ExitCode> {
        let config = load(path)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
            complain(format_args!("sluice: cannot start: {error}"));
            ExitCode::from(UNREACHED)
        })?;
        Ok(Self { config, runtime })
    }

    /// What the proxy says. With a right that is needed it is a POST.
    ///
    /// # Errors
    /// The exit code, once the reason was told.
    pub fn ask(&self, right: Option<Right>, target: &str) -> Result<String, ExitCode> {
        let address = self.config.admin.listen;
        match self.runtime.block_on(exchange(&self.config, right, target)) {
            Ok((status, body)) if status.is_success() => Ok(String::from_utf8_lossy(&body).trim_end().to_owned()),
            Ok((status, body)) => {
                complain(format_args!("sluice: {address} says {status}: {}", String::from_utf8_lossy(&body).trim_end()));
                Err(ExitCode::from(NO))
            }
            Err(error) => {
                complain(format_args!("sluice: no proxy answers at {address} (admin.listen): {error}"));
                Err(ExitCode::from(UNREACHED))
            }
        }
    }

    /// The same, read as JSON.
    ///
    /// # Errors
    /// The exit code, once the reason was told.
    pub fn ask_json(&self, right: Option<Right>, target: &str) -> Result<Value, ExitCode> {
        let text = self.ask(right, target)?;
        serde_json::from_str(&text).map_err(|error| {
            complain(format_args!("sluice: what answers at {} (admin.listen) is no Sluice: {error}", self.config.admin.listen));
            ExitCode::from(UNREACHED)
        })
    }

    /// Does nothing for a while.
    pub fn pause(&self, span: Duration) {
        // A timer is made within a runtime.
        self.runtime.block_on(async move { sleep(span).await });
    }

    /// Asks again and again until `is_done`, and shows on a terminal how far it is (what `show` makes of it).
    ///
    /// # Errors
    /// The exit code, once the reason was told.
    pub fn follow(&self, target: &str, is_done: impl Fn(&Value) -> bool, show: impl Fn(&Value) -> String) -> Result<Value, ExitCode> {
        let terminal = std::io::stderr().is_terminal();
        let started = Instant::now();
        loop {
            let said = self.ask_json(None, target)?;
            if terminal {
                let end = if is_done(&said) { "\n" } else { "" };
                progress(&format!("\r{} ({} s)   {end}", show(&said), started.elapsed().as_secs()));
            }
            if is_done(&said) || started.elapsed() > LONGEST {
                return Ok(said);
            }
            self.pause(BETWEEN);
        }
    }
}

/// The process that serves before this one takes over, by a connection that it had accepted before: whoever connects later may reach
/// either.
pub struct Predecessor(std::net::TcpStream);

impl Predecessor {
    /// Reaches it at the admin listener.
    ///
    /// # Errors
    /// Nobody is there.
    pub fn reach(config: &Config) -> std::io::Result<Self> {
        let stream = std::net::TcpStream::connect_timeout(&reachable(config), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(stream))
    }

    /// Has it stop, after it has left what it has in memory.
    ///
    /// # Errors
    /// It may not be stopped with the tokens of this configuration, or does not answer.
    pub fn stop(mut self, config: &Config) -> Result<(), BoxError> {
        let token = config.admin.tokens.with(Some(Right::Stop)).map(|token| token.0.as_str()).unwrap_or_default();
        let address = reachable(config);
        let head = format!("POST /stop HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n");
        self.0.write_all(head.as_bytes())?;
        let mut answer = String::new();
        self.0.read_to_string(&mut answer)?;
        if answer.starts_with("HTTP/1.1 200 ") { Ok(()) } else { Err(answer.lines().next().unwrap_or("it closed the connection").into()) }
    }
}

/// The address of the admin listener, for whoever connects from here.
fn reachable(config: &Config) -> SocketAddr {
    let mut address = config.admin.listen;
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() });
    }
    address
}

/// Writes a line that is written over.
fn progress(text: &str) {
    let mut out = std::io::stderr().lock();
    // A terminal that is gone is no reason to stop.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Calls the admin listener of the configured proxy and prints what it says.
pub fn call(path: &Path, right: Option<Right>, target: &str) -> ExitCode {
    exit(Client::new(path).and_then(|client| client.ask(right, target)))
}

/// Prints what came of a command, unless why nothing did was told already.
pub fn exit(result: Result<impl std::fmt::Display, ExitCode>) -> ExitCode {
    match result {
        Ok(said) => {
            say(said);
            ExitCode::SUCCESS
        }
        Err(code) => code,
    }
}

async fn exchange(config: &Config, right: Option<Right>, target: &str) -> Result<(StatusCode, Bytes), BoxError> {
    let address = reachable(config);
    let work = async {
        let stream = TcpStream::connect(address).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let method = if right.is_some() { Method::POST } else { Method::GET };
        let mut request = Request::builder().method(method).uri(target).header(HOST, address.to_string());
        if let Some(token) = config.admin.tokens.with(right) {
            request = request.header(AUTHORIZATION, format!("Bearer {}", token.0));
        }
        let answer = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
        let status = answer.status();
        Ok((status, answer.into_body().collect().await?.to_bytes()))
    };
    timeout(PATIENCE, work).await?
}
