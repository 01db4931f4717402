//! The parts of a hit, one by one: `cargo bench --bench micro`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "a benchmark that cannot go on stops")]

use std::sync::Arc;
use std::time::Duration;

use divan::{Bencher, black_box};
use http::{HeaderMap, StatusCode};
use sluice::cache::codec;
use sluice::cache::entry::{Content, Entry, StoredResponse};
use sluice::cache::key::{Canonical, Key};
use sluice::cache::memory::Memory;
use sluice::cache::store::Store;
use sluice::cache::void::Moment;
use sluice::clock::Wall;
use sluice::config::route::{Route, select};
use sluice::http::encoding::Coding;
use sluice::http::freshness::Lifetimes;
use sluice::proxy::decide::decide;
use sluice::request::target::Target;
use sluice::telemetry::metrics::Metrics;

const TARGET: &str = "/api/liquidations?symbol=BTCUSDT&timeframe=1h&start_timestamp=1735700000000&end_timestamp=1735720000000";

fn main() {
    divan::main();
}

fn routes() -> Vec<Route> {
    let checked = sluice::config::check("proxy.toml", include_str!("../proxy.toml"), &|_| None);
    checked.config.expect("the shipped rules").routes
}

fn entry(size: usize) -> (Key, Arc<Entry>) {
    let routes = routes();
    let target = Target::parse(TARGET).expect("a target");
    let route = select(&routes, &target).expect("a rule");
    let key = Key::new(route, &target, Canonical::new(route, &target, &HeaderMap::new()));
    let mut fields = HeaderMap::new();
    fields.insert("content-type", "application/json".parse().expect("a value"));
    let response = StoredResponse::new(StatusCode::OK, fields, Coding::Identity, Coding::Identity, vec![b'x'; size].into());
    let lifetimes = Lifetimes { fresh: Duration::from_secs(60), ..Lifetimes::default() };
    let entry = Arc::new(Entry::new(&key, Moment::default(), Wall::from_millis(1_000_000), 0, lifetimes, Content::Response(response)));
    (key, entry)
}

#[divan::bench]
fn target_route_and_key(bencher: Bencher<'_, '_>) {
    let (routes, headers) = (routes(), HeaderMap::new());
    bencher.bench_local(|| {
        let target = Target::parse(black_box(TARGET)).expect("a target");
        let route = select(&routes, &target).expect("a rule");
        Canonical::new(route, &target, &headers)
    });
}

#[divan::bench]
fn key_name(bencher: Bencher<'_, '_>) {
    let (key, _) = entry(1);
    bencher.bench_local(|| black_box(&key).name("sluice"));
}

#[divan::bench]
fn decide_hit(bencher: Bencher<'_, '_>) {
    let (_, entry) = entry(1);
    bencher.bench_local(|| decide(Ok((entry.stored_at, entry.lifetimes)), black_box(Wall::from_millis(1_000_500)), || false));
}

#[divan::bench(args = [223, 14_000])]
fn codec_encode(bencher: Bencher<'_, '_>, size: usize) {
    let (_, entry) = entry(size);
    bencher.bench_local(|| codec::encode(black_box(&entry)));
}

#[divan::bench(args = [223, 14_000])]
fn codec_decode(bencher: Bencher<'_, '_>, size: usize) {
    let bytes = codec::encode(&entry(size).1);
    bencher.bench_local(|| codec::decode(black_box(&bytes).clone()).expect("an entry"));
}

#[divan::bench]
fn memory_hit(bencher: Bencher<'_, '_>) {
    let (key, entry) = entry(223);
    let metrics = Arc::new(Metrics::new().expect("metrics"));
    let memory = Memory::new(64 << 20, 1 << 20, metrics).expect("a memory tier");
    memory.insert(entry);
    bencher.bench_local(|| memory.peek(black_box(&key.canonical)).expect("a hit"));
}
