//! An existing service as a source of orders: its own endpoints, asked over HTTP and read as they answer.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT, USER_AGENT};
use http::{HeaderValue, Request, StatusCode, Uri};
use http_body_util::BodyExt;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::mpsc;

use crate::api::decimal::Decimal;
use crate::api::orders::{Batches, Bucket, Order, Orders, OrdersError, Page, Span};
use crate::api::texts::Texts;
use crate::api::usd::Usd;
use crate::body::{self, BoxError, Stream};
use crate::upstream::Upstream;
use crate::upstream::admission::machine::Party;

/// What metrics call these requests, where clients' requests have their rule's name.
const NAME: &str = "timeline";
/// The longest answer that is read whole, in bytes.
const LARGEST: usize = 32 << 20;
/// The longest line of a stream, in bytes.
const LONGEST_LINE: usize = 64 << 10;
/// Orders in a batch.
const BATCH: usize = 512;
/// Below this, a number with at most eight places is exactly what its double prints: doubles lie closer than 10⁻⁸.
const EXACT_BELOW: f64 = (1_u64 << 26) as f64;

/// An existing service.
pub struct Service {
    upstream: Arc<Upstream>,
    silence: Duration,
}

/// Why a service's answer is no orders.
#[derive(Debug)]
enum Unreadable {
    Status(StatusCode),
    Json(serde_json::Error),
    /// The stream ended with this error line.
    Told(String),
    Broken(BoxError),
    TooLong,
}

impl std::fmt::Display for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(status) => write!(f, "the backend answered {status}"),
            Self::Json(error) => write!(f, "the backend's orders cannot be read: {error}"),
            Self::Told(error) => write!(f, "the backend broke its stream off and said {error:?}"),
            Self::Broken(error) => write!(f, "the backend's answer broke off: {error}"),
            Self::TooLong => f.write_str("the backend's answer is too long"),
        }
    }
}

impl std::error::Error for Unreadable {}

impl From<Unreadable> for OrdersError {
    fn from(error: Unreadable) -> Self {
        Self::Unavailable(error.into())
    }
}

impl Service {
    /// Behind `upstream`; an answer's body may be silent for `silence` at most.
    #[must_use]
    pub const fn new(upstream: Arc<Upstream>, silence: Duration) -> Self {
        Self { upstream, silence }
    }

    async fn send(&self, target: &str) -> Result<http::Response<Stream>, OrdersError> {
        let mut request = Request::new(body::empty());
        *request.uri_mut() = target.parse::<Uri>().map_err(|error| OrdersError::Unavailable(error.into()))?;
        request.headers_mut().insert(ACCEPT, HeaderValue::from_static("*/*"));
        request.headers_mut().insert(USER_AGENT, HeaderValue::from_static(concat!("sluice/", env!("CARGO_PKG_VERSION"))));
        self.upstream.call(&Party::own(NAME), request, self.silence).await.map_err(|error| OrdersError::Unavailable(error.into()))
    }

    /// The status and the body of the answer to a GET.
    ///
    /// # Errors
    /// The service does not answer, or at too great length.
    pub async fn ask(&self, target: &str) -> Result<(StatusCode, Bytes), OrdersError> {
        let response = self.send(target).await?;
        let status = response.status();
        let bytes = body::read(response.into_body(), LARGEST).await.ok_or(Unreadable::TooLong)?;
        Ok((status, bytes))
    }

    /// The body of an answer of 200; `None` for one of 404, which says that there is nothing.
    async fn ask_json(&self, target: &str) -> Result<Option<Bytes>, OrdersError> {
        match self.ask(target).await? {
            (StatusCode::OK, bytes) => Ok(Some(bytes)),
            (StatusCode::NOT_FOUND, _) => Ok(None),
            (status, _) => Err(Unreadable::Status(status).into()),
        }
    }
}

/// An order as the service writes it. Numbers stay as they are written: their digits count.
#[derive(Deserialize)]
struct Written<'a> {
    #[serde(borrow)]
    symbol: Option<Cow<'a, str>>,
    #[serde(borrow)]
    side: Option<Cow<'a, str>>,
    #[serde(borrow)]
    order_type: Option<Cow<'a, str>>,
    #[serde(borrow)]
    time_in_force: Option<Cow<'a, str>>,
    #[serde(borrow)]
    original_quantity: Option<&'a RawValue>,
    #[serde(borrow)]
    price: Option<&'a RawValue>,
    #[serde(borrow)]
    average_price: Option<&'a RawValue>,
    #[serde(borrow)]
    order_status: Option<Cow<'a, str>>,
    #[serde(borrow)]
    order_last_filled_quantity: Option<&'a RawValue>,
    #[serde(borrow)]
    order_filled_accumulated_quantity: Option<&'a RawValue>,
    order_trade_time: Option<i64>,
}

/// A page of orders.
#[derive(Deserialize)]
struct WrittenPage<'a> {
    #[serde(borrow)]
    data: Vec<Written<'a>>,
}

/// A bucket as the service writes it.
#[derive(Deserialize)]
struct WrittenBucket<'a> {
    /// A number, or text from the service's own cache (deviation D3).
    timestamp: serde_json::Value,
    #[serde(borrow)]
    side: Option<Cow<'a, str>>,
    cumulated_usd_size: Option<f64>,
}

/// A number as it was written; `Err` if it is none.
fn number(raw: Option<&RawValue>) -> Result<Option<f64>, serde_json::Error> {
    let Some(raw) = raw else { return Ok(None) };
    // The JSON library reads doubles to all but the last digit. What is larger than any double is none that a service prints.
    let number = raw.get().parse().ok().filter(|number: &f64| number.is_finite());
    number.map(Some).ok_or_else(|| serde::de::Error::custom(format_args!("{raw} is not a number")))
}

/// The decimal that a number was before it was made a double, if that is certain.
fn exact(raw: Option<&RawValue>) -> Option<Decimal> {
    let text = raw?.get();
    let value: f64 = text.parse().ok()?;
    // Python writes whole doubles with `.0`.
    Decimal::exact(text).filter(|_| value.abs() < EXACT_BELOW)
}

impl Written<'_> {
    fn read(self, texts: &mut Texts) -> Result<Order, serde_json::Error> {
        let (average, filled) = (number(self.average_price)?, number(self.order_filled_accumulated_quantity)?);
        let usd = match (average, filled, exact(self.average_price), exact(self.order_filled_accumulated_quantity)) {
            (Some(_), Some(_), Some(price), Some(quantity)) => Usd::of(Some(price), Some(quantity)),
            (Some(price), Some(quantity), ..) => Usd::Rounded(price * quantity),
            _ => Usd::Unknown,
        };
        let mut share = |text: Option<Cow<'_, str>>| text.and_then(|text| texts.share(&text));
        Ok(Order {
            symbol: share(self.symbol),
            side: share(self.side),
            order_type: share(self.order_type),
            time_in_force: share(self.time_in_force),
            original_quantity: number(self.original_quantity)?,
            price: number(self.price)?,
            average_price: average,
            order_status: share(self.order_status),
            order_last_filled_quantity: number(self.order_last_filled_quantity)?,
            order_filled_accumulated_quantity: filled,
            order_trade_time: self.order_trade_time,
            usd,
        })
    }
}

fn orders(written: Vec<Written<'_>>) -> Result<Vec<Order>, OrdersError> {
    let mut texts = Texts::default();
    let read = written.into_iter().map(|order| order.read(&mut texts)).collect::<Result<_, _>>();
    Ok(read.map_err(Unreadable::Json)?)
}

fn bucket(written: WrittenBucket<'_>) -> Result<Option<Bucket>, OrdersError> {
    let timestamp = match &written.timestamp {
        serde_json::Value::String(text) => text.parse().ok(),
        other => other.as_i64(),
    };
    let timestamp = timestamp.ok_or_else(|| Unreadable::Json(serde::de::Error::custom("a timestamp is no whole number")))?;
    // A bucket of orders without amounts counts for nothing.
    Ok(written.cumulated_usd_size.map(|usd| Bucket { timestamp, side: written.side.map(|side| Arc::from(&*side)), usd }))
}

/// A line of the stream: an order, or why there are no more.
///
/// # Errors
/// It is no order, or it is the line by which the service says that the stream failed.
pub fn line(text: &[u8], texts: &mut Texts) -> Result<Order, OrdersError> {
    #[derive(Deserialize)]
    struct Failed {
        error: serde_json::Value,
    }
    if let Ok(Failed { error }) = serde_json::from_slice(text) {
        return Err(Unreadable::Told(error.as_str().map_or_else(|| error.to_string(), str::to_owned)).into());
    }
    let written: Written<'_> = serde_json::from_slice(text).map_err(Unreadable::Json)?;
    Ok(written.read(texts).map_err(Unreadable::Json)?)
}

/// Reads lines as they arrive, and sends them on in batches.
async fn read_lines(mut body: Stream, batches: mpsc::Sender<Result<Vec<Order>, OrdersError>>) {
    let mut texts = Texts::default();
    let mut rest = BytesMut::new();
    let mut batch = Vec::with_capacity(BATCH);
    let result = async {
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(Unreadable::Broken)?;
            let Some(data) = frame.data_ref() else { continue };
            rest.extend_from_slice(data);
            while let Some(end) = memchr::memchr(b'\n', &rest) {
                batch.push(line(&rest.split_to(end + 1)[..end], &mut texts)?);
                if batch.len() == BATCH && batches.send(Ok(std::mem::take(&mut batch))).await.is_err() {
                    return Ok(());
                }
            }
            if rest.len() > LONGEST_LINE {
                return Err(Unreadable::TooLong.into());
            }
        }
        if !rest.is_empty() {
            batch.push(line(&rest, &mut texts)?);
        }
        Ok::<(), OrdersError>(())
    };
    match result.await {
        Err(error) => drop(batches.send(Err(error)).await),
        Ok(()) if batch.is_empty() => {}
        Ok(()) => drop(batches.send(Ok(batch)).await),
    }
}

impl Orders for Service {
    type StreamError = OrdersError;

    async fn symbols(&self) -> Result<Vec<Arc<str>>, OrdersError> {
        Err(OrdersError::NotCovered)
    }

    /// `width` must be a whole number of minutes.
    async fn buckets(&self, symbol: &str, span: Span, width: i64) -> Result<Vec<Bucket>, OrdersError> {
        let Span { start, end } = span;
        let target = format!("/api/liquidations?symbol={symbol}&timeframe={}m&start_timestamp={start}&end_timestamp={end}", width / 60_000);
        let Some(bytes) = self.ask_json(&target).await? else { return Ok(Vec::new()) };
        let written: Vec<WrittenBucket<'_>> = serde_json::from_slice(&bytes).map_err(Unreadable::Json)?;
        let buckets: Vec<Option<Bucket>> = written.into_iter().map(bucket).collect::<Result<_, _>>()?;
        Ok(buckets.into_iter().flatten().collect())
    }

    async fn latest(&self, symbol: &str, limit: usize) -> Result<Vec<Order>, OrdersError> {
        let Some(bytes) = self.ask_json(&format!("/api/liquidation-orders?symbol={symbol}&limit={limit}")).await? else {
            return Ok(Vec::new());
        };
        orders(serde_json::from_slice(&bytes).map_err(Unreadable::Json)?)
    }

    async fn page(&self, symbol: &str, span: Span, page: Page) -> Result<Vec<Order>, OrdersError> {
        let (Span { start, end }, Page { offset, size }) = (span, page);
        let number = offset / size as u64 + 1;
        let target =
            format!("/api/liquidation-orders?symbol={symbol}&start_timestamp={start}&end_timestamp={end}&page={number}&page_size={size}");
        let Some(bytes) = self.ask_json(&target).await? else { return Ok(Vec::new()) };
        let written: WrittenPage<'_> = serde_json::from_slice(&bytes).map_err(Unreadable::Json)?;
        orders(written.data)
    }

    async fn stream(&self, symbol: &str, span: Span) -> Result<Batches<OrdersError>, OrdersError> {
        let Span { start, end } = span;
        let response =
            self.send(&format!("/api/liquidation-orders/stream?symbol={symbol}&start_timestamp={start}&end_timestamp={end}")).await?;
        if response.status() != StatusCode::OK {
            return Err(Unreadable::Status(response.status()).into());
        }
        let (sender, receiver) = mpsc::channel(2);
        tokio::spawn(read_lines(response.into_body(), sender));
        Ok(Batches::new(receiver))
    }

    async fn check(&self) -> Result<(), OrdersError> {
        Err(OrdersError::NotCovered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::json::{Style, write_order};
    use proptest::prelude::*;

    async fn read(parts: Vec<Vec<u8>>) -> Result<Vec<Order>, String> {
        let frames = parts.into_iter().map(|part| Ok::<_, BoxError>(http_body::Frame::data(Bytes::from(part))));
        let body = http_body_util::StreamBody::new(Frames(frames.collect::<Vec<_>>().into_iter())).boxed_unsync();
        let (sender, receiver) = mpsc::channel(2);
        let reading = tokio::spawn(read_lines(body, sender));
        let mut batches: Batches<OrdersError> = Batches::new(receiver);
        let mut orders = Vec::new();
        while let Some(batch) = batches.next().await {
            orders.extend(batch.map_err(|error| error.to_string())?);
        }
        reading.await.unwrap();
        Ok(orders)
    }

    struct Frames<I>(I);

    impl<I: Iterator + Unpin> futures_core::Stream for Frames<I> {
        type Item = I::Item;

        fn poll_next(mut self: std::pin::Pin<&mut Self>, _: &mut std::task::Context<'_>) -> std::task::Poll<Option<I::Item>> {
            std::task::Poll::Ready(self.0.next())
        }
    }

    fn written(order: &Order) -> Vec<u8> {
        let mut text = String::new();
        write_order(order, Style::Spaced, &mut text);
        text.push('\n');
        text.into_bytes()
    }

    #[tokio::test]
    async fn an_error_line_and_what_is_no_order_end_a_stream() {
        let good = written(&Order { order_trade_time: Some(5), ..Order::default() });
        for (bad, expected) in [
            (&b"{\"error\": \"Query timeout\"}\n"[..], "Query timeout"),
            (b"{\"symbol\": 7}\n", "cannot be read"),
            (b"{\"order_trade_time\": 1.5}\n", "cannot be read"),
            (b"{\"price\": \"abc\"}\n", "cannot be read"),
            (b"{\"price\": 1e316}\n", "cannot be read"),
            (b"nonsense", "cannot be read"),
            (b"{\"symbol\": \"cut", "cannot be read"),
        ] {
            let error = read(vec![good.clone(), bad.to_vec()]).await.unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        assert!(read(vec![vec![b'x'; LONGEST_LINE + 1]]).await.unwrap_err().contains("too long"));
        assert_eq!(read(vec![good]).await.unwrap().len(), 1);
    }

    #[test]
    fn amounts_are_exact_where_their_digits_say_so() {
        let usd = |average: &str, filled: &str| {
            let text = format!("{{\"average_price\": {average}, \"order_filled_accumulated_quantity\": {filled}}}");
            line(text.as_bytes(), &mut Texts::default()).unwrap().usd
        };
        assert_eq!(usd("98000.5", "0.001"), Usd::Exact(980_005 * 10_i128.pow(12)));
        assert_eq!(usd("1e-05", "2.0"), Usd::Exact(2 * 10_i128.pow(11)));
        for (average, filled) in [("0.123456789", "1.0"), ("67108864.5", "1.0"), ("1.0", "1e+16")] {
            assert!(matches!(usd(average, filled), Usd::Rounded(_)), "{average} {filled}");
        }
        assert_eq!(usd("null", "1.0"), Usd::Unknown);
    }

    proptest! {
        #[test]
        fn orders_are_read_as_they_were_written(
            prices in proptest::collection::vec((any::<Option<f64>>(), ".{0,6}", any::<i64>()), 0..20), cut in 1_usize..400,
        ) {
            let orders: Vec<Order> = prices
                .into_iter()
                .map(|(price, side, time)| Order {
                    price: price.filter(|price| price.is_finite()),
                    side: Some(side.as_str().into()),
                    order_trade_time: Some(time),
                    ..Order::default()
                })
                .collect();
            let bytes: Vec<u8> = orders.iter().flat_map(written).collect();
            let parts = bytes.chunks(cut).map(<[u8]>::to_vec).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            prop_assert_eq!(runtime.block_on(read(parts)).unwrap(), orders);
        }
    }
}
