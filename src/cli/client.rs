//! Calls to the admin listener of the running proxy.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{NO, UNREACHED, complain, load, say};
use crate::body::BoxError;
use crate::config::Config;

/// A purge walks all of Redis, which takes a while.
const PATIENCE: Duration = Duration::from_secs(120);

/// Calls the admin listener of the configured proxy and prints what it says.
pub fn call(path: &Path, method: &Method, target: &str) -> ExitCode {
    let config = match load(path) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let address = config.admin.listen;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let answer = runtime.map_err(BoxError::from).and_then(|runtime| runtime.block_on(exchange(&config, method, target)));
    match answer {
        Ok((status, body)) if status.is_success() => {
            say(String::from_utf8_lossy(&body).trim_end());
            ExitCode::SUCCESS
        }
        Ok((status, body)) => {
            complain(format_args!("sluice: {address} says {status}: {}", String::from_utf8_lossy(&body).trim_end()));
            ExitCode::from(NO)
        }
        Err(error) => {
            complain(format_args!("sluice: no proxy answers at {address} (admin.listen): {error}"));
            ExitCode::from(UNREACHED)
        }
    }
}

async fn exchange(config: &Config, method: &Method, target: &str) -> Result<(StatusCode, Bytes), BoxError> {
    let mut address: SocketAddr = config.admin.listen;
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() });
    }
    let work = async {
        let stream = TcpStream::connect(address).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(target).header(HOST, address.to_string());
        if let Some(token) = &config.admin.token {
            request = request.header(AUTHORIZATION, format!("Bearer {}", token.0));
        }
        let answer = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
        let status = answer.status();
        Ok((status, answer.into_body().collect().await?.to_bytes()))
    };
    timeout(PATIENCE, work).await?
}
