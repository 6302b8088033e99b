//! How a reply is sent: at once, at a pace, or broken off.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use hyper::body::Frame;

/// Bytes of a reply in one event.
pub(super) const PIECE: usize = 4096;
/// The same where the reply comes at a pace.
pub(super) const PACED_PIECE: usize = 16;

/// Sends events, `pace` apart.
pub(super) fn stream(events: Vec<String>, pace: Duration, cut: bool) -> Response {
    if pace.is_zero() {
        return whole("text/event-stream", events.concat(), cut);
    }
    let half = if cut { events.len() / 2 } else { events.len() };
    let broken = cut.then(|| Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)));
    let paced = futures_util::stream::iter(events.into_iter().take(half).map(Ok).chain(broken)).then(move |event| async move {
        tokio::time::sleep(pace).await;
        event
    });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(paced)).into_response()
}

/// Sends a text, or half of it where it is to be cut.
pub(super) fn whole(content_type: &'static str, text: String, cut: bool) -> Response {
    let body = if cut {
        let half = text.len() / 2;
        Body::new(CutShort(Some(Bytes::from(text).slice(..half))))
    } else {
        Body::from(text)
    };
    ([(header::CONTENT_TYPE, content_type)], body).into_response()
}

/// A text in pieces of `size` bytes.
pub(super) fn pieces(mut text: &str, size: usize) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let (piece, rest) = text.split_at(text.floor_char_boundary(size.min(text.len())));
        text = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Some bytes, and then a broken connection.
struct CutShort(Option<Bytes>);

impl HttpBody for CutShort {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(Some(self.0.take().map(Frame::data).ok_or_else(|| std::io::ErrorKind::ConnectionReset.into())))
    }
}
