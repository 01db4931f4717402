//! Computing one answer: the API's own endpoint code, over what a request sees of the timeline.

use std::sync::Arc;

use bytes::Bytes;
use http::{Response, StatusCode};

use super::endpoint::Endpoint;
use super::engine::{Allowed, Engine};
use super::room::Place;
use super::symbol::Symbol;
use super::unanswered::Unanswered;
use super::view::{Made, View};
use crate::api::answer::{ApiError, refuse};
use crate::api::orders::Orders;
use crate::api::{liquidation_orders, liquidations};
use crate::body::{self, Stream};
use crate::request::target::Target;

/// A computed answer.
pub struct Computed {
    /// 200, or 404 where there are no such orders.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
    /// From what it was made.
    pub made: Made,
    /// The room that it was made in; `None`: it was given back.
    pub place: Option<Place>,
}

/// The same as [`answer`] for a check, which gives its room back at once and does not ask why there is none.
pub async fn compute<S: Orders>(
    engine: &Arc<Engine<S>>,
    symbol: &Arc<Symbol>,
    endpoint: Endpoint,
    target: &str,
    allowed: Allowed,
) -> Option<Computed> {
    answer(engine, symbol, endpoint, target, allowed).await.ok().map(|computed| Computed { place: None, ..computed })
}

/// Computes the answer to a request that was found to be about `symbol`.
///
/// # Errors
/// Not all of it is known, or backends may answer it differently.
pub async fn answer<S: Orders>(
    engine: &Arc<Engine<S>>,
    symbol: &Arc<Symbol>,
    endpoint: Endpoint,
    target: &str,
    allowed: Allowed,
) -> Result<Computed, Unanswered> {
    let target = Target::parse(target).map_err(|_| Unanswered::Shape)?;
    let view = View::new(Arc::clone(engine), Arc::clone(symbol), allowed);
    let answer = match endpoint {
        Endpoint::Liquidations => liquidations::get(&view, &target).await,
        Endpoint::Orders => liquidation_orders::get(&view, &target).await,
    };
    let answer: Response<Stream> = match answer {
        Ok(answer) => answer,
        Err(nothing @ ApiError::NotFound(_)) => refuse(nothing),
        Err(ApiError::Invalid(_) | ApiError::BadRequest(_)) => return Err(Unanswered::Shape),
        Err(ApiError::Orders(_)) => return Err(view.unanswered().unwrap_or(Unanswered::Lost)),
    };
    let status = answer.status();
    let body = body::read(answer.into_body(), usize::MAX).await.ok_or(Unanswered::Lost)?;
    Ok(Computed { status, body, made: view.made(), place: view.place() })
}
