//! The real program over real sockets, with a scripted backend, a real Redis and a real MariaDB.
//!
//! A file for what it pins: what is stored and served ([`stored_responses`], [`http_caching`], [`recorded_api`],
//! [`differential`], [`short_way`], [`variants`], [`taken_back`], [`streams`], [`readers`]), how requests are forwarded ([`forwarding`], [`admission`],
//! [`collapsed_forwarding`]), what messages are over both protocols ([`messages`]), what fails
//! ([`upstream_outages`], [`failure_scopes`], [`redis_outages`], [`shared_voids`], [`void_faults`]), what clients change ([`changes`]), what attacks ([`attacks`], [`bounded_memory`], [`slow_clients`], [`neighbours`]), who asks too much
//! ([`rate_limits`]), what operators use ([`client_left`], [`outcomes`], [`explain`], [`alerts`], [`management`], [`admin_page`], [`traces`], [`redaction`], [`command_line`], [`reload`], [`restarts`], [`rollout`], [`warming`]), the
//! API answered here ([`native_api`]), answers computed from orders ([`timeline`]), also under load ([`timeline_load`]), how these heal ([`healing`]), what operators see of them
//! ([`timeline_states`]) and what the service's own
//! cache changed of them ([`timeline_texts`]), what the guides say and what is shipped beside them ([`guides`],
//! [`deployment`]), and the order of
//! the source ([`house`]). Long tables stand beside their test as text.
//!
//! Servers are private: free ports, throw-away data, ended with the test. Nothing here waits on time alone; waits are on
//! answers, counters and metrics ([`support::until`]).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, missing_docs, reason = "a test fails by panicking")]

mod admin_page;
mod admission;
mod alerts;
mod attacks;
mod bounded_memory;
mod changes;
mod client_left;
mod collapsed_forwarding;
mod command_line;
mod deployment;
mod differential;
mod explain;
mod failure_scopes;
mod forwarding;
mod guides;
mod healing;
mod hit_cost;
mod house;
mod http_caching;
mod management;
mod messages;
mod native_api;
mod neighbours;
mod outcomes;
mod rate_limits;
mod readers;
mod recorded_api;
mod redaction;
mod redis_outages;
mod reload;
mod restarts;
mod rollout;
mod shared_voids;
mod short_way;
mod slow_clients;
mod stored_responses;
mod streams;
mod support;
mod taken_back;
mod timeline;
mod timeline_load;
mod timeline_states;
mod timeline_texts;
mod traces;
mod upstream_outages;
mod variants;
mod void_faults;
mod warming;
