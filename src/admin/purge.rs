//! `POST /purge?pattern=GLOB | symbol=S | tag=T [&soft=true]` → `{"purged":N}`.

use http::Response;
use serde_json::json;

use crate::body::Reply;
use crate::cache::Cache;
use crate::cache::void::Selection;
use crate::config::template::symbol_tag;
use crate::proxy::errors;
use crate::request::target::Target;

/// Removes entries, or with `soft` ends their freshness only.
pub async fn post(cache: &Cache, target: &Target<'_>) -> Response<Reply> {
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
    let purged = cache.purge(what, soft).await;
    errors::json(200, json!({ "purged": purged }).to_string())
}
