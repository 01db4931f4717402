//! Answering from the timeline, and letting it see what the backend answers where it does not.

use http::{Method, StatusCode};
use tokio::sync::OwnedSemaphorePermit;

use super::answer::Answer;
use super::asked::CacheableRequest;
use super::decide::Decision;
use super::outcome::{Outcome, StaleWhy};
use super::spent::Step;
use super::{Proxy, respond};
use crate::cache::entry::Content;
use crate::request::refusal::Refusal;
use crate::timeline::unanswered::Unanswered;
use crate::timeline::{Answered, How, Timeline};
use crate::upstream::failure::Failure;

impl Proxy {
    /// Answers from the timeline, else as if there was none.
    pub(super) async fn answer_from_timeline(&self, timeline: &dyn Timeline, request: CacheableRequest<'_>) -> Answer {
        // Whether a response is for those with credentials, only the backend's own says.
        if request.authorized {
            self.metrics.timeline_unanswered.with_label_values(&[Unanswered::Credentials.name()]).inc();
            return self.answer_from_stored(request).await;
        }
        let canonical = request.canonical.clone();
        let asked = request.for_timeline(&canonical);
        let answered = match timeline.recall(asked) {
            Some(answered) => Ok(answered),
            None => request.spent.on(Step::Timeline, timeline.answer(asked)).await,
        };
        let without_room = matches!(answered, Err(Unanswered::NoRoom));
        let leave = if without_room { self.leave_to_backend(timeline) } else { None };
        if without_room && leave.is_none() {
            return self.answer_without_backend(request).await;
        }
        if let Ok(answered) = answered
            && let Some(answer) = self.respond_computed(&request, &answered).await
        {
            return answer;
        }
        let answer = self.answer_from_stored(request).await;
        drop(leave);
        if matches!(answer.response.status(), StatusCode::OK | StatusCode::NOT_FOUND) {
            timeline.observe(asked, answer.response.status(), answer.response.headers());
        }
        answer
    }

    /// Leave to ask the backend for what there was no room to compute. `None`: it would be slower than asking again in a moment.
    fn leave_to_backend(&self, timeline: &dyn Timeline) -> Option<OwnedSemaphorePermit> {
        let is_busy = self.fetcher.failing().upstream() || self.metrics.backend_pending.get() > 0;
        if is_busy { None } else { timeline.leave_to_backend() }
    }

    /// What is stored, fresh or as stale as it may be while the backend fails; else 503.
    async fn answer_without_backend(&self, mut request: CacheableRequest<'_>) -> Answer {
        let found = self.look_up(&mut request).await;
        let outcome = match self.decide(&request, &found) {
            Decision::Hit(left) => Some(Outcome::Hit(left)),
            Decision::StaleAndRevalidate(by) | Decision::StaleWhileFailing(by) | Decision::Fetch { fallback: Some(by), .. } => {
                Some(Outcome::Stale(by, StaleWhy::Error(Failure::Overloaded)))
            }
            Decision::OnlyIfCached => return Answer::refused(Refusal::OnlyIfCached),
            Decision::Fetch { fallback: None, .. } | Decision::FetchUnstored => None,
        };
        if let Some(outcome) = outcome
            && let Some(response) = self.respond(&request, found.as_ref().ok()).await
        {
            return Answer { response, outcome };
        }
        Answer::refused(Refusal::Overloaded)
    }

    async fn respond_computed(&self, request: &CacheableRequest<'_>, answered: &Answered) -> Option<Answer> {
        let Content::Response(stored) = &answered.entry.content else { return None };
        let (fields, ranges) = (&request.parts.headers, request.parts.method == Method::GET);
        let response =
            respond::from_stored(self.cache.store(), &answered.entry, stored, fields, ranges, request.now, self.max_object).await.ok()?;
        let (outcome, how) = match answered.how {
            How::Known => (Outcome::Computed { waited: false }, "known"),
            How::Waited => (Outcome::Computed { waited: true }, "waited"),
            How::Late(late) => (Outcome::Stale(late, StaleWhy::Revalidating), "stale"),
            How::Failing(late) => (Outcome::Stale(late, StaleWhy::WhileFailing), "stale"),
        };
        self.metrics.timeline_answers.with_label_values(&[how]).inc();
        Some(Answer { response, outcome })
    }
}
