//! `GET /api/liquidation-orders/stream`: all orders of a symbol within a span, one JSON object a line.
//!
//! Lines are written as the orders arrive, in constant memory, and orders are read only as fast as the client takes
//! the lines. A client that leaves drops the body, which ends the writing task, which ends the query.

use std::io::Write as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use http::{HeaderValue, Response};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use tokio::sync::mpsc;

use super::answer::{ApiError, sentence, set_gzip};
use super::json::{Style, write_order, write_text};
use super::liquidation_orders::BAD_TIMES;
use super::orders::{Batches, Orders, OrdersError};
use super::params::{Params, span};
use super::schema::{Invalid, Refusal};
use crate::body::{BoxError, Stream};
use crate::request::target::Target;
use crate::telemetry::seldom::Seldom;
use crate::upstream::failure::{BrokenBody, Failure};

/// A database that fails may do so in as many streams as clients ask for.
static BROKEN_OFF: Seldom = Seldom::new();

/// The largest `batch_size`. It has no effect but is checked.
pub const LARGEST_BATCH: i64 = 5000;

/// Newline-delimited JSON, newest order first.
///
/// # Errors
/// 422 and 400 as the contract orders them; the database's, as long as nothing was sent.
#[utoipa::path(
    get,
    path = "/api/liquidation-orders/stream",
    operation_id = "stream_liquidation_orders_api_liquidation_orders_stream_get",
    summary = "All orders of a symbol within a span, as a download",
    description = "",
    tag = "liquidations",
    params(
        ("symbol" = String, Query, description = "Such as BTCUSDT, in upper or lower case"),
        ("start_timestamp" = String, Query, description = "Unix milliseconds or ISO 8601"),
        ("end_timestamp" = String, Query, description = "Unix milliseconds or ISO 8601; included"),
        ("batch_size" = Option<i64>, Query, description = "Checked, and without effect", minimum = 1, maximum = 5000),
    ),
    responses(
        (
            status = 200,
            description = "All orders of the span, newest first, one JSON object a line. A stream that fails half-way ends with a line \
                           {\"error\": \"…\"} and a broken connection",
            body = String,
            content_type = "application/x-ndjson",
        ),
        (status = 400, description = "Timestamps that make no sense", body = Refusal),
        (status = 422, description = "Missing parameters, or numbers out of range", body = Invalid),
        (status = 503, description = "The database cannot be reached, or too many queries wait for it", body = Refusal),
        (status = 504, description = "The query took too long", body = Refusal),
    ),
)]
pub async fn get<O: Orders>(orders: &O, target: &Target<'_>, gzip: bool) -> Result<Response<Stream>, ApiError> {
    let mut params = Params::new(target);
    let symbol = params.required("symbol");
    let (from, to) = (params.required("start_timestamp"), params.required("end_timestamp"));
    params.count("batch_size", Some(LARGEST_BATCH));
    params.finish()?;
    let batches = orders.stream(&symbol, span(&from, &to, BAD_TIMES, None)?).await?;
    let (lines, body) = mpsc::channel(1);
    tokio::spawn(write(batches, lines, if gzip { Packer::gzip() } else { Packer::Plain }));
    let mut response = Response::new(Lines { lines: body, failing: None }.boxed_unsync());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    if gzip {
        set_gzip(headers);
    }
    headers.insert(CONTENT_DISPOSITION, disposition(&format!("liquidation_orders_{symbol}_{from}_{to}.jsonl")));
    Ok(response)
}

/// `attachment` under a name in ISO 8859-1, in which header fields were once written; other letters become `?`.
fn disposition(name: &str) -> HeaderValue {
    let text = format!("attachment; filename={name}");
    let bytes: Vec<u8> = text.chars().map(|letter| u8::try_from(letter).unwrap_or(b'?')).collect();
    HeaderValue::from_bytes(&bytes).unwrap_or(HeaderValue::from_static("attachment"))
}

/// What the body gets: lines, or the last line and why there are no more.
type Written = Result<Bytes, (Bytes, OrdersError)>;

async fn write<E: Into<OrdersError>>(mut batches: Batches<E>, lines: mpsc::Sender<Written>, mut packer: Packer) {
    while let Some(batch) = batches.next().await {
        let written = match batch {
            Ok(orders) => {
                let mut text = String::with_capacity(orders.len() * 400);
                for order in &orders {
                    write_order(order, Style::Spaced, &mut text);
                    text.push('\n');
                }
                Ok(packer.pack(text))
            }
            Err(error) => {
                let mut text = String::from("{\"error\": ");
                write_text(Some(&sentence(&error)), Style::Spaced, &mut text);
                text.push_str("}\n");
                Err((packer.pack(text), error))
            }
        };
        let failed = written.is_err();
        // Whoever reads may have left.
        if lines.send(written).await.is_err() || failed {
            return;
        }
    }
    let end = packer.finish();
    if !end.is_empty() {
        let _ = lines.send(Ok(end)).await;
    }
}

/// The form in which lines are sent.
enum Packer {
    Plain,
    Gzip(Box<GzEncoder<Vec<u8>>>),
}

impl Packer {
    /// Fast rather than small: one client reads it, once.
    fn gzip() -> Self {
        Self::Gzip(Box::new(GzEncoder::new(Vec::new(), Compression::fast())))
    }

    /// Packs text so that all of it can be unpacked when it arrives. Writing to a `Vec` does not fail.
    fn pack(&mut self, text: String) -> Bytes {
        match self {
            Self::Plain => Bytes::from(text),
            Self::Gzip(encoder) => {
                let packed = encoder.write_all(text.as_bytes()).and_then(|()| encoder.flush());
                debug_assert!(packed.is_ok());
                Bytes::from(std::mem::take(encoder.get_mut()))
            }
        }
    }

    fn finish(self) -> Bytes {
        match self {
            Self::Plain => Bytes::new(),
            Self::Gzip(encoder) => Bytes::from(encoder.finish().unwrap_or_default()),
        }
    }
}

/// The body: lines as they are written. One that fails ends with an error line and then breaks off, so that nobody
/// takes it for whole (deviation D5).
struct Lines {
    lines: mpsc::Receiver<Written>,
    failing: Option<Failing>,
}

enum Failing {
    /// The error line was handed over and may not have left yet.
    Told(OrdersError),
    /// The connection had its chance to send it.
    Sent(OrdersError),
}

impl Body for Lines {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        match this.failing.take() {
            Some(Failing::Told(error)) => {
                // A connection whose body has nothing for now sends what it holds; one whose body fails drops it.
                this.failing = Some(Failing::Sent(error));
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Some(Failing::Sent(error)) => {
                if let Some(left_out) = BROKEN_OFF.next() {
                    tracing::warn!(%error, left_out, "a stream of orders was broken off");
                }
                return Poll::Ready(Some(Err(Box::new(BrokenBody(Failure::Truncated)))));
            }
            None => {}
        }
        Poll::Ready(match ready!(this.lines.poll_recv(cx)) {
            Some(Ok(lines)) => Some(Ok(Frame::data(lines))),
            Some(Err((line, error))) => {
                this.failing = Some(Failing::Told(error));
                Some(Ok(Frame::data(line)))
            }
            None => None,
        })
    }
}
