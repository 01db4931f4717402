//! Sluice: a caching reverse proxy for JSON APIs over a database.
//!
//! Put in front of an existing API it makes repeated questions cheap and outages invisible. This is the map of the code; how to
//! change it stands in the [`guide`].
//!
//! # A request's way
//!
//! ```text
//!  client
//!    │  bytes
//!  front      connection → socket, framing → HTTP library          deadlines, limits
//!    │              └─ a plain request that hits: answered as bytes (proxy::short)
//!    │  request + Arrival
//!  proxy      handle: refuse → route → limit → admit → look up → decide → respond → finish
//!    │           │                         │         │          │
//!    │           │                         │         │          ├─ hit, or stale ─────────────────► respond
//!    │           │                         │       cache        └─ fetch: miss
//!    │           │                         └─ pass ──────────────┐     │
//!    │           └─ own endpoints (admin)                        │   fetch    collapse → lead → judge → fill → store
//!    │                                                           ▼     ▼                                        │
//!    │                                                         upstream   HTTP, or api: orders from MySQL    cache
//!    ▼  response, Cache-Status, metrics, access log
//! ```
//!
//! # Rooms
//!
//! A room imports rooms that stand below it here, and no other (a test holds the code to that). Its own page says what belongs
//! there and what it may know.
//!
//! | room | what belongs there |
//! |---|---|
//! | [`cli`] | the command line, a file a command |
//! | [`app`] | builds all parts from a configuration, runs them, ends them |
//! | [`admin`] | the admin listener, what Sluice answers itself on the main one, and who may manage |
//! | [`control`] | what changes while the program runs: rules and all that is read with them from the file |
//! | [`front`] | bytes to requests and back: listeners, connections, deadlines, framing |
//! | [`proxy`] | what becomes of a request. **Begin here** |
//! | [`fetch`] | one fetch a key, from the upstream through the cache to all who wait |
//! | [`timeline`] | orders kept in spans of time, from which windows, pages and lists of the newest are computed |
//! | [`cache`] | what is stored, what is void of it, and who gets it: keys, entries, memory, Redis |
//! | [`api`] | the liquidation API answered here, a file an endpoint, over a trait that reads orders |
//! | [`upstream`] | whatever answers when the cache cannot: the trait, the HTTP client, fields on their way |
//! | [`limit`] | how many requests a client may make |
//! | [`redis_link`] | the connections to Redis that all who need it share |
//! | [`telemetry`] | every metric with its unit and meaning; the log; traces |
//! | [`config`] | what `proxy.toml` may say, and what the program makes of it |
//! | [`request`] | what a request says before anybody answers it, and why it may be refused |
//! | [`http`] | the rules of HTTP caching as pure functions |
//! | [`breaker`] | sparing what fails |
//! | [`body`] | bodies as all rooms hand them on |
//! | [`aside`] | work that keeps a core busy, beside the threads that serve |
//! | [`clock`] | wall time |
//!
//! # What holds everywhere
//!
//! * Two pure functions decide: [`proxy::decide`] says what a stored response allows now, [`http::freshness`] whether a new one
//!   may be stored. Everything else carries out what they say.
//! * A fetch is a task of its own. Clients follow it; none of them can end it.
//! * What was voided is not used, whoever stores it and whenever: [`cache::void`].
//! * Wall time ([`clock::Wall`]) is for freshness and is handed in as `now`; deadlines are the runtime's.
//! * A store never fails: what cannot be read is a miss, what cannot be written is not stored.
//! * Each serving thread has a runtime of its own; fetches, Redis and the admin listener share another one.
//! * "Upstream" and "backend" are one: the first is the RFCs' word and the code's, the second the configuration's.
//!
//! # In a program of one's own
//!
//! The program is a library too: a cache in front of whatever implements [`upstream::Backend`].
//!
//! ```
//! use sluice::upstream::upload::Progress;
//! use sluice::upstream::{Backend, ResponseFuture};
//! use sluice::{app, body, config};
//! use std::sync::Arc;
//!
//! struct Hello;
//!
//! impl Backend for Hello {
//!     fn call(&self, request: http::Request<body::Stream>, _: &Arc<Progress>) -> ResponseFuture {
//!         let text = format!("you asked for {}", request.uri());
//!         Box::pin(async { Ok(http::Response::new(body::full(text.into()))) })
//!     }
//! }
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // The file of the program, `proxy.toml`; where its backend is does not matter.
//! let text = "
//!     listen = '127.0.0.1:0'
//!     admin.listen = '127.0.0.1:0'
//!     backend.url = 'http://hello'
//!     route = [{ name = 'all', path = '/*', ttl = '1m' }]";
//! let config = config::check("proxy.toml", text, &|_| None).config.ok_or("it has problems")?;
//! let running = app::start_over(&config, Box::new(Hello)).await?;
//! println!("listening on http://{}", running.address);
//! # use std::io::{Read, Write};
//! # for expected in ["sluice; fwd=uri-miss; stored", "sluice; hit; ttl="] {
//! #     let mut stream = std::net::TcpStream::connect(running.address)?;
//! #     stream.write_all(b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
//! #     let mut answer = String::new();
//! #     stream.read_to_string(&mut answer)?;
//! #     assert!(answer.contains(expected) && answer.ends_with("you asked for /x"), "{answer}");
//! # }
//! running.stop().await;
//! # Ok(())
//! # }
//! ```

pub mod admin;
pub mod api;
pub mod app;
pub mod aside;
pub mod body;
pub mod breaker;
pub mod cache;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod fetch;
pub mod front;
#[doc = include_str!("guide.md")]
pub mod guide {}
pub mod http;
pub mod limit;
pub mod proxy;
pub mod redis_link;
pub mod request;
pub mod telemetry;
pub mod timeline;
pub mod upstream;
