//! The addresses of the backend's name: asked for by one look-up at a time, however many connections are made.
//!
//! The system's resolver may take half a minute to say that it knows nothing, and keeps a thread busy for as long. An answer is used for a
//! second. Then it is asked for anew; if that takes long, or fails, what was known before is used meanwhile.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use std::vec::IntoIter;

use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tower_service::Service;

/// For how long an answer is used without asking.
const FRESH: Duration = Duration::from_secs(1);
/// How long a new answer is waited for where there is one from before.
const PATIENCE: Duration = Duration::from_millis(100);
/// A look-up is given up after so long: it may have begun before the name server was there again.
const LONGEST: Duration = Duration::from_secs(30);
/// For how long an answer is used while there is no newer one. An address may be another program's after that.
const KEPT: Duration = Duration::from_secs(600);

/// Resolves the name of one backend.
#[derive(Clone)]
pub struct Resolver<L = GaiResolver> {
    look_up: L,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Told when a look-up is over.
    over: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    /// The last addresses, at least one, and when they came.
    known: Option<(Vec<SocketAddr>, Instant)>,
    /// Why the last look-up gave none, if it did not.
    error: Option<String>,
    /// Since when one is under way.
    asking: Option<Instant>,
    /// How many were given the addresses.
    turn: usize,
}

impl State {
    /// Addresses that are no older than this.
    fn known_within(&mut self, age: Duration) -> Option<Vec<SocketAddr>> {
        let (known, _) = self.known.as_ref().filter(|(_, since)| since.elapsed() < age)?;
        let mut addresses = known.clone();
        // Those of the preferred family take turns at being the first, so that connections are spread over all of them.
        let preferred = addresses.iter().take_while(|one| one.is_ipv4() == addresses[0].is_ipv4()).count();
        self.turn = self.turn.wrapping_add(1);
        addresses[..preferred].rotate_left(self.turn % preferred.max(1));
        Some(addresses)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A look-up under way. Over when this is dropped, also where its task ends with its runtime.
struct Asking(Arc<Shared>);

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.state().asking = None;
        self.0.over.send_replace(());
    }
}

impl Default for Resolver {
    fn default() -> Self {
        Self::over(GaiResolver::new())
    }
}

impl<L> Resolver<L> {
    /// Asks by `look_up`.
    fn over(look_up: L) -> Self {
        Self { look_up, shared: Arc::new(Shared { state: Mutex::default(), over: watch::Sender::new(()) }) }
    }
}

impl<L> Resolver<L>
where
    L: Service<Name, Response: Iterator<Item = SocketAddr>, Error = io::Error, Future: Send> + Clone + Send + Sync + 'static,
{
    /// The addresses of the name.
    ///
    /// # Errors
    /// None is known, and the look-up failed. The caller sets the deadline.
    async fn resolve(self, name: Name) -> io::Result<Vec<SocketAddr>> {
        let mut over = self.shared.over.subscribe();
        let (before, asked_for) = {
            let mut state = self.shared.state();
            if let Some(fresh) = state.known_within(FRESH) {
                return Ok(fresh);
            }
            let since = *state.asking.get_or_insert_with(|| {
                tokio::spawn(self.clone().ask(name));
                Instant::now()
            });
            (state.known_within(KEPT), since.elapsed())
        };
        let Some(before) = before else {
            // The sender is ours: this does not fail.
            let _ = over.changed().await;
            let mut state = self.shared.state();
            let known = state.known_within(KEPT);
            let why = || state.error.clone().unwrap_or_else(|| "the look-up was given up".to_owned());
            return known.ok_or_else(|| io::Error::other(why()));
        };
        let _ = timeout(PATIENCE.saturating_sub(asked_for), over.changed()).await;
        Ok(self.shared.state().known_within(KEPT).unwrap_or(before))
    }

    async fn ask(mut self, name: Name) {
        let asking = Asking(Arc::clone(&self.shared));
        let late = |_| Err(io::Error::other(format!("no answer within {LONGEST:?}")));
        let answer = timeout(LONGEST, self.look_up.call(name)).await.unwrap_or_else(late);
        let mut state = self.shared.state();
        match answer.map(Iterator::collect::<Vec<_>>) {
            Ok(addresses) if !addresses.is_empty() => (state.known, state.error) = (Some((addresses, Instant::now())), None),
            Ok(_) => state.error = Some("the name has no address".to_owned()),
            Err(error) => state.error = Some(error.to_string()),
        }
        drop(state);
        drop(asking);
    }
}

impl<L> Service<Name> for Resolver<L>
where
    L: Service<Name, Response: Iterator<Item = SocketAddr>, Error = io::Error, Future: Send> + Clone + Send + Sync + 'static,
{
    type Response = IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<IntoIter<SocketAddr>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let resolving = self.clone().resolve(name);
        Box::pin(async move { Ok(resolving.await?.into_iter()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Says so, after so long; counts how often it is asked.
    #[derive(Clone)]
    struct Fake(Arc<Mutex<(Duration, Option<u16>)>>, Arc<AtomicUsize>);

    impl Service<Name> for Fake {
        type Response = IntoIter<SocketAddr>;
        type Error = io::Error;
        type Future = Pin<Box<dyn Future<Output = io::Result<IntoIter<SocketAddr>>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Name) -> Self::Future {
            let (after, port) = *self.0.lock().unwrap();
            self.1.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                tokio::time::sleep(after).await;
                let addresses = port.map(|port| vec![SocketAddr::from(([127, 0, 0, 1], port))]);
                addresses.map(Vec::into_iter).ok_or_else(|| io::Error::other("no such name"))
            })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_look_up_serves_all_and_what_was_known_serves_while_the_next_one_hangs() {
        let fake = Fake(Arc::new(Mutex::new((Duration::from_millis(50), None))), Arc::default());
        let resolver = Resolver::over(fake.clone());
        let says = |after: u64, port: Option<u16>| *fake.0.lock().unwrap() = (Duration::from_millis(after), port);
        let asked = || fake.1.load(Ordering::Relaxed);
        let resolve = async || {
            let (name, began) = ("api.test".parse().unwrap(), Instant::now());
            (resolver.clone().resolve(name).await.map(|addresses| addresses[0].port()).ok(), began.elapsed().as_millis())
        };
        assert_eq!(resolve().await.0, None);
        says(50, Some(1));
        assert_eq!(tokio::join!(resolve(), resolve(), resolve()), ((Some(1), 50), (Some(1), 50), (Some(1), 50)));
        assert_eq!((resolve().await, asked()), ((Some(1), 0), 2));
        tokio::time::advance(FRESH).await;
        says(50, Some(2));
        assert_eq!((resolve().await, asked()), ((Some(2), 50), 3));
        // It hangs. Who comes first waits a little, others not at all, and nobody asks again.
        tokio::time::advance(FRESH).await;
        says(20_000, Some(3));
        assert_eq!((resolve().await, resolve().await, asked()), ((Some(2), 100), (Some(2), 0), 4));
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert_eq!((resolve().await.0, asked()), (Some(3), 4));
        // It fails.
        tokio::time::advance(FRESH).await;
        says(10, None);
        assert_eq!(resolve().await, (Some(3), 10));
        tokio::time::advance(KEPT).await;
        assert_eq!(resolve().await.0, None);
    }
}
