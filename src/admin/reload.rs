//! `POST /reload`: reads the configuration file again.

use std::sync::Arc;

use http::Response;
use serde_json::json;

use super::audit::Actor;
use crate::body::Reply;
use crate::control::reload::{self, ReloadError, Reloaded, Reloader};
use crate::proxy::errors;

/// Says what became of it: 200, 400 for a file with problems, 409 for one that only a restart takes over.
pub async fn post(reloader: Option<&Arc<Reloader>>, actor: &Actor<'_>) -> Response<Reply> {
    let Some(reloader) = reloader.cloned() else {
        return errors::json(409, r#"{"detail":"This configuration does not come from a file"}"#);
    };
    actor.begins("");
    let reloaded = tokio::task::spawn_blocking(move || reloader.reload()).await;
    if let Ok(reloaded) = &reloaded {
        actor.did(&reload::result(reloaded));
    }
    match reloaded {
        Ok(Ok(Reloaded::Applied { rules, digest })) => {
            errors::json(200, json!({"reloaded": true, "rules": rules, "digest": digest}).to_string())
        }
        Ok(Ok(Reloaded::Unchanged { digest })) => errors::json(200, json!({"reloaded": false, "digest": digest}).to_string()),
        Ok(Err(ReloadError::Invalid(problems))) => {
            errors::json(400, json!({"detail": "The configuration has problems", "problems": problems}).to_string())
        }
        Ok(Err(error @ ReloadError::Unreadable(_))) => errors::json(400, json!({"detail": error.to_string()}).to_string()),
        Ok(Err(error @ ReloadError::NeedsRestart(_))) => errors::json(409, json!({"detail": error.to_string()}).to_string()),
        Err(_) => errors::json(500, r#"{"detail":"The reload failed; see the log"}"#),
    }
}
