//! Inflating a gzip body on its way to a client that does not take gzip.

use std::io::Write as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use http_body::{Body, Frame};

use crate::body::BoxError;
use crate::http::encoding::{ALWAYS, MAX_RATIO};
use crate::upstream::failure::{BrokenBody, Failure};

/// Inflates a gzip stream for a client that does not take gzip, in constant memory.
pub struct Inflate<B> {
    inner: B,
    decoder: Option<MultiGzDecoder<Vec<u8>>>,
    pending: Bytes,
    /// Coded bytes read, and plain bytes given out.
    read: u64,
    given: u64,
}

/// Coded bytes that are inflated at one time: with gzip's largest ratio of about 1,000 that stays under 5 MiB.
const SLICE: usize = 4096;

impl<B> Inflate<B> {
    /// Inflates `inner`. A body that inflates to more than [`MAX_RATIO`] times its size is a decompression bomb: the stream
    /// breaks off.
    pub fn new(inner: B) -> Self {
        Self { inner, decoder: Some(MultiGzDecoder::new(Vec::new())), pending: Bytes::new(), read: 0, given: 0 }
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
        loop {
            let Some(decoder) = &mut this.decoder else { return Poll::Ready(None) };
            let plain = if this.pending.is_empty() {
                match ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
                    Some(Ok(frame)) => {
                        this.pending = frame.into_data().unwrap_or_default();
                        continue;
                    }
                    Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                    None => {
                        let decoder = this.decoder.take();
                        decoder.map_or_else(|| Ok(Vec::new()), |decoder| decoder.finish())?
                    }
                }
            } else {
                let slice = this.pending.split_to(this.pending.len().min(SLICE));
                this.read += slice.len() as u64;
                decoder.write_all(&slice)?;
                std::mem::take(decoder.get_mut())
            };
            this.given += plain.len() as u64;
            if this.given > this.read.saturating_mul(MAX_RATIO).max(ALWAYS) {
                return Poll::Ready(Some(Err(Box::new(BrokenBody(Failure::Invalid)))));
            }
            if !plain.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(Bytes::from(plain)))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::full;
    use crate::http::encoding::gzip;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn inflating_gives_back_what_was_packed_and_stops_bombs() {
        let plain: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
        let whole = Inflate::new(full(gzip(&plain))).collect().await.unwrap().to_bytes();
        assert_eq!(whole, plain);
        assert!(Inflate::new(full(gzip(&vec![0; 5 << 20]))).collect().await.is_err());
        let cut = gzip(&plain);
        assert!(Inflate::new(full(cut.slice(..cut.len() - 9))).collect().await.is_err());
    }
}
