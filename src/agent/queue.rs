//! Places for runs: so many at once, so many that wait, in the order that they came.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The queue. Waiting ends when the future of [`Queue::enter`] is dropped.
#[derive(Debug)]
pub struct Queue {
    places: Arc<Semaphore>,
    waiting: AtomicUsize,
    most_waiting: usize,
}

/// A run's place, held until it is dropped.
pub type Place = OwnedSemaphorePermit;

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// All places are taken, and as many wait as may.
    Full,
    /// The server is stopping.
    Closed,
}

impl Queue {
    /// A queue with `places` at once and `most_waiting` that wait.
    pub fn new(places: usize, most_waiting: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(places)), waiting: AtomicUsize::new(0), most_waiting }
    }

    /// Waits for a place.
    pub async fn enter(&self) -> Result<Place, Refused> {
        use tokio::sync::TryAcquireError;
        match self.places.clone().try_acquire_owned() {
            Ok(place) => return Ok(place),
            Err(TryAcquireError::Closed) => return Err(Refused::Closed),
            Err(TryAcquireError::NoPermits) => {}
        }
        let _waiting = Waiting::join(&self.waiting, self.most_waiting).ok_or(Refused::Full)?;
        // The semaphore serves those who wait in the order that they came.
        self.places.clone().acquire_owned().await.map_err(|_| Refused::Closed)
    }

    /// Refuses whoever waits, and whoever comes.
    pub fn close(&self) {
        self.places.close();
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn join(count: &'a AtomicUsize, most: usize) -> Option<Self> {
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| (now < most).then_some(now + 1)).ok().map(|_| Self(count))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::Poll;

    async fn is_pending(future: std::pin::Pin<&mut impl Future>) -> bool {
        let mut future = future;
        std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context).is_pending())).await
    }

    #[tokio::test]
    async fn places_go_round_in_order_and_the_rest_is_refused() {
        let queue = Queue::new(1, 2);
        let first = queue.enter().await.unwrap();
        let (mut second, mut third) = (pin!(queue.enter()), pin!(queue.enter()));
        assert!(is_pending(second.as_mut()).await);
        assert!(is_pending(third.as_mut()).await);
        assert_eq!(queue.enter().await.unwrap_err(), Refused::Full);
        drop(first);
        assert!(is_pending(third.as_mut()).await, "the second comes before the third");
        drop(second.await.unwrap());
        drop(third.await.unwrap());
    }

    #[tokio::test]
    async fn one_that_leaves_makes_room_and_closing_refuses_all() {
        let queue = Queue::new(1, 1);
        let _place = queue.enter().await.unwrap();
        {
            let mut leaves = pin!(queue.enter());
            assert!(is_pending(leaves.as_mut()).await);
        }
        let mut waits = pin!(queue.enter());
        assert!(is_pending(waits.as_mut()).await);
        queue.close();
        assert_eq!(waits.await.unwrap_err(), Refused::Closed);
        assert_eq!(queue.enter().await.unwrap_err(), Refused::Closed);
    }
}
