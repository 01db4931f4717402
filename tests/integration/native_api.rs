//! The API answered by Sluice itself: from MariaDB and from memory.

use std::time::Duration;

use mysql_async::prelude::Queryable;
use tokio::io::BufReader;

use crate::recorded_api::{ask_all, assert_recorded};
use crate::support::{
    Answer, Backend, Connection, MariaDb, PASSWORD, Recorded, Sluice, TOKEN, connect_from, ok, recorded, recorded_dir, until,
};

const GZIP: &[(&str, &str)] = &[("Accept-Encoding", "gzip")];
const YEAR: &str = "start_timestamp=1735689600000&end_timestamp=1767225600000";
const TIMEFRAME: &str = "{\"detail\":\"timeframe must be a positive whole number of minutes, hours or days, such as 5m, 1h or 1d\"}";

/// The recorded lines that native mode answers with the same bytes.
fn lines() -> Vec<Recorded> {
    recorded().into_iter().filter(|line| line.deviates.is_none()).collect()
}

/// All lines, and then those that deviate, by their rules.
async fn assert_contract(sluice: &Sluice, when: &str) {
    let lines = lines();
    assert_eq!(lines.len(), 245);
    for fields in [&[][..], &[], GZIP] {
        ask_all(sluice, &lines, fields, when).await;
    }
    let mut deviating = 0;
    for line in recorded().iter().filter(|line| line.deviates.is_some()) {
        let answer = Connection::open(sluice.address).await.ask(&line.method, &line.target, &[], b"").await;
        let (status, body) = match line.deviates.as_deref() {
            // The recorded one is refused by an earlier rule where its timestamps are wrong, which none of these are.
            Some("D1") => (400, TIMEFRAME),
            Some("D2") => (404, "{\"detail\":\"No liquidation orders found for the given criteria\"}"),
            Some("D6") => (200, ""),
            other => panic!("an unknown deviation: {other:?}"),
        };
        assert_eq!((answer.status, answer.text().as_str()), (status, body), "{when}: {}", line.target);
        deviating += 1;
    }
    assert_eq!(deviating, 8);
}

/// Without rules too: every byte is the API's own, packed from 1,000 bytes on for those who take it.
async fn assert_uncached(sluice: &Sluice) {
    for fields in [&[][..], GZIP] {
        for (line, answer) in lines().iter().zip(ask_all(sluice, &lines(), fields, "uncached").await) {
            let streamed = line.target.contains("/stream?") && line.status == 200;
            let packed = !fields.is_empty() && (line.body.len() >= 1000 || streamed);
            assert_eq!(answer.field("content-encoding"), packed.then_some("gzip"), "{}", line.target);
            assert_eq!(answer.field("vary"), packed.then_some("Accept-Encoding"), "{}", line.target);
        }
    }
    let stream = format!("/api/liquidation-orders/stream?symbol=BTCUSDT&{YEAR}");
    for (target, length) in [("/api/symbols", Some("223")), (&stream, None)] {
        let head = Connection::open(sluice.address).await.ask("HEAD", target, &[], b"").await;
        assert_eq!((head.status, head.field("content-length")), (200, length), "{target}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_in_memory_answer_the_contract() {
    let orders = recorded_dir().join("orders.csv");
    let text = include_str!("../../proxy.toml").replace("orders = \"\"", &format!("orders = \"{}\"", orders.display()));
    let sluice = Sluice::with(&text, &[("BACKEND_KIND", "sample"), ("REDIS_URL", "")]);
    assert_contract(&sluice, "memory").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_with_and_without_indexes_answers_the_contract() {
    let database = MariaDb::filled().await;
    let bare = database.sluice(&[]);
    assert_contract(&bare, "no index").await;
    assert!(bare.logged().contains("no index on (symbol, order_trade_time)"), "{}", bare.logged());
    assert!(bare.logged().contains("ALTER TABLE `binance_liqs` ADD INDEX `liq_symbol_time` (`symbol`, `order_trade_time`)"));
    assert_uncached(&database.uncached(&[], &[])).await;
    assert_eq!(database.index(), "");
    assert!(database.index().contains("is there already"), "safe to repeat");
    let indexed = database.sluice(&[]);
    assert_contract(&indexed, "indexed").await;
    assert!(indexed.logged().contains("orders by index `liq_symbol_time`, sums by index `liq_symbol_time_usd`"), "{}", indexed.logged());
    assert!(!indexed.logged().contains("no index"), "{}", indexed.logged());
    // The one that runs without notices within a minute; a dropped one is noticed by the first question that misses it.
    database.run("ALTER TABLE api.binance_liqs DROP INDEX liq_symbol_time, DROP INDEX liq_symbol_time_usd").await;
    assert_eq!(indexed.get("/api/liquidation-orders?symbol=BTCUSDT&limit=7").await.status, 200);
    assert_eq!(indexed.get(&format!("/api/liquidation-orders/stream?symbol=BTCUSDT&{YEAR}")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_column_types_and_collations_answer_the_contract() {
    let database = MariaDb::filled().await;
    let numbers = ["original_quantity", "price", "average_price", "order_last_filled_quantity", "order_filled_accumulated_quantity"];
    for (kind, collation) in [("DOUBLE", "utf8mb4_bin"), ("VARCHAR(40)", "utf8mb4_general_ci"), ("DECIMAL(30,10)", "latin1_swedish_ci")] {
        database.load().await;
        let charset = collation.split('_').next().unwrap();
        database.run(&format!("ALTER TABLE api.binance_liqs CONVERT TO CHARACTER SET {charset} COLLATE {collation}")).await;
        let changes: Vec<String> = numbers.iter().map(|name| format!("MODIFY {name} {kind} NULL")).collect();
        database
            .run(&format!("ALTER TABLE api.binance_liqs ADD id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY FIRST, {}", changes.join(", ")))
            .await;
        assert_contract(&database.sluice(&[]), &format!("{kind} {collation}, no index")).await;
        database.index();
        assert_contract(&database.sluice(&[]), &format!("{kind} {collation}, indexed")).await;
    }
}

/// The moments and quantities of a page's orders.
fn page(answer: &Answer) -> Vec<(i64, i64)> {
    let page: serde_json::Value = serde_json::from_str(&answer.text()).unwrap();
    let orders = page["data"].as_array().unwrap();
    let quantity = |order: &serde_json::Value| order["original_quantity"].as_f64().unwrap().to_string().parse().unwrap();
    orders.iter().map(|order| (order["order_trade_time"].as_i64().unwrap(), quantity(order))).collect()
}

/// 3,000 orders at only ten moments, with and without an index, and with two spellings in a collation that tells them
/// apart: all pages together hold each order once, and nothing is lost where deep pages begin.
#[tokio::test(flavor = "multi_thread")]
async fn pages_neither_overlap_nor_leave_out_orders_of_one_moment() {
    let database = MariaDb::empty(&[]).await;
    database.feed(&recorded_dir().join("schema.sql"));
    database
        .run(
            "USE api; INSERT INTO binance_liqs SELECT IF(seq % 2, 'BTCUSDT', 'btcusdt'), 'buy', 'LIMIT', 'IOC', seq, 1, 1, 'FILLED', 1, 1, 1000 + seq % 10 FROM seq_1_to_3000",
        )
        .await;
    for state in ["bare", "indexed", "utf8mb4_bin"] {
        match state {
            "indexed" => drop(database.index()),
            "utf8mb4_bin" => database.run("ALTER TABLE api.binance_liqs CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_bin").await,
            _ => {}
        }
        let sluice = database.sluice(&[]);
        let mut seen = Vec::new();
        for number in 1..=43 {
            let target = format!("/api/liquidation-orders?symbol=BTCUSDT&start_timestamp=0&end_timestamp=5000&page={number}&page_size=70");
            seen.extend(page(&sluice.get(&target).await));
        }
        assert!(seen.is_sorted_by(|one, two| one.0 >= two.0), "{state}: newest first");
        let mut numbers: Vec<i64> = seen.iter().map(|(_, number)| *number).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (1..=3000).collect::<Vec<_>>(), "{state}");
        assert_eq!(sluice.get("/api/liquidation-orders?symbol=btcusdt&start_timestamp=0&end_timestamp=5000&page=31").await.status, 404);
    }
}

/// 200,000 orders, most of them within one of many slices of time, some at one moment: deep pages hold what an OFFSET
/// would give.
#[tokio::test(flavor = "multi_thread")]
async fn deep_pages_are_where_an_offset_would_find_them() {
    let database = MariaDb::empty(&[]).await;
    database.feed(&recorded_dir().join("schema.sql"));
    database
        .run(
            "USE api; INSERT INTO binance_liqs SELECT 'BTCUSDT', 'buy', 'LIMIT', 'IOC', seq, 1, 1, 'FILLED', 1, 1, \
             CASE WHEN seq <= 10000 THEN seq * 1000 WHEN seq <= 150000 THEN 20000000 + seq DIV 3 ELSE 30000000 + seq * 7 END \
             FROM seq_1_to_200000",
        )
        .await;
    database.index();
    let sluice = database.uncached(&[], &[]);
    let mut admin = database.admin().await;
    for offset in [900_u64, 1500, 49_900, 50_100, 50_150, 99_000, 123_450, 149_950, 189_950, 190_000, 199_950, 200_000, 5_000_000] {
        let (size, number) = (50, offset / 50 + 1);
        let target =
            format!("/api/liquidation-orders?symbol=BTCUSDT&start_timestamp=0&end_timestamp=90000000&page={number}&page_size={size}");
        let answer = sluice.get(&target).await;
        let statement = format!(
            "SELECT order_trade_time, CAST(original_quantity AS SIGNED) FROM api.binance_liqs FORCE INDEX (liq_symbol_time) \
             WHERE symbol = 'BTCUSDT' ORDER BY order_trade_time DESC LIMIT {size} OFFSET {offset}"
        );
        let expected: Vec<(i64, i64)> = admin.query(statement).await.unwrap();
        if expected.is_empty() {
            assert_eq!(answer.status, 404, "{offset}");
        } else {
            assert_eq!(page(&answer), expected, "{offset}");
        }
    }
    let year = format!("/api/liquidations?symbol=BTCUSDT&timeframe=7d&{YEAR}");
    assert_eq!(sluice.get(&year).await.status, 404, "a long span with nothing in it");
}

#[tokio::test(flavor = "multi_thread")]
async fn nulls_are_null_and_count_for_nothing() {
    let database = MariaDb::empty(&[]).await;
    let columns = include_str!("../contract/schema.sql").replace("NOT NULL", "NULL");
    let mut admin = database.admin().await;
    admin.query_drop("USE api").await.unwrap();
    admin.query_drop(columns.trim().trim_end_matches(';')).await.unwrap();
    let rows = "(NULL,'buy','LIMIT','IOC',1,1,1,'FILLED',1,1,5),('A','buy',NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,5),('A',NULL,'LIMIT','IOC',2,2,2,'FILLED',2,2,6),('A','sell','LIMIT','IOC',3,3,3,'FILLED',3,3,NULL)";
    admin.query_drop(format!("INSERT INTO binance_liqs VALUES {rows}")).await.unwrap();
    for indexed in [false, true] {
        if indexed {
            database.index();
        }
        let sluice = database.sluice(&[]);
        assert_eq!(sluice.get("/api/symbols").await.text(), "[\"A\"]");
        assert_eq!(
            sluice.get("/api/liquidations?symbol=a&timeframe=1m&start_timestamp=0&end_timestamp=9").await.text(),
            "[{\"timestamp\":0,\"timestamp_iso\":\"1970-01-01T00:00:00+00:00\",\"side\":null,\"cumulated_usd_size\":4.0}]"
        );
        let latest = sluice.get("/api/liquidation-orders?symbol=a&limit=9").await.text();
        let times: Vec<&str> = latest.split("\"order_trade_time\":").skip(1).map(|rest| rest.split('}').next().unwrap()).collect();
        assert_eq!(times, ["6", "5", "null"]);
        let stream = sluice.get("/api/liquidation-orders/stream?symbol=a&start_timestamp=0&end_timestamp=5").await.text();
        assert_eq!(
            stream,
            "{\"symbol\": \"A\", \"side\": \"buy\", \"order_type\": null, \"time_in_force\": null, \"original_quantity\": null, \"price\": null, \"average_price\": null, \"order_status\": null, \"order_last_filled_quantity\": null, \"order_filled_accumulated_quantity\": null, \"order_trade_time\": 5}\n"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_may_come_late_crash_and_come_back() {
    let mut database = MariaDb::filled().await;
    database.index();
    database.kill();
    let sluice = database.uncached(&[], &[]);
    let target = "/api/liquidation-orders?symbol=BTCUSDT&limit=5";
    let down = sluice.get(target).await;
    assert_eq!((down.status, down.text().as_str()), (503, "{\"detail\":\"Database service unavailable\"}"));
    let health = sluice.get("/health").await;
    assert_eq!(health.status, 503);
    assert!(
        health.text().contains("\"database\":{\"status\":\"unhealthy\",\"message\":\"Database connection failed\"}"),
        "{}",
        health.text()
    );
    database.start().await;
    until("it answers once the database is there", || async { sluice.get(target).await.status == 200 }).await;
    let expected = sluice.get(target).await.text();
    // Killed and restarted three times under load: an answer is right or says that the database is away.
    let load = async |stop: &std::sync::atomic::AtomicBool| {
        let (mut right, mut away) = (0, 0);
        let mut connection = Connection::open(sluice.address).await;
        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
            let answer = connection.ask("GET", target, &[], b"").await;
            match answer.status {
                200 => {
                    assert_eq!(answer.text(), expected);
                    right += 1;
                }
                503 => away += 1,
                other => panic!("{other}: {}", answer.text()),
            }
        }
        (right, away)
    };
    let stop = std::sync::atomic::AtomicBool::new(false);
    let trouble = async {
        for _ in 0..3 {
            database.kill();
            until("it is seen to be away", || async { sluice.get(target).await.status == 503 }).await;
            database.start().await;
            until("it is seen to be back", || async { sluice.get(target).await.status == 200 }).await;
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    };
    let (first, second, third, ()) = tokio::join!(load(&stop), load(&stop), load(&stop), trouble);
    assert!(first.0 + second.0 + third.0 > 10 && first.1 + second.1 + third.1 > 0, "{first:?} {second:?} {third:?}");
    assert!(!sluice.logged().contains(PASSWORD));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stored_outlives_the_database() {
    let mut database = MariaDb::filled().await;
    let sluice = database.sluice(&[("ttl = \"${CACHE_TTL_SYMBOLS:-3600}s\"", "ttl = \"1s\"")]);
    let fresh = sluice.get("/api/symbols").await.text();
    database.kill();
    until("it goes stale", || async { sluice.get("/api/symbols").await.cache_status().contains("ttl=-") }).await;
    let stale = sluice.get("/api/symbols").await;
    assert_eq!((stale.status, stale.text()), (200, fresh));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_query_is_ended_on_both_sides() {
    let database = MariaDb::filled().await;
    database.index();
    let limits = [("QUERY_TIMEOUT_SECONDS", "1"), ("LONG_QUERY_TIMEOUT_SECONDS", "2")];
    let sluice = database.uncached(&[], &limits);
    assert_eq!(sluice.get("/api/symbols").await.status, 200);
    let mut holder = database.admin().await;
    holder.query_drop("LOCK TABLES api.binance_liqs WRITE").await.unwrap();
    for (target, seconds) in [
        ("/api/symbols".to_owned(), 1),
        ("/api/liquidation-orders?symbol=BTCUSDT&limit=5".to_owned(), 1),
        (format!("/api/liquidation-orders?symbol=BTCUSDT&{YEAR}"), 2),
        (format!("/api/liquidation-orders/stream?symbol=BTCUSDT&{YEAR}"), 2),
    ] {
        let answer = sluice.get(&target).await;
        let expected = format!("{{\"detail\":\"Query timeout after {seconds} seconds\"}}");
        assert_eq!((answer.status, answer.text()), (504, expected), "{target}");
    }
    until("nothing runs on the server", || async { database.running().await.is_empty() }).await;
    holder.query_drop("UNLOCK TABLES").await.unwrap();
    assert_eq!(sluice.get("/api/symbols").await.status, 200);
    // A server that says nothing at all.
    database.signal("STOP");
    let answer = sluice.get("/api/symbols").await;
    database.signal("CONT");
    assert!(matches!(answer.status, 503 | 504), "{}", answer.text());
    until("it answers again", || async { sluice.get("/api/symbols").await.status == 200 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queries_wait_in_a_short_queue_and_beyond_it_are_sent_away() {
    let database = MariaDb::filled().await;
    let bounds = [("pool_max = 20 ", "pool_max = 2"), ("pool_min = 5 ", "pool_min = 1"), ("queue = 64 ", "queue = 3")];
    let sluice = database.uncached(&bounds, &[]);
    assert_eq!(sluice.get("/api/symbols").await.status, 200);
    let mut holder = database.admin().await;
    holder.query_drop("LOCK TABLES api.binance_liqs WRITE").await.unwrap();
    let target = |limit: usize| format!("/api/liquidation-orders?symbol=BTCUSDT&limit={limit}");
    let address = sluice.address;
    let asked: Vec<_> =
        (1..=5).map(|limit| tokio::spawn(async move { crate::support::get(address, &target(limit), &[]).await.status })).collect();
    until("two run", || async { database.running().await.len() == 2 }).await;
    until("three wait", || async { sluice.metric("mysql_waiting", &[]).await == 3.0 }).await;
    let sent_away = sluice.get("/api/symbols").await;
    assert_eq!(sent_away.field("retry-after"), Some("1"));
    assert_eq!(sent_away.text(), "{\"detail\":\"Too many queries are waiting for the database\"}");
    assert!(database.doing().await.len() <= 2 + 1, "no more connections than allowed");
    holder.query_drop("UNLOCK TABLES").await.unwrap();
    for asking in asked {
        assert_eq!(asking.await.unwrap(), 200);
    }
}

/// A table whose stream is much larger than any buffer on its way.
async fn large() -> MariaDb {
    let database = MariaDb::empty(&[]).await;
    database.feed(&recorded_dir().join("schema.sql"));
    database
        .run("USE api; INSERT INTO binance_liqs SELECT 'BTCUSDT', 'buy', 'LIMIT', 'IOC', 1, 1, 1, 'FILLED', 1, 1, seq FROM seq_1_to_400000")
        .await;
    database.index();
    database
}

const ALL: &str = "/api/liquidation-orders/stream?symbol=BTCUSDT&start_timestamp=0&end_timestamp=1000000";

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_takes_no_more_memory_than_its_client_takes_lines() {
    let database = large().await;
    let sluice = database.sluice(&[("timeline = true", "timeline = false")]);
    let mut connection = Connection::open(sluice.address).await;
    connection.send(format!("GET {ALL} HTTP/1.1\r\nHost: api.test\r\n\r\n").as_bytes()).await;
    assert_eq!(connection.head().await.unwrap().status, 200);
    // The client takes nothing: the query waits on the server.
    until("the server waits", || async { database.running().await.len() == 1 }).await;
    let others = sluice.get("/api/liquidation-orders?symbol=BTCUSDT&limit=3").await;
    assert_eq!(others.status, 200);
    // A client that takes all gets all.
    let whole = sluice.get(ALL).await;
    assert!(whole.whole);
    assert_eq!(whole.body.iter().filter(|&&byte| byte == b'\n').count(), 400_000);
    assert!(sluice.process.resident_peak() < 64 << 20, "{}", sluice.process.resident_peak());
    // The one that waited leaves, and its query with it.
    assert_eq!(database.running().await.len(), 1);
    drop(connection);
    let gone = until("the query is gone from the server", || async { database.running().await.is_empty() });
    assert!(tokio::time::timeout(Duration::from_secs(2), gone).await.is_ok(), "within two seconds");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_leaves_streams_to_others() {
    let database = large().await;
    let sluice = database.sluice(&[("timeline = true", "timeline = false")]);
    let begin = async |from: u8| {
        let mut connection = Connection(BufReader::new(connect_from(sluice.address, from).await));
        connection.send(format!("GET {ALL} HTTP/1.1\r\nHost: api.test\r\n\r\n").as_bytes()).await;
        let status = connection.head().await.unwrap().status;
        (connection, status)
    };
    // They take nothing of what they ask for.
    let mut open = Vec::new();
    for _ in 0..12 {
        open.push(begin(9).await);
    }
    let streams = open.iter().filter(|(_, status)| *status == 200).count();
    assert!((3..9).contains(&streams) && open.iter().all(|(_, status)| matches!(status, 200 | 503)), "{streams}");
    assert_eq!(begin(8).await.1, 200);
    drop(open);
    until("the queries are gone from the server", || async { database.running().await.is_empty() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_fails_half_way_is_not_taken_for_whole() {
    let mut database = large().await;
    // The timeline asks the database too, and the query that is killed must be the stream's.
    let sluice = database.sluice(&[("timeline = true", "timeline = false")]);
    let begin = async || {
        let mut connection = Connection::open(sluice.address).await;
        connection.send(format!("GET {ALL} HTTP/1.1\r\nHost: api.test\r\n\r\n").as_bytes()).await;
        let head = connection.head().await.unwrap();
        (connection, head)
    };
    let (mut connection, head) = begin().await;
    // The client takes nothing: the query waits on the server.
    until("the server waits", || async { database.running().await.len() == 1 }).await;
    database.run(&format!("KILL QUERY {}", database.running().await[0])).await;
    let (body, whole) = connection.body(&head).await;
    let text = String::from_utf8_lossy(&body);
    assert!(!whole && text.ends_with("{\"error\": \"Database service unavailable\"}\n"), "{}", &text[text.len() - 200..]);
    assert!(text.lines().count() < 400_000);
    let (mut connection, head) = begin().await;
    database.kill();
    let (body, whole) = connection.body(&head).await;
    assert!(!whole && body.ends_with(b"}\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_connection_is_encrypted_and_the_server_verified_when_asked() {
    let dir = crate::support::scratch();
    let key = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let (cert, private) = (dir.join("cert.pem"), dir.join("key.pem"));
    std::fs::write(&cert, key.cert.pem()).unwrap();
    std::fs::write(&private, key.signing_key.serialize_pem()).unwrap();
    let database = MariaDb::empty(&[
        &format!("--ssl-cert={}", cert.display()),
        &format!("--ssl-key={}", private.display()),
        "--require-secure-transport=ON",
    ])
    .await;
    database.load().await;
    let target = "/api/liquidation-orders?symbol=BTCUSDT&limit=5";
    let mode = |mode: &str| format!("tls = \"{mode}\"");
    let authority = format!("tls = \"verify\"\ntls_ca = \"{}\"", cert.display());
    for (tls, host, status) in [
        (mode("off"), "localhost", 503),
        (mode("require"), "127.0.0.1", 200),
        (mode("verify"), "localhost", 503),
        (authority.clone(), "localhost", 200),
        (authority, "127.0.0.1", 503),
    ] {
        let sluice = database.sluice_with(&[("tls = \"off\"", &tls)], &[("DB_HOST", host)]);
        let answer = sluice.get(target).await;
        assert_eq!(answer.status, status, "{tls} {host}: {}", sluice.logged());
        assert!(!sluice.logged().contains(PASSWORD));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_the_database_is_told_without_its_password() {
    let database = MariaDb::filled().await;
    for (variable, value, words) in [
        ("DB_PASSWORD", "wrong-secret", "Access denied"),
        ("DB_DATABASE", "nowhere", "nowhere"),
        ("DB_LIQ_TABLENAME", "nothing", "cannot be looked at (mysql.database, mysql.table)"),
    ] {
        let sluice = database.sluice_with(&[], &[(variable, value)]);
        let answer = sluice.get("/api/symbols").await;
        assert_eq!((answer.status, answer.text().as_str()), (503, "{\"detail\":\"Database service unavailable\"}"));
        until("it is told", || async { sluice.logged().contains(words) }).await;
        assert!(!sluice.logged().contains(PASSWORD) && !sluice.logged().contains("wrong-secret"));
    }
    database.run("ALTER TABLE api.binance_liqs DROP COLUMN side").await;
    let sluice = database.sluice(&[]);
    assert_eq!(sluice.get("/api/symbols").await.status, 503);
    until("it is told", || async { sluice.logged().contains("the table lacks the column side") }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_kept_and_bounded() {
    let database = MariaDb::filled().await;
    let sluice = database.uncached(&[], &[]);
    until("the least number stands", || async { database.doing().await.len() == 5 }).await;
    let load = (0..200).map(|number| {
        let address = sluice.address;
        tokio::spawn(async move {
            let target = format!("/api/liquidation-orders?symbol=BTCUSDT&limit={}", number % 50 + 1);
            crate::support::get(address, &target, &[]).await.status
        })
    });
    let load: Vec<_> = load.collect();
    let mut most = 0;
    while !load.iter().all(tokio::task::JoinHandle::is_finished) {
        most = most.max(database.doing().await.len());
    }
    assert!((5..=20).contains(&most), "{most}");
    for asked in load {
        assert!(matches!(asked.await.unwrap(), 200 | 503));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn management_works_over_the_native_api_too() {
    let database = MariaDb::filled().await;
    let sluice = database.sluice(&[]);
    for target in ["/api/symbols", "/api/liquidation-orders?symbol=BTCUSDT&limit=5", "/api/liquidation-orders?symbol=btcusdt&limit=5"] {
        sluice.get(target).await;
        assert!(sluice.get(target).await.cache_status().contains("hit"), "{target}");
    }
    let token = format!("Bearer {TOKEN}");
    let post = async |target: &str, fields: &[(&str, &str)]| Connection::open(sluice.address).await.ask("POST", target, fields, b"").await;
    assert_eq!(post("/api/cache/clear?pattern=orders:*", &[]).await.status, 401);
    let cleared = post("/api/cache/clear?pattern=orders:*", &[("Authorization", &token)]).await;
    assert_eq!(cleared.text(), "{\"deleted_keys\":1,\"pattern\":\"orders:*\",\"message\":\"Successfully cleared 1 cache entries\"}");
    let health = sluice.get("/health").await;
    assert_eq!(health.status, 200);
    assert!(
        health.text().contains("\"components\":{\"database\":{\"status\":\"healthy\",\"message\":\"Database connection successful\"}"),
        "{}",
        health.text()
    );
    let line = recorded().into_iter().find(|line| line.target == "/api/symbols" && line.method == "GET").unwrap();
    assert_recorded(&sluice.get("/api/symbols").await, &line, "after all");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_describes_itself_in_native_mode_alone() {
    let sluice = Sluice::with(include_str!("../../proxy.toml"), &[("BACKEND_KIND", "sample"), ("REDIS_URL", "")]);
    let description = sluice.get("/openapi.json").await;
    assert_eq!((description.status, description.field("content-type")), (200, Some("application/json")));
    let document: serde_json::Value = serde_json::from_str(&description.text()).unwrap();
    assert_eq!(document["openapi"], "3.1.0");
    let page = sluice.get("/docs").await;
    assert_eq!((page.status, page.field("content-type")), (200, Some("text/html; charset=utf-8")));
    assert_eq!(sluice.get("/docs/").await.field("location"), Some("http://api.test/docs"));
    let backend = Backend::start(|_| ok("", b"the legacy's own")).await;
    let proxying = Sluice::start(backend.address, "", include_str!("../../proxy.toml")).await;
    assert_eq!(proxying.get("/openapi.json").await.text(), "the legacy's own");
    assert_eq!(proxying.get("/docs").await.text(), "the legacy's own");
}
