//! A backend that does what it is told, and remembers what it was asked.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

/// A request as the backend got it.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    pub target: String,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Asked {
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }
}

/// What the scripted backend does next.
pub enum Step {
    /// Writes bytes.
    Send(Vec<u8>),
    /// Waits for so long.
    Delay(Duration),
    /// Writes these bytes so many times.
    Repeat(Vec<u8>, usize),
    /// Does nothing until the client closes the connection.
    Hang,
    /// Breaks the connection off with a reset.
    Reset,
    /// Closes the connection.
    Close,
}

/// A whole answer of 200 with these fields.
pub fn ok(fields: &str, body: &[u8]) -> Vec<Step> {
    reply("200 OK", fields, body)
}

pub fn reply(status: &str, fields: &str, body: &[u8]) -> Vec<Step> {
    let head = format!("HTTP/1.1 {status}\r\n{fields}Content-Length: {}\r\n\r\n", body.len());
    vec![Step::Send([head.as_bytes(), body].concat())]
}

type Script = dyn Fn(&Asked) -> Vec<Step> + Send + Sync;

/// A backend that does what it is told and remembers what it was asked.
pub struct Backend {
    pub address: SocketAddr,
    pub asked: Arc<Mutex<Vec<Asked>>>,
    answering: Arc<AtomicUsize>,
    script: Arc<Script>,
    serving: Option<tokio::task::JoinHandle<()>>,
    /// Keeps the port from others while the backend is down. It does not listen: connections are refused.
    _port: TcpSocket,
}

fn bound(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.set_reuseport(true).unwrap();
    socket.bind(address).unwrap();
    socket
}

impl Backend {
    pub async fn start(script: impl Fn(&Asked) -> Vec<Step> + Send + Sync + 'static) -> Self {
        let port = bound("127.0.0.1:0".parse().unwrap());
        let mut backend = Self {
            address: port.local_addr().unwrap(),
            _port: port,
            asked: Arc::default(),
            answering: Arc::default(),
            script: Arc::new(script),
            serving: None,
        };
        backend.revive().await;
        backend
    }

    /// Answers with the target, and takes so long for it.
    pub async fn slow(delay: Duration) -> Self {
        Self::start(move |asked| {
            let mut steps = vec![Step::Delay(delay)];
            steps.extend(ok("", asked.target.as_bytes()));
            steps
        })
        .await
    }

    fn serve(&mut self, listener: TcpListener) {
        let (asked, answering, script) = (Arc::clone(&self.asked), Arc::clone(&self.answering), Arc::clone(&self.script));
        self.serving = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(converse(stream, Arc::clone(&asked), Arc::clone(&answering), Arc::clone(&script)));
            }
        }));
    }

    /// Ends it, connections and all.
    pub async fn kill(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
            let _ = serving.await;
        }
    }

    /// Starts it again where it was.
    pub async fn revive(&mut self) {
        self.serve(bound(self.address).listen(1024).unwrap());
    }

    pub fn count(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    pub fn count_of(&self, target: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|asked| asked.target == target).count()
    }

    /// Requests that it answers right now.
    pub fn answering(&self) -> usize {
        self.answering.load(Ordering::Relaxed)
    }

    pub fn last(&self) -> Asked {
        self.asked.lock().unwrap().last().expect("a request").clone()
    }
}

/// One request that is being answered.
struct Answering(Arc<AtomicUsize>);

impl Answering {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn converse(stream: TcpStream, asked: Arc<Mutex<Vec<Asked>>>, answering: Arc<AtomicUsize>, script: Arc<Script>) {
    let mut stream = BufReader::new(stream);
    while let Some(request) = read_request(&mut stream).await {
        let _answering = Answering::new(&answering);
        let steps = script(&request);
        asked.lock().unwrap().push(request);
        for step in steps {
            let done = match step {
                Step::Send(bytes) => stream.get_mut().write_all(&bytes).await.is_ok(),
                Step::Repeat(bytes, times) => {
                    let mut fine = true;
                    for _ in 0..times {
                        fine = fine && stream.get_mut().write_all(&bytes).await.is_ok();
                    }
                    fine
                }
                Step::Delay(span) => {
                    tokio::time::sleep(span).await;
                    true
                }
                Step::Hang => {
                    while let Ok(bytes) = stream.fill_buf().await
                        && !bytes.is_empty()
                    {
                        let count = bytes.len();
                        stream.consume(count);
                    }
                    false
                }
                Step::Reset => {
                    let _ = stream.get_ref().set_zero_linger();
                    false
                }
                Step::Close => false,
            };
            if !done {
                return;
            }
        }
    }
}

/// A line, whatever its bytes.
async fn read_line(stream: &mut BufReader<TcpStream>) -> Option<String> {
    let mut line = Vec::new();
    stream.read_until(b'\n', &mut line).await.ok().filter(|&read| read > 0)?;
    Some(String::from_utf8_lossy(&line).into_owned())
}

async fn read_request(stream: &mut BufReader<TcpStream>) -> Option<Asked> {
    let line = read_line(stream).await?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut fields = Vec::new();
    loop {
        let line = read_line(stream).await?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => fields.push((name.to_ascii_lowercase(), value.trim().to_owned())),
            None => break,
        }
    }
    let mut asked = Asked { method, target, fields, body: Vec::new() };
    if let Some(length) = asked.field("content-length").and_then(|length| length.parse().ok()) {
        asked.body = vec![0; length];
        stream.read_exact(&mut asked.body).await.ok()?;
    } else if asked.field("transfer-encoding").is_some() {
        loop {
            let size = usize::from_str_radix(read_line(stream).await?.trim(), 16).ok()?;
            let mut chunk = vec![0; size + 2];
            stream.read_exact(&mut chunk).await.ok()?;
            if size == 0 {
                break;
            }
            asked.body.extend_from_slice(&chunk[..size]);
        }
    }
    Some(asked)
}
