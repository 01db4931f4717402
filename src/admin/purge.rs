//! `POST /purge?pattern=GLOB | symbol=S | tag=T [&soft=true]` → `{"purged":N}`, where N is how many entries it concerned.
//!
//! Where counting takes longer than a moment, the answer is 202 `{"purged":null,"number":I}`: what was purged is void already, and
//! `GET /purge?number=I` says N once it is known. With `"waits":true`, other instances are told when Redis is back.

use std::sync::Arc;

use http::Response;
use serde_json::json;

use super::audit::Actor;
use crate::body::Reply;
use crate::cache::Cache;
use crate::cache::void::Selection;
use crate::config::template::symbol_tag;
use crate::proxy::{Proxy, errors};
use crate::request::target::Target;

/// Removes entries, or with `soft` ends their freshness only.
pub async fn post(proxy: &Arc<Proxy>, target: &Target<'_>, actor: &Actor<'_>) -> Response<Reply> {
    let what = match (target.text("pattern"), target.text("symbol"), target.text("tag")) {
        (Some(pattern), None, None) => Selection::Pattern(pattern.into_owned()),
        (None, Some(symbol), None) => Selection::Tag(symbol_tag(&symbol)),
        (None, None, Some(tag)) => Selection::Tag(tag.into_owned()),
        _ => return errors::json(400, r#"{"detail":"Say what to purge with exactly one of pattern, symbol and tag"}"#),
    };
    let soft = match target.text("soft").as_deref() {
        None | Some("false" | "0") => false,
        Some("true" | "1" | "") => true,
        Some(_) => return errors::json(400, r#"{"detail":"soft is true or false"}"#),
    };
    let told = format!("{what}{}", if soft { ", soft" } else { "" });
    actor.begins(&told);
    let purged = proxy.purge(what, soft).await;
    actor.did(&purged.to_string());
    let mut page = json!({ "purged": purged.count });
    if purged.count.is_none() {
        page["number"] = json!(purged.number);
    }
    if purged.waits {
        page["waits"] = json!(true);
    }
    errors::json(if purged.count.is_some() { 200 } else { 202 }, page.to_string())
}

/// How many entries a purge concerned, `null` while that is not known.
pub fn get(cache: &Cache, target: &Target<'_>) -> Response<Reply> {
    match target.text("number").and_then(|number| number.parse().ok()) {
        Some(number) => errors::json(200, json!({ "purged": cache.log().and_then(|log| log.count(number)) }).to_string()),
        None => errors::wrong_method("POST"),
    }
}
