//! Reads that go to Redis together, each with its own answer.

use std::time::Duration;

use redis::{Pipeline, RedisError, Value};
use tokio::sync::oneshot::{self, Receiver, Sender};

use super::failure::RedisFailure;
use super::large::LARGE;

/// At most this many reads go together: the first answer waits for the last.
const MOST: usize = 32;

/// What comes with a batch beside its first read has this much more time, by the most bytes that it can be: what a fast network that others
/// use too carries in a second.
const A_SECOND: u64 = 64 << 20;

/// The first bytes of a value: those of one that is not large, and no more of one that is.
const FIRST: &[u8] = b"0";
const LAST: &[u8] = b"262143";

/// What Redis keeps under a name.
#[derive(Debug, PartialEq, Eq)]
pub struct Kept {
    /// The bytes; of a large value the first ones, until it has been read over a connection of its own.
    pub bytes: Vec<u8>,
    /// For how long Redis will keep them; `None`: for ever.
    pub left: Option<Duration>,
}

/// What comes of a read; `None`: there is nothing under the name.
pub type Read = Result<Option<Kept>, RedisFailure>;

/// Reads that were not sent yet.
#[derive(Default)]
pub struct Reads {
    commands: Pipeline,
    waiting: Vec<Sender<Read>>,
}

impl Reads {
    /// Adds a read. Its answer comes with those of all others.
    pub fn add(&mut self, name: &[u8]) -> Receiver<Read> {
        let (sender, receiver) = oneshot::channel();
        // However large the value is: others wait behind it.
        self.commands.cmd("GETRANGE").arg(name).arg(FIRST).arg(LAST).pttl(name);
        self.waiting.push(sender);
        receiver
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether they must be sent before another one is added.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.waiting.len() >= MOST
    }

    /// How long the answers may take together, where that of one read may take `deadline`.
    #[must_use]
    pub fn deadline(&self, deadline: Duration) -> Duration {
        let more = self.waiting.len().saturating_sub(1) as u64 * LARGE as u64;
        deadline + Duration::from_micros(more * 1_000_000 / A_SECOND)
    }

    /// The commands to send.
    #[must_use]
    pub const fn commands(&self) -> &Pipeline {
        &self.commands
    }

    /// Gives each its answer of those that came. What Redis refused of some concerns no others.
    ///
    /// # Errors
    /// The first refusal.
    pub fn answer(self, answers: Vec<Value>) -> Result<(), RedisError> {
        let mut answers = answers.into_iter();
        let mut first_refusal = Ok(());
        for sender in self.waiting {
            let read = kept(answers.next(), answers.next());
            if let (Ok(()), Err(refusal)) = (&first_refusal, &read) {
                first_refusal = Err(refusal.clone());
            }
            // The task that asked may be gone.
            let _ = sender.send(read.map_err(RedisFailure::Error));
        }
        first_refusal
    }

    /// Tells each that nothing came.
    pub fn fail(self, failure: &RedisFailure) {
        for sender in self.waiting {
            let _ = sender.send(Err(failure.clone()));
        }
    }
}

/// What the answers to `GETRANGE` and `PTTL` say. The first has no bytes also where there is nothing; the second is -2 then.
fn kept(bytes: Option<Value>, left: Option<Value>) -> Result<Option<Kept>, RedisError> {
    let left = left.unwrap_or(Value::Nil).extract_error()?;
    let Value::BulkString(bytes) = bytes.unwrap_or(Value::Nil).extract_error()? else { return Ok(None) };
    match left {
        Value::Int(-2) if bytes.is_empty() => Ok(None),
        Value::Int(left) => Ok(Some(Kept { bytes, left: u64::try_from(left).ok().map(Duration::from_millis) })),
        _ => Ok(Some(Kept { bytes, left: None })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: &str) -> Value {
        redis::parse_redis_value(format!("-{code} no\r\n").as_bytes()).unwrap()
    }

    #[test]
    fn what_is_read_first_is_all_of_what_is_not_large() {
        assert_eq!(LAST, (LARGE - 1).to_string().as_bytes());
    }

    #[test]
    fn each_gets_its_own_answer_and_what_is_refused_of_one_concerns_no_other() {
        let bytes = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let answers = [
            [bytes("a"), Value::Int(1500)],
            [bytes(""), Value::Int(-2)],
            [bytes(""), Value::Int(7)],
            [refused("WRONGTYPE"), Value::Int(3)],
            [bytes("b"), Value::Int(-1)],
            [bytes("c"), refused("NOPERM")],
            [Value::Okay, Value::Okay],
        ];
        let mut reads = Reads::default();
        // One more than there are answers.
        let mut receivers: Vec<_> = (0..=answers.len()).map(|number| reads.add(number.to_string().as_bytes())).collect();
        assert_eq!(reads.commands().len(), 16);
        let first_refusal = reads.answer(answers.into_iter().flatten().collect()).unwrap_err();
        assert_eq!(first_refusal.code(), Some("WRONGTYPE"));
        let mut said = receivers.iter_mut().map(|receiver| match receiver.try_recv().unwrap() {
            Ok(Some(Kept { bytes, left })) => format!("{} {left:?}", String::from_utf8(bytes).unwrap()),
            Ok(None) => "nothing".to_owned(),
            Err(failure) => failure.classify().0.to_owned(),
        });
        for expected in ["a Some(1.5s)", "nothing", " Some(7ms)", "refused", "b None", "forbidden", "nothing", "nothing"] {
            assert_eq!(said.next().as_deref(), Some(expected));
        }
    }

    #[test]
    fn what_comes_together_has_time_by_what_it_may_bring() {
        let (mut reads, mut receivers, one) = (Reads::default(), Vec::new(), Duration::from_millis(25));
        assert_eq!(reads.deadline(one), one);
        receivers.push(reads.add(b"x"));
        assert_eq!(reads.deadline(one), one, "one alone waits for no other");
        while !reads.is_full() {
            receivers.push(reads.add(b"x"));
        }
        // Eight megabytes: what a gigabit a second carries in 70 milliseconds.
        assert!(reads.deadline(one) > one + Duration::from_millis(100) && reads.deadline(one) < one + Duration::from_millis(150));
    }

    #[test]
    fn a_failure_is_told_to_all_and_so_many_go_together_at_most() {
        let mut reads = Reads::default();
        let mut receivers = Vec::new();
        while !reads.is_full() {
            receivers.push(reads.add(b"x"));
        }
        assert_eq!(receivers.len(), MOST);
        // One has gone away meanwhile.
        drop(receivers.pop());
        reads.fail(&RedisFailure::Timeout);
        assert!(receivers.iter_mut().all(|receiver| matches!(receiver.try_recv(), Ok(Err(RedisFailure::Timeout)))));
    }
}
