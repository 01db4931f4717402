//! The bytes of HTTP/2 frames, written by hand so that they can be wrong, and a client that sees every frame.

use std::net::SocketAddr;

use sluice::front::hpack::Decoder;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::client::host_of;
use super::{Answer, HANG};

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Fields as literals that are not indexed, without Huffman coding (RFC 7541 §6.2.2).
pub fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            assert!(text.len() < 127);
            block.push(u8::try_from(text.len()).unwrap());
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

/// A connection's beginning.
pub fn opening() -> Vec<u8> {
    [PREFACE, &frame(4, 0, 0, &[])].concat()
}

/// What became of a stream.
#[derive(Clone, Debug)]
pub struct Streamed {
    /// The head of the answer, and the body so far; the status is zero if none came.
    pub answer: Answer,
    /// Whether the head ended the stream.
    pub bare: bool,
    /// How many frames of data came, also empty ones.
    pub data: usize,
    /// The code that the stream was reset with, or the connection ended.
    pub reset: Option<u32>,
}

/// A connection over HTTP/2.
pub struct Http2 {
    stream: TcpStream,
    decoder: Decoder,
    next: u32,
}

impl Http2 {
    pub async fn open(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // Windows that no test fills.
        let window = frame(8, 0, 0, &(1_u32 << 30).to_be_bytes());
        let settings = frame(4, 0, 0, &[0, 4, 0x40, 0, 0, 0]);
        stream.write_all(&[PREFACE, &settings, &window].concat()).await.unwrap();
        Self { stream, decoder: Decoder::default(), next: 1 }
    }

    /// Asks with these fields besides the pseudo-fields, and reads the answer. A body is sent without saying its length.
    pub async fn ask(&mut self, method: &str, target: &str, more: &[(&str, &str)], body: &[u8]) -> Streamed {
        let host = host_of(self.stream.peer_addr().unwrap());
        let pseudo = [(":method", method), (":scheme", "http"), (":authority", &*host), (":path", target)];
        self.send(&[&pseudo[..], more].concat(), body, None).await
    }

    /// Sends all of these fields, this body if it is not empty, and trailers.
    pub async fn send(&mut self, head: &[(&str, &str)], body: &[u8], trailers: Option<&[(&str, &str)]>) -> Streamed {
        let id = self.next;
        self.next += 2;
        let flags = |last| END_HEADERS | if last { END_STREAM } else { 0 };
        let mut bytes = frame(1, flags(body.is_empty() && trailers.is_none()), id, &fields(head));
        if !body.is_empty() {
            bytes.extend(frame(0, if trailers.is_none() { END_STREAM } else { 0 }, id, body));
        }
        if let Some(trailers) = trailers {
            bytes.extend(frame(1, flags(true), id, &fields(trailers)));
        }
        self.stream.write_all(&bytes).await.unwrap();
        tokio::time::timeout(HANG, self.read(id)).await.expect("an end of the stream")
    }

    async fn read(&mut self, id: u32) -> Streamed {
        let answer = Answer { status: 0, fields: Vec::new(), body: Vec::new(), whole: false };
        let mut streamed = Streamed { answer, bare: false, data: 0, reset: None };
        loop {
            let mut head = [0; 9];
            if self.stream.read_exact(&mut head).await.is_err() {
                streamed.reset.get_or_insert(0);
                return streamed;
            }
            let mut payload = vec![0; usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])];
            self.stream.read_exact(&mut payload).await.unwrap();
            let (kind, ends) = (head[3], head[4] & END_STREAM != 0);
            let fields = &mut streamed.answer.fields;
            if kind == 1 {
                assert_eq!(head[4] & 0x28, 0, "no padding or priority is expected");
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                self.decoder.decode(&payload, |name, value| fields.push((text(name), text(value)))).unwrap();
            }
            if u32::from_be_bytes([head[5], head[6], head[7], head[8]]) != id {
                if kind == 7 {
                    streamed.reset = Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()));
                    return streamed;
                }
                continue;
            }
            match kind {
                0 => {
                    streamed.data += 1;
                    streamed.answer.body.extend_from_slice(&payload);
                }
                1 if streamed.answer.status == 0 => {
                    let status = streamed.answer.field(":status").and_then(|status| status.parse().ok());
                    (streamed.answer.status, streamed.bare) = (status.expect("a status"), ends);
                }
                3 => {
                    streamed.reset = Some(u32::from_be_bytes(payload[..4].try_into().unwrap()));
                    return streamed;
                }
                _ => {}
            }
            if ends && kind < 2 {
                streamed.answer.whole = true;
                return streamed;
            }
        }
    }
}
