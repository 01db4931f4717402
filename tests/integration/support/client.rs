//! A client that sees every byte.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Mutex;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, TcpStream};

use super::HANG;

/// An answer, its body inflated by no one.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Whether the body came whole.
    pub whole: bool,
}

impl Answer {
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    pub fn cache_status(&self) -> &str {
        self.field("cache-status").unwrap_or("")
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.plain()).into_owned()
    }

    /// The body, inflated if it is gzip.
    pub fn plain(&self) -> Vec<u8> {
        if self.field("content-encoding") == Some("gzip") {
            return sluice::http::encoding::gunzip(&self.body, 1 << 30).unwrap().to_vec();
        }
        self.body.clone()
    }
}

/// A connection from an address of this machine's loopback network.
pub async fn connect_from(address: SocketAddr, from: u8) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((IpAddr::V4(Ipv4Addr::new(127, 0, 0, from)), 0).into()).unwrap();
    socket.connect(address).await.unwrap()
}

/// A connection to a server, kept alive.
pub struct Connection(pub BufReader<TcpStream>);

/// The admin listeners that there are.
static ADMINS: Mutex<Vec<SocketAddr>> = Mutex::new(Vec::new());

/// This is none any more: its port may be another's soon.
pub fn forget_admin(address: SocketAddr) {
    let mut admins = ADMINS.lock().unwrap();
    if let Some(at) = admins.iter().position(|admin| *admin == address) {
        admins.swap_remove(at);
    }
}

/// This is an admin listener.
pub fn note_admin(address: SocketAddr) {
    ADMINS.lock().unwrap().push(address);
}

/// What a listener is asked for: the admin listener answers to its own names alone.
pub fn host_of(address: SocketAddr) -> String {
    if ADMINS.lock().unwrap().contains(&address) { address.to_string() } else { "api.test".to_owned() }
}

impl Connection {
    pub async fn open(address: SocketAddr) -> Self {
        Self(BufReader::new(TcpStream::connect(address).await.unwrap()))
    }

    fn host(&self) -> String {
        host_of(self.0.get_ref().peer_addr().unwrap())
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).await.unwrap();
    }

    pub async fn ask(&mut self, method: &str, target: &str, fields: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut head = format!("{method} {target} HTTP/1.1\r\nHost: {}\r\n", self.host());
        for (name, value) in fields {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !body.is_empty() {
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        self.send(&[head.as_bytes(), body].concat()).await;
        self.answer(method == "HEAD").await.unwrap_or_else(|| panic!("no answer to {method} {target}"))
    }

    /// The head of the next answer; `None` if the connection was closed instead.
    pub async fn head(&mut self) -> Option<Answer> {
        let read = async {
            let mut line = String::new();
            if self.0.read_line(&mut line).await.ok()? == 0 {
                return None;
            }
            let status = line.split(' ').nth(1)?.parse().ok()?;
            let mut fields = Vec::new();
            loop {
                line.clear();
                self.0.read_line(&mut line).await.ok()?;
                match line.trim_end().split_once(':') {
                    Some((name, value)) => fields.push((name.to_ascii_lowercase(), value.trim().to_owned())),
                    None => return Some(Answer { status, fields, body: Vec::new(), whole: true }),
                }
            }
        };
        tokio::time::timeout(HANG, read).await.expect("an answer's head")
    }

    pub async fn answer(&mut self, headless: bool) -> Option<Answer> {
        let mut answer = self.head().await?;
        if headless || answer.status == 304 || answer.status == 204 {
            return Some(answer);
        }
        let body = tokio::time::timeout(HANG, self.body(&answer)).await.expect("an answer's body");
        (answer.body, answer.whole) = body;
        Some(answer)
    }

    pub async fn body(&mut self, head: &Answer) -> (Vec<u8>, bool) {
        let mut body = Vec::new();
        if head.field("transfer-encoding").is_some() {
            loop {
                let mut line = String::new();
                if self.0.read_line(&mut line).await.unwrap_or(0) == 0 {
                    return (body, false);
                }
                let size = usize::from_str_radix(line.trim(), 16).unwrap();
                let mut chunk = vec![0; size + 2];
                if self.0.read_exact(&mut chunk).await.is_err() {
                    return (body, false);
                }
                if size == 0 {
                    return (body, true);
                }
                body.extend_from_slice(&chunk[..size]);
            }
        }
        let Some(length) = head.field("content-length") else {
            let whole = self.0.read_to_end(&mut body).await.is_ok();
            return (body, whole);
        };
        let length: u64 = length.parse().unwrap();
        let read = (&mut self.0).take(length).read_to_end(&mut body).await.unwrap_or(0);
        (body, read as u64 == length)
    }
}

pub async fn get(address: SocketAddr, target: &str, fields: &[(&str, &str)]) -> Answer {
    Connection::open(address).await.ask("GET", target, fields, b"").await
}
