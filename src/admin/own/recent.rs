//! What somebody else said lately. It is asked for at most once a second, once at a time, and to the end, so that a client that asks Sluice
//! puts no load there, however often they ask and leave.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

/// For how long what was said is believed.
const VALID_FOR: Duration = Duration::from_secs(1);

/// What was said last, and when.
pub struct Recent<T>(Arc<Mutex<Option<(Instant, T)>>>);

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Clone + Send + 'static> Recent<T> {
    /// What was said a moment ago, or else what `ask` finds out. `None`: that failed.
    pub async fn get(&self, ask: impl Future<Output = T> + Send + 'static) -> Option<T> {
        let mut last = Arc::clone(&self.0).lock_owned().await;
        if let Some((at, said)) = &*last
            && at.elapsed() < VALID_FOR
        {
            return Some(said.clone());
        }
        let asking = tokio::spawn(async move {
            let said = ask.await;
            *last = Some((Instant::now(), said.clone()));
            said
        });
        asking.await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test(start_paused = true)]
    async fn many_who_ask_and_leave_cause_one_question_a_second() {
        let (recent, asked) = (Recent::default(), Arc::new(AtomicU32::new(0)));
        let ask = || {
            let asked = Arc::clone(&asked);
            async move {
                tokio::time::sleep(Duration::from_millis(100)).await;
                asked.fetch_add(1, Ordering::Relaxed)
            }
        };
        for _ in 0..50 {
            // It leaves before there is an answer.
            let left = tokio::time::timeout(Duration::from_millis(1), recent.get(ask())).await;
            assert!(left.is_err());
        }
        assert_eq!((recent.get(ask()).await, asked.load(Ordering::Relaxed)), (Some(0), 1));
        assert_eq!(recent.get(ask()).await, Some(0));
        tokio::time::sleep(VALID_FOR).await;
        assert_eq!(recent.get(ask()).await, Some(1));
    }
}
