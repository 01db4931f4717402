//! Inflating a gzip body on its way to a client that does not take gzip.

use std::io::Read as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use flate2::read::MultiGzDecoder;
use flate2::{Decompress, FlushDecompress, Status};
use http_body::{Body, Frame, SizeHint};

use crate::body::{BoxError, Stream};
use crate::cache::entry::Taken;
use crate::http::encoding::{ALWAYS, MAX_RATIO};
use crate::upstream::failure::{BrokenBody, Failure};

/// Inflates a gzip stream for a client that does not take gzip, in constant memory. What a piece says is given out with that piece: the
/// upstream may have flushed it for a reader that waits. A body without a byte is empty.
pub struct Inflate<B> {
    inner: B,
    /// Made for each member (RFC 1952 §2.2); `None` between members, and before the first byte.
    decoder: Option<Decompress>,
    pending: Bytes,
    /// The last piece was full: there may be more of what is read already.
    is_full: bool,
    ended: bool,
    /// The most bytes that it may inflate to, if that is known.
    most: Option<u64>,
    /// How many bytes it inflates to, if that is known.
    length: Option<u64>,
    /// The coded bytes, until the second piece is asked for: the first is one byte, for which nothing is kept. Whoever takes no answers costs little.
    untouched: Option<Bytes>,
    /// Bytes that were given out already and come again.
    again: usize,
    /// Told when all was given out: the client has taken all but the last piece, at least.
    taken: Option<Taken>,
    /// Coded bytes read, and plain bytes given out.
    read: u64,
    given: u64,
}

/// Plain bytes that are given out at one time, at most.
const PIECE: usize = 64 << 10;
/// The largest window, as a power of two (RFC 1951 §2): what any gzip stream needs.
const WINDOW_BITS: u8 = 15;

impl<B> Inflate<B> {
    /// Inflates `inner`. A body that inflates to more than [`MAX_RATIO`] times its size is a decompression bomb: the stream
    /// breaks off.
    pub fn new(inner: B) -> Self {
        Self {
            inner,
            decoder: None,
            pending: Bytes::new(),
            is_full: false,
            ended: false,
            most: None,
            length: None,
            untouched: None,
            again: 0,
            taken: None,
            read: 0,
            given: 0,
        }
    }

    /// Inflates of what is pending as much as fits into a piece.
    fn inflate(&mut self) -> Result<Vec<u8>, BoxError> {
        let mut plain = Vec::with_capacity(PIECE.min(self.pending.len().saturating_mul(8).max(512)));
        while (!self.pending.is_empty() || self.is_full) && plain.len() < PIECE {
            if plain.len() == plain.capacity() {
                plain.reserve(PIECE - plain.len());
            }
            let decoder = self.decoder.get_or_insert_with(|| Decompress::new_gzip(WINDOW_BITS));
            let (read, given) = (decoder.total_in(), plain.len());
            let status = decoder.decompress_vec(&self.pending, &mut plain, FlushDecompress::Sync)?;
            let consumed = usize::try_from(decoder.total_in() - read).unwrap_or(usize::MAX).min(self.pending.len());
            self.pending.advance(consumed);
            self.read += consumed as u64;
            self.is_full = plain.len() == plain.capacity() && status != Status::StreamEnd;
            if status == Status::StreamEnd {
                self.decoder = None;
            } else if consumed == 0 && plain.len() == given && !self.pending.is_empty() {
                return Err(Box::new(BrokenBody(Failure::Invalid)));
            }
        }
        self.given += plain.len() as u64;
        if !plain.is_empty() {
            plain.drain(..std::mem::take(&mut self.again));
        }
        if self.length == Some(self.given)
            && let Some(taken) = self.taken.take()
        {
            taken.note();
        }
        if self.given > self.most.unwrap_or_else(|| self.read.saturating_mul(MAX_RATIO).max(ALWAYS)) {
            return Err(Box::new(BrokenBody(Failure::Invalid)));
        }
        Ok(plain)
    }
}

impl Inflate<Stream> {
    /// Inflates a stored body of `length` bytes, if that is known, and of `most` in any case. `taken` is told when all of it was given out.
    pub fn stored(coded: Bytes, length: Option<usize>, most: usize, taken: Taken) -> Self {
        let most = most.min(length.unwrap_or(most)) as u64;
        let length = length.map(|length| length as u64);
        Self { most: Some(most), length, untouched: Some(coded), taken: Some(taken), ..Self::new(crate::body::empty()) }
    }
}

/// The first byte of what gzip says.
fn first_byte(coded: &[u8]) -> Option<u8> {
    let mut first = [0];
    MultiGzDecoder::new(coded).read_exact(&mut first).ok().map(|()| first[0])
}

impl<B> Body for Inflate<B>
where
    B: Body<Data = Bytes, Error = BoxError> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if let Some(coded) = &this.untouched
            && this.again == 0
            && let Some(first) = first_byte(coded)
        {
            this.again = 1;
            return Poll::Ready(Some(Ok(Frame::data(Bytes::copy_from_slice(&[first])))));
        }
        if let Some(coded) = this.untouched.take() {
            this.pending = coded;
        }
        while !this.ended {
            if this.is_full || !this.pending.is_empty() {
                match this.inflate() {
                    Ok(plain) if plain.is_empty() => continue,
                    Ok(plain) => return Poll::Ready(Some(Ok(Frame::data(Bytes::from(plain))))),
                    Err(error) => {
                        this.ended = true;
                        return Poll::Ready(Some(Err(error)));
                    }
                }
            }
            match ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
                Some(Ok(frame)) => this.pending = frame.into_data().unwrap_or_default(),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => {
                    this.ended = true;
                    // Within a member: its rest is missing.
                    if this.decoder.is_some() {
                        return Poll::Ready(Some(Err(Box::new(BrokenBody(Failure::Truncated)))));
                    }
                    if this.length.is_some_and(|length| length != this.given) {
                        return Poll::Ready(Some(Err(Box::new(BrokenBody(Failure::Invalid)))));
                    }
                    if let Some(taken) = this.taken.take() {
                        taken.note();
                    }
                }
            }
        }
        Poll::Ready(None)
    }

    fn size_hint(&self) -> SizeHint {
        let given = self.given.max(self.again as u64);
        self.length.map_or_else(SizeHint::default, |length| SizeHint::with_exact(length.saturating_sub(given)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::full;
    use crate::http::encoding::gzip;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use http_body_util::BodyExt;
    use proptest::prelude::*;
    use std::io::Write as _;

    #[tokio::test]
    async fn inflating_gives_back_what_was_packed_and_stops_bombs() {
        let plain: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        let whole = Inflate::new(full(gzip(&plain))).collect().await.unwrap().to_bytes();
        assert_eq!(whole, plain);
        assert!(Inflate::new(full(gzip(&vec![0; 5 << 20]))).collect().await.is_err());
        let cut = gzip(&plain);
        assert!(Inflate::new(full(cut.slice(..cut.len() - 9))).collect().await.is_err());
        assert!(Inflate::new(full([&cut[..], b"no gzip"].concat().into())).collect().await.is_err());
        let members = [&cut[..], &gzip(b"and more")].concat();
        assert_eq!(Inflate::new(full(members.into())).collect().await.unwrap().to_bytes(), [&plain[..], b"and more"].concat());
        assert_eq!(Inflate::new(full(Bytes::new())).collect().await.unwrap().to_bytes(), "");
    }

    trait Now: Future + Sized {
        /// What is there at once.
        fn now_or_never(self) -> Option<Self::Output> {
            let mut cx = Context::from_waker(std::task::Waker::noop());
            match std::pin::pin!(self).poll(&mut cx) {
                Poll::Ready(output) => Some(output),
                Poll::Pending => None,
            }
        }
    }

    impl<F: Future> Now for F {}

    /// Pieces, each of which is there once the one before was read.
    struct Pieces(std::collections::VecDeque<Bytes>, bool);

    impl Body for Pieces {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            match self.0.pop_front() {
                Some(piece) => Poll::Ready(Some(Ok(Frame::data(piece)))),
                None if self.1 => Poll::Ready(None),
                None => Poll::Pending,
            }
        }
    }

    #[tokio::test]
    async fn a_stored_body_that_nobody_takes_costs_a_byte_and_one_that_is_taken_is_noted() {
        let plain: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        for length in [Some(plain.len()), None] {
            let taken = Taken::default();
            let mut body = Inflate::stored(gzip(&plain), length, 1 << 20, taken.clone());
            let hinted = |body: &Inflate<Stream>, given: usize| {
                assert_eq!(body.size_hint().exact(), length.map(|length| (length - given) as u64));
            };
            hinted(&body, 0);
            let mut noted = false;
            let mut came = body.frame().await.unwrap().unwrap().into_data().unwrap().to_vec();
            assert!(came.len() == 1 && body.decoder.is_none() && body.pending.is_empty());
            while let Some(frame) = body.frame().await {
                hinted(&body, came.len() + frame.as_ref().unwrap().data_ref().unwrap().len());
                noted |= taken.take();
                came.extend_from_slice(&frame.unwrap().into_data().unwrap());
            }
            assert!(came == plain && (noted || taken.take()));
        }
        // One that says another length than it has, and one that is damaged.
        for (coded, length) in [(gzip(&plain), 399_999), (gzip(&plain), 400_001), (gzip(&plain).slice(..1000), 400_000), (Bytes::new(), 9)]
        {
            let taken = Taken::default();
            assert!(Inflate::stored(coded, Some(length), 1 << 20, taken.clone()).collect().await.is_err(), "{length}");
            assert!(!taken.take() || length == 400_000);
        }
    }

    proptest! {
        #[test]
        fn any_pieces_give_the_same(plain: Vec<u8>, times in 1_usize..40, size in 1_usize..5000) {
            let plain = plain.repeat(times);
            let pieces = gzip(&plain).chunks(size).map(Bytes::copy_from_slice).collect();
            let whole = Inflate::new(Pieces(pieces, true)).collect().now_or_never().unwrap().unwrap().to_bytes();
            prop_assert_eq!(whole, plain);
        }

        #[test]
        fn what_is_flushed_is_given_out_with_its_piece(events: Vec<Vec<u8>>) {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            let mut body = Inflate::new(Pieces(std::collections::VecDeque::new(), false));
            for event in events.iter().filter(|event| !event.is_empty()) {
                encoder.write_all(event).unwrap();
                encoder.flush().unwrap();
                body.inner.0.push_back(std::mem::take(encoder.get_mut()).into());
                let mut came = Vec::new();
                while let Some(frame) = body.frame().now_or_never() {
                    came.extend_from_slice(&frame.unwrap().unwrap().into_data().unwrap());
                }
                prop_assert_eq!(&came, event);
            }
        }
    }
}
