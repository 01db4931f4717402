//! Answering from the timeline, and letting it see what the backend answers where it does not.

use http::{Method, StatusCode};

use super::answer::Answer;
use super::asked::CacheableRequest;
use super::outcome::{Outcome, StaleWhy};
use super::spent::Step;
use super::{Proxy, respond};
use crate::cache::entry::Content;
use crate::timeline::unanswered::Unanswered;
use crate::timeline::{Answered, How, Timeline};

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
            Some(answered) => Some(answered),
            None => request.spent.on(Step::Timeline, timeline.answer(asked)).await.ok(),
        };
        if let Some(answered) = answered
            && let Some(answer) = self.respond_computed(&request, &answered).await
        {
            return answer;
        }
        let answer = self.answer_from_stored(request).await;
        if matches!(answer.response.status(), StatusCode::OK | StatusCode::NOT_FOUND) {
            timeline.observe(asked, answer.response.status(), answer.response.headers());
        }
        answer
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
