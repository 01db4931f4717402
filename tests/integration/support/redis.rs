//! A private Redis, on a free port, with throw-away data.

use std::process::{Command, Stdio};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::process::{Process, scratch};
use super::{HANG, until};

/// A private Redis.
pub struct Redis {
    pub process: Process,
    pub port: u16,
    extra: Vec<String>,
}

impl Redis {
    pub async fn start(extra: &[&str]) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self::on(port, extra.iter().map(|&text| text.to_owned()).collect()).await
    }

    pub async fn on(port: u16, extra: Vec<String>) -> Self {
        let dir = scratch();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"]).arg(&dir).args(&extra);
        let process = Process::start(command.stdout(Stdio::null()), dir);
        let redis = Self { process, port, extra };
        until("Redis takes connections", || async { TcpStream::connect(("127.0.0.1", port)).await.is_ok() }).await;
        redis
    }

    /// Ends it and starts it anew, empty, on the same port.
    pub async fn restart(self) -> Self {
        let (port, extra) = (self.port, self.extra.clone());
        drop(self);
        Self::on(port, extra).await
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    /// Runs a command and returns its raw answer's lines.
    pub async fn command(&self, words: &[&[u8]]) -> Vec<u8> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            request.extend_from_slice(word);
            request.extend_from_slice(b"\r\n");
        }
        request.extend_from_slice(b"*1\r\n$4\r\nQUIT\r\n");
        stream.write_all(&request).await.unwrap();
        let mut answer = Vec::new();
        tokio::time::timeout(HANG, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        answer.truncate(answer.len().saturating_sub(5));
        answer
    }

    /// The names of all entries.
    pub async fn keys(&self) -> Vec<String> {
        let answer = String::from_utf8_lossy(&self.command(&[b"KEYS", b"*"]).await).into_owned();
        answer.lines().skip(1).filter(|line| !line.starts_with('$') && !line.contains('!')).map(str::to_owned).collect()
    }
}
