//! `POST /purge?pattern=GLOB | symbol=S | tag=T [&soft=true]` → `{"purged":N}`.

use http::Response;
use serde_json::json;

use crate::body::Reply;
use crate::cache::Selection;
use crate::config::template::symbol_tag;
use crate::fetch::Fetcher;
use crate::proxy::respond;
use crate::request::target::Target;

/// Removes entries, or with `soft` ends their freshness only.
pub async fn post(fetcher: &Fetcher, target: &Target<'_>) -> Response<Reply> {
    let what = match (target.text("pattern"), target.text("symbol"), target.text("tag")) {
        (Some(pattern), None, None) => Selection::Pattern(pattern.into_owned()),
        (None, Some(symbol), None) => Selection::Tag(symbol_tag(&symbol)),
        (None, None, Some(tag)) => Selection::Tag(tag.into_owned()),
        _ => return respond::json(400, r#"{"detail":"Say what to purge with exactly one of pattern, symbol and tag"}"#),
    };
    let soft = match target.text("soft").as_deref() {
        None | Some("false" | "0") => false,
        Some("true" | "1" | "") => true,
        Some(_) => return respond::json(400, r#"{"detail":"soft is true or false"}"#),
    };
    let purged = fetcher.purge(&what, soft).await;
    respond::json(200, json!({ "purged": purged }).to_string())
}
