//! Traces: what a collector gets of a request, whose trace it belongs to, and that nothing depends on the collector.

use std::collections::HashMap;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message as _;

use crate::support::backend::{Backend, Step, ok, reply};
use crate::support::client::Connection;
use crate::support::mariadb::MariaDb;
use crate::support::redis::Redis;
use crate::support::sluice::{Sluice, one_rule};
use crate::support::until;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const UNSAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

/// A collector: the scripted backend, which remembers what it got.
async fn collector() -> Backend {
    Backend::start(|_| ok("Content-Type: application/x-protobuf\r\n", b"")).await
}

/// All spans that a collector got.
fn spans(collector: &Backend) -> Vec<Span> {
    let asked = collector.asked.lock().unwrap().clone();
    asked
        .iter()
        .flat_map(|asked| {
            assert_eq!((asked.method.as_str(), asked.target.as_str()), ("POST", "/v1/traces"));
            ExportTraceServiceRequest::decode(&asked.body[..]).unwrap().resource_spans
        })
        .flat_map(|of_resource| of_resource.scope_spans)
        .flat_map(|of_scope| of_scope.spans)
        .collect()
}

fn attributes(span: &Span) -> HashMap<String, String> {
    let text = |value: Value| match value {
        Value::StringValue(text) => text,
        Value::IntValue(number) => number.to_string(),
        other => panic!("{other:?}"),
    };
    let pairs = span.attributes.iter().map(|pair| (pair.key.clone(), text(pair.value.clone().unwrap().value.unwrap())));
    pairs.collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Ends a Sluice, which sends what it has. What it logged.
async fn end(mut sluice: Sluice) -> String {
    sluice.process.signal("TERM");
    until("it has ended", || {
        let ended = sluice.process.child.try_wait().unwrap().is_some();
        async move { ended }
    })
    .await;
    sluice.logged()
}

/// Sluice with traces over a backend and Redis.
async fn traced(backend: &Backend, redis: &Redis, collector: &Backend, sample: &str) -> Sluice {
    let (backend, collector, redis, rule) = (backend.address, collector.address, redis.url(), one_rule("ttl='1h'"));
    let text = format!(
        "trusted_proxies = ['127.0.0.1']\n[telemetry]\notlp='http://{collector}'\nsample='{sample}'\n\
         [backend]\nurl='http://{backend}'\n[cache]\nredis='{redis}'\n{rule}"
    );
    Sluice::with(&text, &[])
}

#[tokio::test]
async fn a_request_its_fetch_redis_and_a_hit_have_spans_of_one_trace() {
    let (collector, redis) = (collector().await, Redis::start(&[]).await);
    let backend = Backend::start(|_| ok("", b"{}")).await;
    let sluice = traced(&backend, &redis, &collector, "100%").await;
    until("Redis is written to", || async {
        sluice.get(&format!("/before/{}", backend.count())).await;
        sluice.metric("store_seconds_count", &["redis", "write"]).await > 0.0
    })
    .await;
    let state = ("tracestate", "vendor=1");
    let miss = sluice.get_with("/x?secret=no", &[("traceparent", SAMPLED), state]).await;
    let passed_on = backend.last();
    let hit = sluice.get("/x?secret=no").await;
    assert!(hit.cache_status().starts_with("sluice; hit"), "{}", hit.cache_status());
    let other = sluice.get_with("/x?secret=no", &[("traceparent", &SAMPLED.replace("4bf9", "0000"))]).await;
    assert!(other.cache_status().starts_with("sluice; hit"), "{}", other.cache_status());
    end(sluice).await;

    let spans = spans(&collector);
    let of =
        |kind: SpanKind, name: &str| -> Vec<&Span> { spans.iter().filter(|span| span.kind == kind as i32 && span.name == name).collect() };
    let mut served = of(SpanKind::Server, "GET all");
    served.retain(|span| attributes(span)["url.path"] == "/x");
    served.sort_by_key(|span| span.start_time_unix_nano);
    let [first, second, third] = served[..] else { panic!("{spans:#?}") };
    assert_eq!((hex(&third.trace_id), attributes(third)["sluice.outcome"].as_str()), (TRACE.replace("4bf9", "0000"), "hit"));
    assert_eq!((hex(&first.trace_id).as_str(), hex(&first.parent_span_id).as_str()), (TRACE, "00f067aa0ba902b7"));
    let told = attributes(first);
    for (key, value) in [
        ("http.request.method", "GET"),
        ("url.path", "/x"),
        ("sluice.rule", "all"),
        ("sluice.outcome", "miss"),
        ("http.response.status_code", "200"),
        ("sluice.request_id", miss.field("x-request-id").unwrap()),
    ] {
        assert_eq!(told.get(key).map(String::as_str), Some(value), "{key}: {told:?}");
    }
    // The hit belongs to no trace but its own, and has nothing below it.
    assert_ne!(second.trace_id, first.trace_id);
    assert_eq!((attributes(second)["sluice.outcome"].as_str(), second.parent_span_id.is_empty()), ("hit", true));
    assert!(!spans.iter().any(|span| span.parent_span_id == second.span_id));

    let of_first = |kind, name| {
        let mut spans = of(kind, name);
        spans.retain(|span| span.trace_id == first.trace_id);
        spans
    };
    let fetched = of_first(SpanKind::Client, "upstream");
    assert_eq!((fetched.len(), &fetched[0].parent_span_id), (1, &first.span_id));
    assert_eq!(attributes(fetched[0])["http.response.status_code"], "200");
    let expected = format!("00-{TRACE}-{}-01", hex(&fetched[0].span_id));
    assert_eq!((passed_on.field("traceparent"), passed_on.field("tracestate")), (Some(expected.as_str()), Some("vendor=1")));

    let stored = of_first(SpanKind::Client, "redis");
    let operations: Vec<String> = stored.iter().map(|span| attributes(span)["db.operation.name"].clone()).collect();
    assert!(operations.contains(&"read".to_owned()) && operations.contains(&"write".to_owned()), "{operations:?}");
    assert_eq!(of_first(SpanKind::Internal, "wait for fetch").len(), 2, "the head, and the body");
    assert!(spans.iter().all(|span| span.end_time_unix_nano >= span.start_time_unix_nano && span.start_time_unix_nano > 0));
}

#[tokio::test]
async fn statements_have_spans_without_their_values() {
    let (database, collector) = (MariaDb::filled().await, collector().await);
    let url = format!("http://{}", collector.address);
    let sluice = database.uncached(&[("sample = \"1%\"", "sample = \"100%\"")], &[("OTLP_URL", &url)]);
    assert_eq!(sluice.get("/api/liquidation-orders?symbol=BTCUSDT&limit=3").await.status, 200);
    end(sluice).await;
    let spans = spans(&collector);
    let queries: Vec<&Span> = spans.iter().filter(|span| span.name == "mysql").collect();
    let above = spans.iter().find(|span| span.name == "upstream").expect("the native API's answer");
    let texts: Vec<String> = queries.iter().map(|span| attributes(span)["db.query.text"].clone()).collect();
    assert!(texts.iter().any(|text| text.contains("SELECT") && text.contains('?')), "{texts:?}");
    assert!(!texts.iter().any(|text| text.contains("BTCUSDT")), "{texts:?}");
    assert!(queries.iter().any(|span| span.parent_span_id == above.span_id), "{spans:#?}");
}

#[tokio::test]
async fn who_is_trusted_says_what_is_sampled_and_what_is_not_leaves_fields_alone() {
    let (collector, redis) = (collector().await, Redis::start(&[]).await);
    let backend = Backend::start(|_| reply("200 OK", "Cache-Control: no-store\r\n", b"{}")).await;
    let sluice = traced(&backend, &redis, &collector, "0%").await;
    sluice.get_with("/unsampled", &[("traceparent", UNSAMPLED)]).await;
    sluice.get("/silent").await;
    sluice.get_with("/nonsense", &[("traceparent", "00-zz-01")]).await;
    sluice.get_with("/sampled", &[("traceparent", SAMPLED)]).await;
    end(sluice).await;
    let served: Vec<String> = spans(&collector).iter().filter_map(|span| attributes(span).remove("url.path")).collect();
    assert!(served.iter().all(|path| path == "/sampled") && !served.is_empty(), "{served:?}");
}

#[tokio::test]
async fn a_collector_that_is_away_or_hangs_costs_one_line_and_no_answer() {
    let (mut away, hanging) = (collector().await, Backend::start(|_| vec![crate::support::backend::Step::Hang]).await);
    away.kill().await;
    let redis = Redis::start(&[]).await;
    let backend = Backend::start(|_| ok("", b"{}")).await;
    for collector in [&away, &hanging] {
        let sluice = traced(&backend, &redis, collector, "100%").await;
        for at in 0..50 {
            assert_eq!(sluice.get(&format!("/{at}")).await.status, 200);
        }
        let logged = end(sluice).await;
        assert!(logged.matches("the collector takes no traces").count() <= 1, "{logged}");
        assert!(!logged.contains("panicked"), "{logged}");
    }
}

#[tokio::test]
async fn where_traces_are_off_fields_go_on_as_they_came() {
    let backend = Backend::start(|_| ok("", b"{}")).await;
    let sluice = Sluice::ruled(backend.address, "", "").await;
    sluice.get_with("/x", &[("traceparent", SAMPLED)]).await;
    assert_eq!(backend.last().field("traceparent"), Some(SAMPLED));
}

#[tokio::test]
async fn the_span_of_a_client_that_left_says_so() {
    let (collector, redis) = (collector().await, Redis::start(&[]).await);
    let backend = Backend::start(|_| vec![Step::Hang]).await;
    let sluice = traced(&backend, &redis, &collector, "100%").await;
    let mut client = Connection::open(sluice.address).await;
    client.send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n").await;
    until("the backend is asked", || async { backend.count() == 1 }).await;
    drop(client);
    until("it is counted", || async { sluice.metric("requests_total", &["client-left"]).await == 1.0 }).await;
    end(sluice).await;
    let spans = spans(&collector);
    let server = spans.iter().find(|span| span.kind == SpanKind::Server as i32).unwrap();
    let said = attributes(server);
    assert_eq!((said["sluice.outcome"].as_str(), said["sluice.detail"].as_str()), ("client-left", "waited-for-fetch"));
    assert_eq!(said["http.response.status_code"], "499");
}
