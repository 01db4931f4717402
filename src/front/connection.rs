//! One connection: requests out of it, responses into it, until it is closed, overdue, or told to end.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use http::header::CONNECTION;
use http::{HeaderMap, HeaderValue, Method, Request, Response, Version};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;

use super::body::{RequestBody, ResponseBody};
use super::connection_limits::Admitted;
use super::deadlines::{Activity, InFlight, Overdue, watchdog};
use super::frames;
use super::message::{Fields, MAX_FIELDS, join_cookies};
use super::outgoing;
use super::select::{Either, select};
use super::settling::Settling;
use super::socket::{Notes, Socket};
use super::stream::{Stream, Streams};
use crate::body::lent::{Cut, Reading};
use crate::body::{BoxError, Reply};
use crate::config::Limits;
use crate::request::Arrival;
use crate::request::interim::InterimQueue;
use crate::request::refusal::Refusal;
use crate::request::short_way::ShortWay;

/// Streams of one HTTP/2 connection that may be open at a time, as with nginx.
const MAX_STREAMS: u32 = 128;
/// Bytes of one stream that the library takes before the client has room for them.
const MAX_UNSENT: usize = 256 << 10;
/// How often an HTTP/2 client is pinged, and how long it has to answer.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// How long an HTTP/2 connection that is closed may take to tell its client so.
const GOODBYE: Duration = Duration::from_millis(100);
/// How long an idle HTTP/1 connection may bring one more request once the program is told to stop.
const LAST_REQUEST: Duration = Duration::from_secs(1);

/// How long a connection is quiet before what the HTTP library holds of it is given back.
const REST: Duration = Duration::from_millis(if cfg!(test) { 20 } else { 1000 });

/// Why a connection was ended that could have gone on.
#[derive(Debug)]
enum Ended {
    /// The HTTP library, or the connection, failed.
    Broken(BoxError),
    /// It was overdue.
    Overdue(Overdue),
}

impl<E: Into<BoxError>> From<E> for Ended {
    fn from(error: E) -> Self {
        Self::Broken(error.into())
    }
}

/// What a connection is told while it is served.
enum Told {
    /// It is overdue, and why.
    Overdue(Overdue),
    /// The program stops.
    End,
}

/// Serves a connection. What ends it is logged at debug: clients come and go.
///
/// Plain requests go the `short` way, if there is one: what it does not answer is answered by `answer`.
pub async fn serve<F, A>(
    stream: TcpStream,
    peer: SocketAddr,
    admitted: &Admitted,
    (answer, short): (F, Option<Arc<dyn ShortWay>>),
    draining: watch::Receiver<bool>,
) where
    F: Fn(Request<RequestBody>, Arrival) -> A + Clone + Send + Unpin + 'static,
    A: Future<Output = Response<Reply>> + Send + 'static,
{
    let (limits, activity) = (admitted.limits(), Arc::clone(&admitted.activity));
    let (interim, notes) = (Arc::new(InterimQueue::default()), Arc::new(Notes::default()));
    let ending = Arc::new(AtomicBool::new(false));
    let shared = (Arc::clone(&activity), Arc::clone(&interim), Arc::clone(&notes), Arc::clone(&ending));
    let socket = Socket::new(stream, limits, short, shared);
    let (counted, end) = (Arc::clone(&activity), Arc::clone(&ending));
    let streams = Streams::new(admitted.closed());
    let opened = streams.clone();
    let service = service_fn(move |mut request: Request<Incoming>| {
        let (version, ending, notes, connection) = (request.version(), Arc::clone(&ending), Arc::clone(&notes), Arc::clone(&counted));
        let is_head = request.method() == Method::HEAD;
        let in_flight = InFlight::begin(&counted, version);
        let stream = (version == Version::HTTP_2).then(|| Stream::new(limits));
        if let Some(stream) = &stream {
            opened.open(Arc::clone(stream));
        }
        let number = counted.did_read_request(version == Version::HTTP_2);
        let refused = notes.refused.get().filter(|(at, _)| *at == number).map(|&(_, refusal)| refusal);
        let refused = refused.or_else(|| if version == Version::HTTP_2 { enter_http2(request.headers_mut()) } else { None });
        if let Some(brought) = notes.brought_for(number) {
            request.extensions_mut().extend(brought);
        }
        // Interim responses are for HTTP/1.1 (RFC 9110 §15.2); HTTP/2 would frame them otherwise.
        let sender = (version == Version::HTTP_11).then(|| interim.open());
        let arrival = Arrival { peer: peer.ip(), interim: sender.clone(), own: false, refused };
        let answering = answer(request.map(|body| RequestBody::new(body, limits)), arrival);
        // Apart, since the library would keep its room until the client has the last byte.
        Box::pin(async move {
            let mut response = outgoing::fit(is_head, answering.await);
            if let Some(reading) = response.extensions_mut().remove::<Arc<Reading>>() {
                reading.is_for(Reader { stream: stream.as_ref().map(Arc::downgrade), connection: Arc::downgrade(&connection) });
            }
            if version != Version::HTTP_2 && (refused.is_some() || ending.load(Ordering::Relaxed) && version == Version::HTTP_11) {
                // What follows has no meaning, or is for another process.
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            if let Some(sender) = sender {
                sender.close().await;
            }
            let response = response.map(|body| ResponseBody::new(body, in_flight, stream));
            Ok::<_, Infallible>(if version == Version::HTTP_2 { response } else { response.map(|body| body.over_http1(version, notes)) })
        })
    });
    let watched = Watched { activity, limits, draining, end, streams };
    match watched.serve(socket, service).await {
        Ok(()) => {}
        Err(Ended::Broken(error)) => tracing::debug!(%peer, error, "a connection ended early"),
        Err(Ended::Overdue(why)) => {
            admitted.count_closed(why);
            tracing::debug!(%peer, %why, "a connection was closed");
        }
    }
}

/// Has a request that came over HTTP/2 say what it would over HTTP/1, whose bytes were checked before. Why it is refused, if it is.
fn enter_http2(headers: &mut HeaderMap) -> Option<Refusal> {
    let refused = frames::refused(headers).or_else(|| Fields::of_http2(headers));
    join_cookies(headers);
    refused
}

/// What a connection is served under.
struct Watched<'l> {
    activity: Arc<Activity>,
    limits: &'l Limits,
    draining: watch::Receiver<bool>,
    /// Set once the connection is to end.
    end: Arc<AtomicBool>,
    /// Runs the streams, over HTTP/2.
    streams: Streams,
}

impl Watched<'_> {
    /// Serves until the connection ends. It has the HTTP library's state and buffers only from the first request that needs them
    /// until it has been quiet for a while: most connections of a busy server are idle, or ask for what is answered without.
    async fn serve<S>(mut self, mut socket: Socket, mut service: S) -> Result<(), Ended>
    where
        S: HttpService<Incoming, ResBody = ResponseBody, Error = Infallible, Future: Send + 'static> + Unpin,
    {
        loop {
            match select(pin!(socket.answer_plain()), pin!(told(&self.activity, self.limits, &mut self.draining))).await {
                Either::Busy(arrived) => arrived?,
                Either::Quiet(Told::Overdue(why)) => return Err(Ended::Overdue(why)),
                // The library knows how to end a connection.
                Either::Quiet(Told::End) => {}
            }
            // Apart, since many a connection never needs it.
            if socket.is_http2() {
                return Box::pin(self.serve_http2(socket, service)).await;
            }
            match Box::pin(self.serve_http1(socket, service)).await? {
                Some(rested) => (socket, service) = rested,
                None => return Ok(()),
            }
        }
    }

    /// Serves HTTP/1 until the connection ends (`None`), or has been quiet for a while.
    async fn serve_http1<S>(&mut self, socket: Socket, service: S) -> Result<Option<(Socket, S)>, Ended>
    where
        S: HttpService<Incoming, ResBody = ResponseBody, Error = Infallible, Future: Send + 'static> + Unpin,
    {
        // The watchdog keeps the deadlines, with one timer a connection instead of one a request.
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(self.limits.header_bytes).max_headers(MAX_FIELDS);
        let mut serving = builder.serve_connection(TokioIo::new(socket), service);
        loop {
            let quiet_or_told = async {
                tokio::select! {
                    told = told(&self.activity, self.limits, &mut self.draining) => Some(told),
                    () = self.activity.quiet_for(REST) => None,
                }
            };
            match select(Pin::new(&mut serving), pin!(quiet_or_told)).await {
                Either::Busy(ended) => {
                    ended?;
                    let http1::Parts { io, service, .. } = serving.into_parts();
                    let mut socket = io.into_inner();
                    return Ok(socket.has_rested().then_some((socket, service)));
                }
                Either::Quiet(Some(Told::Overdue(why))) => return Err(Ended::Overdue(why)),
                // The socket tells the library that the connection ended, if nothing has moved in the meantime.
                Either::Quiet(None) => self.activity.rest(),
                Either::Quiet(Some(Told::End)) => break,
            }
        }
        // A client may be sending a request right now, which would be lost: it is answered, and told to come again anew.
        self.end.store(true, Ordering::Relaxed);
        let ended = loop {
            match timeout(LAST_REQUEST, select(Pin::new(&mut serving), pin!(overdue(&self.activity, self.limits)))).await {
                Ok(ended) => break ended,
                // The library would close under an answer that it knows nothing of.
                Err(_) if self.activity.all_answered().is_none() => {}
                Err(_) => {
                    Pin::new(&mut serving).graceful_shutdown();
                    break select(Pin::new(&mut serving), pin!(overdue(&self.activity, self.limits))).await;
                }
            }
        };
        match ended {
            Either::Busy(ended) => Ok(ended.map(|()| None)?),
            Either::Quiet(why) => Err(Ended::Overdue(why)),
        }
    }

    /// Serves HTTP/2 until the connection ends. It has a message of its own for an end.
    async fn serve_http2<S>(mut self, socket: Socket, service: S) -> Result<(), Ended>
    where
        S: HttpService<Incoming, ResBody = ResponseBody, Error = Infallible, Future: Send + 'static> + Unpin,
    {
        let mut builder = http2::Builder::new(self.streams.clone());
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_send_buf_size(MAX_UNSENT)
            .max_header_list_size(u32::try_from(self.limits.header_bytes).unwrap_or(u32::MAX))
            .keep_alive_interval(Some(PING_INTERVAL))
            .keep_alive_timeout(PING_TIMEOUT);
        let serving = pin!(builder.serve_connection(TokioIo::new(socket), service));
        let mut serving = Settling::new(serving, Arc::clone(&self.activity));
        match select(Pin::new(&mut serving), pin!(told(&self.activity, self.limits, &mut self.draining))).await {
            Either::Busy(ended) => return Ok(ended?),
            Either::Quiet(Told::Overdue(why)) => {
                // The client hears that the connection ends (GOAWAY), and which of its requests were seen.
                serving.serving().graceful_shutdown();
                drop(timeout(GOODBYE, serving).await);
                return Err(Ended::Overdue(why));
            }
            Either::Quiet(Told::End) => serving.serving().graceful_shutdown(),
        }
        let mut overdue = pin!(overdue(&self.activity, self.limits));
        loop {
            match timeout(LAST_REQUEST, select(Pin::new(&mut serving), overdue.as_mut())).await {
                Ok(Either::Busy(ended)) => return Ok(ended?),
                Ok(Either::Quiet(why)) => return Err(Ended::Overdue(why)),
                // The library waits for the client to confirm that the connection ends.
                Err(_) if self.activity.idle_for().is_some_and(|idle| idle >= LAST_REQUEST) => return Ok(()),
                Err(_) => {}
            }
        }
    }
}

/// What reads a large body: a stream of HTTP/2 as long as its client has not made room for all of the answer, else the connection.
struct Reader {
    stream: Option<Weak<Stream>>,
    connection: Weak<Activity>,
}

impl Cut for Reader {
    fn cut(&self) {
        match (self.stream.as_ref().and_then(Weak::upgrade), self.connection.upgrade()) {
            (Some(stream), _) => stream.cut(),
            (None, Some(connection)) => connection.cut(),
            (None, None) => {}
        }
    }
}

/// Waits until a connection that ends must not last any longer, and returns why.
async fn overdue(activity: &Activity, limits: &Limits) -> Overdue {
    tokio::select! {
        why = watchdog(activity, limits) => why,
        why = activity.gives_way() => why,
    }
}

/// Waits for what a connection is to be told.
async fn told(activity: &Activity, limits: &Limits, draining: &mut watch::Receiver<bool>) -> Told {
    tokio::select! {
        why = overdue(activity, limits) => Told::Overdue(why),
        _ = draining.wait_for(|&draining| draining) => Told::End,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front::connection_limits::ConnectionLimits;
    use crate::request::short_way::Way;
    use bytes::Bytes;
    use http::Extensions;
    use http_body::{Body, Frame};
    use http_body_util::BodyExt as _;
    use std::task::{Context, Poll};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::sync::{Notify, oneshot};
    use tokio::task::JoinHandle;
    use tokio::time::{Instant, sleep};

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    fn limits() -> Limits {
        crate::config::check("t", "[backend]\nurl='http://127.0.0.1:1'", &|_| None).config.unwrap().limits
    }

    async fn read_response(client: &mut TcpStream) -> String {
        let mut text = String::new();
        while !text.ends_with("\r\n\r\nhello") {
            let mut bytes = [0; 1024];
            let count = client.read(&mut bytes).await.unwrap();
            assert!(count > 0, "closed after {text:?}");
            text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        }
        text
    }

    /// Without a short way, so that every request goes to the library.
    async fn hello(_: Request<RequestBody>, _: Arrival) -> Response<Reply> {
        Response::new(Reply::Full(Some("hello".into())))
    }

    #[tokio::test(start_paused = true)]
    async fn a_quiet_connection_leaves_the_library_and_comes_back() {
        let (mut client, server) = pair().await;
        let (limits, activity) = (limits(), Arc::new(Activity::default()));
        let (counted, end) = (Arc::clone(&activity), Arc::new(AtomicBool::new(false)));
        let service = service_fn(move |request: Request<Incoming>| {
            let in_flight = InFlight::begin(&counted, request.version());
            counted.did_read_request(false);
            async move {
                let reply = Reply::Full(Some("hello".into()));
                Ok::<_, Infallible>(Response::new(ResponseBody::new(reply, in_flight, None)))
            }
        });
        let shared = (Arc::clone(&activity), Arc::default(), Arc::default(), Arc::clone(&end));
        let socket = Socket::new(server, &limits, None, shared);
        let (_stop, draining) = watch::channel(false);
        let mut watched = Watched { activity, limits: &limits, draining, end, streams: Streams::new(None) };
        let mut rested = Some((socket, service));
        for _ in 0..3 {
            client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
            let (mut socket, service) = rested.take().unwrap();
            socket.answer_plain().await.unwrap();
            let serving = watched.serve_http1(socket, service);
            let (back, text) = tokio::join!(serving, read_response(&mut client));
            assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
            rested = back.unwrap();
            assert!(rested.is_some(), "it stayed in the library");
        }
        drop(client);
        let (mut socket, service) = rested.take().unwrap();
        socket.answer_plain().await.unwrap();
        assert!(watched.serve_http1(socket, service).await.unwrap().is_none(), "it did not end with the client");
    }

    #[tokio::test]
    async fn requests_at_any_distance_are_answered_also_in_pieces() {
        let (mut client, serving) = served(|request, arrival| Box::pin(hello(request, arrival)), None).await;
        let whole = ["GET / HTTP/1.1\r\nHost: a\r\n\r\n", ""];
        for (pause, pieces) in [(0, ["GET / HTTP/1.1\r\nHo", "st: a\r\n\r\n"]), (19, whole), (21, whole), (60, ["G", &whole[0][1..]])] {
            sleep(Duration::from_millis(pause)).await;
            client.write_all(pieces[0].as_bytes()).await.unwrap();
            // Longer than a connection stays quiet before it leaves the library, shorter than a head may take.
            sleep(REST * 2).await;
            client.write_all(pieces[1].as_bytes()).await.unwrap();
            read_response(&mut client).await;
        }
        drop(client);
        serving.await.unwrap();
    }

    /// A connection that is served; it ends with its client.
    async fn served<F, A>(answer: F, short: Option<Arc<dyn ShortWay>>) -> (TcpStream, JoinHandle<()>)
    where
        F: Fn(Request<RequestBody>, Arrival) -> A + Clone + Send + Unpin + 'static,
        A: Future<Output = Response<Reply>> + Send + 'static,
    {
        let (client, server) = pair().await;
        let peer = server.peer_addr().unwrap();
        let serving = tokio::spawn(async move {
            let (_stop, draining) = watch::channel(false);
            let counts = ConnectionLimits::uncounted(limits());
            let admitted = counts.admit(peer.ip()).await.unwrap();
            serve(server, peer, &admitted, (answer, short), draining).await;
        });
        (client, serving)
    }

    /// Waits for another thread, then answers what asks for `/short`; the rest goes to the library with what was brought. Tells when
    /// it has seen a piece of a request.
    struct Slow(Arc<Notify>);

    impl ShortWay for Slow {
        fn answer(&self, bytes: &[u8], _: Instant, brought: Option<&Extensions>, head: &mut Vec<u8>) -> Way {
            match brought {
                None if bytes.ends_with(b"\r\n\r\n") => {
                    let (sender, receiver) = oneshot::channel();
                    let number = bytes.len();
                    std::thread::spawn(move || sender.send(number));
                    Way::Wait(Box::pin(async {
                        let mut brought = Extensions::new();
                        brought.insert(receiver.await.unwrap());
                        brought
                    }))
                }
                Some(brought) if bytes.starts_with(b"GET /short ") => {
                    head.extend_from_slice(format!("HTTP/1.1 200 OK\r\nx-brought: {:?}\r\n\r\n", brought.get::<usize>()).as_bytes());
                    Way::Answered("hello".into(), None)
                }
                None => {
                    self.0.notify_one();
                    Way::Library
                }
                Some(_) => Way::Library,
            }
        }
    }

    /// Pieces, then an error.
    struct Breaks(usize);

    impl Body for Breaks {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            let piece = |left: usize| Frame::data(Bytes::from(vec![if left == 1 { b'e' } else { b'x' }; 50_000]));
            let left = self.0;
            self.0 = left.saturating_sub(1);
            Poll::Ready(Some(if left > 0 { Ok(piece(left)) } else { Err("it broke off".into()) }))
        }
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_reaches_a_client_that_reads_late() {
        let breaks = |_, _| Box::pin(async { Response::new(Reply::Stream(Breaks(400).boxed_unsync())) });
        let (mut client, serving) = served(breaks, None).await;
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        // What the kernel takes is far less than the body: the error is there long before the last bytes are written.
        sleep(REST * 10).await;
        let mut came = Vec::new();
        client.read_to_end(&mut came).await.unwrap();
        assert_eq!(came.iter().filter(|&&byte| byte == b'e').count() / 50_000, 1);
        assert!(came.len() > 400 * 50_000 && !came.ends_with(b"0\r\n\r\n"), "{}", came.len());
        serving.await.unwrap();
    }

    async fn tell_brought(request: Request<RequestBody>, _: Arrival) -> Response<Reply> {
        let brought = format!("{:?}", request.extensions().get::<usize>());
        let mut response = Response::new(Reply::Full(Some("hello".into())));
        response.headers_mut().insert("x-brought", brought.parse().unwrap());
        response
    }

    #[tokio::test]
    async fn what_a_request_waited_for_is_used_for_that_request_alone() {
        let seen = Arc::new(Notify::new());
        let (mut client, serving) =
            served(|request, arrival| Box::pin(tell_brought(request, arrival)), Some(Arc::new(Slow(Arc::clone(&seen))))).await;
        for turn in 0..200 {
            let (path, whole) = (["/short", "/long", "/some/longer"][turn % 3], turn % 5 != 4);
            let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
            // In pieces it goes to the library at once.
            let (first, second) = request.split_at(if whole { request.len() } else { 9 });
            client.write_all(first.as_bytes()).await.unwrap();
            if !whole {
                seen.notified().await;
                client.write_all(second.as_bytes()).await.unwrap();
            }
            let expected = whole.then_some(request.len());
            let text = read_response(&mut client).await;
            assert!(text.contains(&format!("x-brought: {expected:?}\r\n")), "{turn} {path}: {text}");
        }
        drop(client);
        serving.await.unwrap();
    }
}
