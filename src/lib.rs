//! Sluice: a caching reverse proxy for JSON APIs over a database.
//!
//! Put in front of an existing API it makes repeated questions cheap and outages invisible. This is the map of the
//! code; arrows point down, and nothing knows what stands above it.
//!
//! | module | what it is |
//! |---|---|
//! | [`cli`] | the command line: one file a command |
//! | [`app`] | puts the parts together and runs them |
//! | [`admin`], [`explain`], [`local`] | the admin listener; what a rule does; what Sluice answers itself |
//! | [`warm`], [`token`] | asking for targets ahead of clients; who may manage |
//! | [`server`], [`socket`], [`pulse`], [`aside`] | listeners, connections, deadlines, graceful drain; a future beside another |
//! | [`interim`] | 1xx answers on their way past the HTTP library |
//! | [`proxy`] | **the request path, on one screen: begin here** |
//! | [`access`], [`respond`], [`gateway`] | a visit and its log line; answers from entries; headers on their way through |
//! | [`fetch`], [`flight`], [`fill`] | one fetch a key; who waits for it; a body on its way into the cache |
//! | [`entrance`], [`target`], [`route`], [`key`], [`template`] | what a request must be; what a URL says; which rule; who shares an entry |
//! | [`store`] | where answers are kept: memory, Redis, both |
//! | [`backend`] | what answers when the cache cannot: an API over HTTP, or the API here, from MySQL or memory |
//! | [`breaker`], [`purges`], [`invalidated`] | leaving alone what fails; what was purged lately; what a change made doubtful |
//! | [`http`] | **the rules of HTTP caching as pure functions** |
//! | [`outcome`], [`refusal`] | what became of a request, said once; what is refused, and how |
//! | [`config`], [`telemetry`], [`clock`], [`moment`], [`body`] | what everything else stands on |
//!
//! What holds everywhere:
//!
//! * The cache decides in two pure functions, [`http::decide`] (may this be served?) and [`http::freshness`] (may this
//!   be kept?). Everything else carries out what they say.
//! * A fetch is a task of its own. Clients follow it; none of them can end it.
//! * Wall time ([`clock::Wall`]) is for freshness and is handed in; deadlines are the runtime's.
//! * Stores never fail: what cannot be read is a miss, what cannot be written is not kept.
//! * Each serving thread has a runtime of its own; fetches, Redis and the admin listener share another one.

pub mod admin;
pub mod api;
pub mod app;
pub mod body;
pub mod breaker;
pub mod cache;
pub mod cli;
pub mod clock;
pub mod config;
pub mod fetch;
pub mod front;
pub mod http;
pub mod proxy;
pub mod request;
pub mod telemetry;
pub mod upstream;
