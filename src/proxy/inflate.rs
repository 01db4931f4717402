//! Inflating a gzip body on its way to a client that does not take gzip.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use flate2::{Decompress, FlushDecompress, Status};
use http_body::{Body, Frame};

use crate::body::BoxError;
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
        Self { inner, decoder: None, pending: Bytes::new(), is_full: false, ended: false, most: None, read: 0, given: 0 }
    }

    /// The same for a body that may inflate to at most `most` bytes, whatever its size.
    pub fn to_at_most(inner: B, most: usize) -> Self {
        Self { most: Some(most as u64), ..Self::new(inner) }
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
        if self.given > self.most.unwrap_or_else(|| self.read.saturating_mul(MAX_RATIO).max(ALWAYS)) {
            return Err(Box::new(BrokenBody(Failure::Invalid)));
        }
        Ok(plain)
    }
}

impl<B> Body for Inflate<B>
where
    B: Body<Data = Bytes, Error = BoxError> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
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
                }
            }
        }
        Poll::Ready(None)
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
