//! What a gateway does to messages, and to connections.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{Backend, Connection, Sluice, Step, get, ok, one_rule, reply, until};

fn rules() -> String {
    format!("[[route]]\nname='pass'\npath='/pass/*'\ncache=false\n{}", one_rule("ttl='1h'"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backend_gets_what_it_may_know() {
    let backend = Backend::start(|_| ok("", b"x")).await;
    let sluice = Sluice::ruled(backend.address, "", &rules()).await;
    let fields = [
        ("Connection", "keep-alive, X-Mine"),
        ("X-Mine", "1"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Authorization", "secret"),
        ("TE", "trailers"),
        ("X-Request-Id", "abc-123"),
        ("X-Forwarded-For", "6.6.6.6"),
        ("Cookie", "a=b"),
    ];
    let answer = sluice.get_with("/x", &fields).await;
    assert_eq!(answer.field("x-request-id"), Some("abc-123"));
    assert_eq!(answer.field("via"), Some("1.1 sluice"));
    let asked = backend.last();
    for (name, value) in [
        ("host", Some(backend.address.to_string().as_str())),
        ("via", Some("1.1 sluice")),
        ("x-request-id", Some("abc-123")),
        ("x-forwarded-for", Some("127.0.0.1")),
        ("x-forwarded-host", None),
        ("x-mine", None),
        ("keep-alive", None),
        ("proxy-authorization", None),
        ("te", None),
        ("cookie", None),
    ] {
        assert_eq!(asked.field(name), value, "{name}");
    }
    // What is not cached may know more.
    sluice.get_with("/pass/x", &fields).await;
    let asked = backend.last();
    assert_eq!(
        (asked.field("cookie"), asked.field("x-forwarded-host"), asked.field("x-forwarded-proto")),
        (Some("a=b"), Some("api.test"), Some("http"))
    );
    // One that the client did not name gets an id.
    assert_eq!(sluice.get("/pass/y").await.field("x-request-id").map(str::len), Some(16));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_gets_what_it_may_know() {
    let backend = Backend::start(|asked| {
        let location = format!("Location: http://{}/moved\r\n", asked.field("host").unwrap());
        reply(
            "307 Moved",
            &format!("{location}Connection: X-Inner\r\nX-Inner: 1\r\nKeep-Alive: timeout=5\r\nX-Request-Id: backend\r\n"),
            b"",
        )
    })
    .await;
    let sluice = Sluice::ruled(backend.address, "", &rules()).await;
    for target in ["/x", "/pass/x"] {
        let answer = sluice.get_with(target, &[("X-Request-Id", "mine")]).await;
        assert_eq!(answer.status, 307);
        assert_eq!(answer.field("location"), Some("http://api.test/moved"));
        assert_eq!(answer.field("x-request-id"), Some("mine"));
        assert_eq!((answer.field("x-inner"), answer.field("keep-alive")), (None, None));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn host_and_public_url_as_configured() {
    let backend = Backend::start(|_| ok("", b"x")).await;
    let text = format!(
        "public_url='https://api.example'\n[backend]\nurl='http://{}'\nhost='inner.example'\n[cache]\nredis=''\n{}",
        backend.address,
        one_rule("ttl='1h'")
    );
    let sluice = Sluice::with(&text, &[]);
    sluice.get("/x").await;
    let asked = backend.last();
    assert_eq!(asked.field("host"), Some("inner.example"));
    assert_eq!((asked.field("x-forwarded-proto"), asked.field("x-forwarded-host")), (Some("https"), Some("api.example")));
}

#[tokio::test(flavor = "multi_thread")]
async fn request_bodies_stream_to_the_backend() {
    let backend = Backend::start(|asked| ok("", format!("{} {}", asked.method, asked.body.len()).as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", &rules()).await;
    let body = vec![b'x'; 3 << 20];
    let answer = Connection::open(sluice.address).await.ask("POST", "/x", &[], &body).await;
    assert_eq!(answer.text(), format!("POST {}", 3 << 20));
    assert_eq!(answer.cache_status(), "sluice; fwd=method");
    let mut chunked = Connection::open(sluice.address).await;
    chunked.send(b"PUT /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n").await;
    assert_eq!(chunked.answer(false).await.unwrap().text(), "PUT 5");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_the_backend_are_kept() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", &rules()).await;
    let mut connection = Connection::open(sluice.address).await;
    for number in 0..50 {
        assert_eq!(connection.ask("GET", &format!("/pass/{number}"), &[], b"").await.status, 200);
    }
    // One that the backend closed meanwhile is not the client's trouble.
    let closing = Backend::start(|asked| {
        let mut steps = ok("", asked.target.as_bytes());
        steps.push(Step::Close);
        steps
    })
    .await;
    let sluice = Sluice::ruled(closing.address, "", &rules()).await;
    for number in 0..100 {
        assert_eq!(sluice.get(&format!("/{number}")).await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_with_prior_knowledge() {
    use http_body_util::BodyExt;
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", &rules()).await;
    let stream = tokio::net::TcpStream::connect(sluice.address).await.unwrap();
    let io = hyper_util::rt::TokioIo::new(stream);
    let (sender, connection) = hyper::client::conn::http2::handshake(hyper_util::rt::TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    for (round, status) in [(0, "fwd=uri-miss; stored"), (1, "hit; ttl=")] {
        let asking: Vec<_> = (0..20)
            .map(|number| {
                let mut sender = sender.clone();
                tokio::spawn(async move {
                    let request = http::Request::builder()
                        .uri(format!("http://api.test/{number}"))
                        .body(http_body_util::Empty::<bytes::Bytes>::new());
                    let answer = sender.send_request(request.unwrap()).await.unwrap();
                    let said = answer.headers()["cache-status"].to_str().unwrap().to_owned();
                    (said, answer.into_body().collect().await.unwrap().to_bytes(), number)
                })
            })
            .collect();
        for asked in asking {
            let (said, body, number) = asked.await.unwrap();
            assert_eq!(body, format!("/{number}"), "round {round}");
            assert!(said.contains(status), "{said}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn told_to_stop_it_finishes_what_is_open() {
    for signal in ["TERM", "INT"] {
        let backend = Backend::start(|asked| {
            let mut steps = vec![Step::Delay(std::time::Duration::from_millis(300))];
            steps.extend(ok("", asked.target.as_bytes()));
            steps
        })
        .await;
        let mut sluice = Sluice::ruled(backend.address, "", &rules()).await;
        let _idle = Connection::open(sluice.address).await;
        let mut open = Connection::open(sluice.address).await;
        open.send(b"GET /open HTTP/1.1\r\nHost: h\r\n\r\n").await;
        until("the request is under way", || async { backend.count() == 1 }).await;
        sluice.process.signal(signal);
        let answer = open.answer(false).await.expect("an answer to the open request");
        assert_eq!((answer.text().as_str(), answer.whole), ("/open", true));
        let child = &mut sluice.process.child;
        let mut code = None;
        until("the program ends", || {
            code = child.try_wait().unwrap();
            let ended = code.is_some();
            async move { ended }
        })
        .await;
        assert_eq!(code.unwrap().code(), Some(0), "{signal}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_listens_on_every_address_if_told() {
    let backend = Backend::start(|_| ok("", b"x")).await;
    let mut command = crate::support::program();
    let file = std::env::temp_dir().join(format!("sluice-v6-{}.toml", std::process::id()));
    std::fs::write(&file, format!("[backend]\nurl='http://{}'\n[cache]\nredis=''\n", backend.address)).unwrap();
    command.args(["--config", file.to_str().unwrap(), "--listen", "[::]:0", "--admin-listen", "127.0.0.1:0"]);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
    let port: u16 = line.trim().rsplit(':').next().unwrap().parse().unwrap();
    for address in ["127.0.0.1", "::1"] {
        let address = std::net::SocketAddr::new(address.parse().unwrap(), port);
        assert_eq!(get(address, "/x", &[]).await.status, 200);
    }
    assert_eq!(backend.last().field("x-forwarded-for"), Some("::1"));
    child.kill().unwrap();
    child.wait().unwrap();
    std::fs::remove_file(file).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn doubtful_paths_are_forwarded_verbatim_and_never_cached() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", &rules()).await;
    for target in ["/api%2Fsymbols", "//api/symbols", "/api/./symbols", "/api/x/../symbols", "/api/%2e%2e/x", "/a;b", "/a%3Fb=1"] {
        for _ in 0..2 {
            let answer = sluice.get(target).await;
            assert_eq!(answer.text(), target);
            assert_eq!(answer.cache_status(), "sluice; fwd=bypass; detail=doubtful-path");
        }
        assert_eq!(backend.count_of(target), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_and_harm_nothing() {
    let backend = Backend::start(|asked| ok("", asked.target.as_bytes())).await;
    let sluice = Sluice::ruled(backend.address, "", &rules()).await;
    assert_eq!(sluice.get("/clean").await.text(), "/clean");
    for request in [
        "GET /a%00 HTTP/1.1\r\nHost: h\r\n\r\n",
        "GET /a?x=%0d%0a HTTP/1.1\r\nHost: h\r\n\r\n",
        "GET /a?x=%zz HTTP/1.1\r\nHost: h\r\n\r\n",
        "GET /a HTTP/1.1\r\n\r\n",
        "GET /a HTTP/1.1\r\nHost: h\r\nHost: i\r\n\r\n",
        "GET /a HTTP/1.1\r\nHost: user@h\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
        "GET /a\u{1} HTTP/1.1\r\nHost: h\r\n\r\n",
        "nonsense\r\n\r\n",
    ] {
        let mut connection = Connection::open(sluice.address).await;
        connection.send(request.as_bytes()).await;
        assert_eq!(connection.head().await.map(|answer| answer.status), Some(400), "{request:?}");
        assert!(sluice.get("/clean").await.cache_status().contains("hit"));
    }
    assert_eq!(backend.count(), 1);
}

/// Interim answers arrive while the final one is still being waited for, and only on the request that they belong to.
#[tokio::test(flavor = "multi_thread")]
async fn interim_answers_are_passed_on() {
    let backend = Backend::start(|asked| {
        let early = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\nConnection: close\r\n\r\n".to_vec();
        let last = ok("Cache-Control: max-age=60\r\n", asked.target.as_bytes());
        [Step::Send(b"HTTP/1.1 102 Processing\r\n\r\n".to_vec()), Step::Send(early), Step::Delay(Duration::from_millis(300))]
            .into_iter()
            .chain(last)
            .collect()
    })
    .await;
    for rule in ["ttl='0s'", "cache=false"] {
        let sluice = Sluice::ruled(backend.address, "", &one_rule(rule)).await;
        let mut connection = Connection::open(sluice.address).await;
        for target in ["/a", "/b"] {
            connection.send(format!("GET {target} HTTP/1.1\r\nHost: api.test\r\n\r\n").as_bytes()).await;
            let (first, second) = (connection.head().await.unwrap(), connection.head().await.unwrap());
            assert_eq!((first.status, second.status), (102, 103), "{rule}");
            assert_eq!((second.field("link"), second.field("connection")), (Some("</style.css>"), None));
            let last = connection.answer(false).await.unwrap();
            assert_eq!((last.status, last.text().as_str()), (200, target));
        }
        // Only those who wait for the backend get them; HTTP/1.0 has none.
        let mut old = Connection::open(sluice.address).await;
        old.send(b"GET /old HTTP/1.0\r\nHost: api.test\r\n\r\n").await;
        assert_eq!(old.answer(false).await.unwrap().status, 200);
        if rule.starts_with("ttl") {
            let hit = sluice.get("/a").await;
            assert_eq!((hit.status, hit.text().as_str()), (200, "/a"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_things_are_is_said_as_clients_reach_it_and_never_as_another_client_asked() {
    // Says in each answer where it is: at its own address, by the Host that it was sent, or by its public name.
    let own = Arc::new(Mutex::new(String::new()));
    let known = Arc::clone(&own);
    let backend = Backend::start(move |asked| {
        let scheme = if asked.target.contains("tls") { "https" } else { "http" };
        let name = if asked.target.contains("address") { known.lock().unwrap().clone() } else { asked.field("host").unwrap().to_owned() };
        let forwarded = asked.field("x-forwarded-host").unwrap_or("none");
        let url = format!("{scheme}://{name}/to");
        let fields = format!("Location: {url}\r\nContent-Location: {url}\r\nX-Was: {forwarded}\r\nCache-Control: max-age=600\r\n");
        reply(if asked.target.contains("moved") { "302 Found" } else { "200 OK" }, &fields, b"x")
    })
    .await;
    *own.lock().unwrap() = backend.address.to_string();
    for public in [None, Some("https://api.example"), Some("http://api.example:8443")] {
        for host in [None, Some("api.example"), Some("inner.test:8000")] {
            let public_line = public.map_or(String::new(), |url| format!("public_url='{url}'\n"));
            let host_line = host.map_or(String::new(), |host| format!("host='{host}'\n"));
            let url = format!("url='http://{}'", backend.address);
            let rules = "[[route]]\nname='pass'\npath='/pass/*'\ncache=false\n[[route]]\nname='all'\npath='/*'\nttl='0s'\n";
            let sluice = Sluice::with(&format!("{public_line}[backend]\n{url}\n{host_line}[cache]\nredis=''\n{rules}"), &[]);
            for target in ["/moved/host", "/moved/host-tls", "/moved/address", "/moved/address-tls", "/host", "/host-tls", "/address"] {
                for prefix in ["", "/pass"] {
                    for asked_for in ["evil.example", "api.example", "other.example", "evil.example"] {
                        let mut connection = Connection::open(sluice.address).await;
                        let claims = "X-Forwarded-Host: evil.example\r\nX-Forwarded-Proto: https\r\nForwarded: host=evil.example\r\n";
                        connection.send(format!("GET {prefix}{target} HTTP/1.1\r\nHost: {asked_for}\r\n{claims}\r\n").as_bytes()).await;
                        let answer = connection.answer(false).await.unwrap();
                        let said = answer.field("location").unwrap();
                        assert_eq!(answer.field("content-location"), Some(said));
                        let scheme = if target.contains("tls") { "https" } else { "http" };
                        let case = format!("{public:?} {host:?} {prefix}{target} {asked_for}: {said} {}", answer.cache_status());
                        let expected = match (public, host.filter(|_| !target.contains("address"))) {
                            (Some(public), _) => format!("{public}/to"),
                            (None, None) => format!("{scheme}://{asked_for}/to"),
                            (None, Some(host)) if host == asked_for => format!("{scheme}://{host}/to"),
                            (None, Some(_)) => "/to".to_owned(),
                        };
                        assert_eq!(said, expected, "{case}");
                        if public.is_some() {
                            let whole = format!("{:?}", answer.fields);
                            assert!(!whole.contains("evil") && !whole.contains("inner"), "{case}: {whole}");
                        }
                    }
                }
            }
        }
    }
}
