use super::*;
use std::pin::{Pin, pin};
use std::task::Poll;

impl Queue {
    async fn enter(&self, request: PermitRequest) -> Result<Permit, Refused> {
        self.join(request, Admission::Evictable)?.permit().await
    }
}

async fn is_pending(mut future: Pin<&mut impl Future>) -> bool {
    std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context).is_pending())).await
}

fn run(app: &str) -> PermitRequest {
    PermitRequest { app: app.to_owned(), most: None, run: true }
}

#[tokio::test]
async fn places_go_round_in_order_and_the_rest_is_refused() {
    let queue = Queue::new(1, 2);
    let first = queue.enter(run("a")).await.unwrap();
    let (mut second, mut third) = (pin!(queue.enter(run("a"))), pin!(queue.enter(run("a"))));
    assert!(is_pending(second.as_mut()).await);
    assert!(is_pending(third.as_mut()).await);
    assert_eq!(queue.enter(run("a")).await.unwrap_err(), Refused::Full);
    drop(first);
    assert!(is_pending(third.as_mut()).await, "the second comes before the third");
    drop(second.await.unwrap());
    drop(third.await.unwrap());
}

#[tokio::test]
async fn one_that_leaves_makes_room_and_closing_refuses_all() {
    let queue = Queue::new(1, 1);
    let _place = queue.enter(run("a")).await.unwrap();
    {
        let mut leaves = pin!(queue.enter(run("a")));
        assert!(is_pending(leaves.as_mut()).await);
    }
    let mut waits = pin!(queue.enter(run("a")));
    assert!(is_pending(waits.as_mut()).await);
    queue.close();
    assert_eq!(waits.await.unwrap_err(), Refused::Closed);
    assert_eq!(queue.enter(run("a")).await.unwrap_err(), Refused::Closed);
}

#[tokio::test]
async fn one_that_leaves_as_its_place_comes_gives_it_back() {
    let queue = Queue::new(1, 2);
    let place = queue.enter(run("a")).await.unwrap();
    let mut leaves = Box::pin(queue.enter(run("a")));
    assert!(is_pending(leaves.as_mut()).await);
    drop(place);
    drop(leaves);
    queue.enter(run("a")).await.unwrap();
}

#[tokio::test]
async fn a_busy_app_does_not_keep_another_waiting() {
    let queue = Queue::new(2, 4);
    let (first, second) = (queue.enter(run("busy")).await.unwrap(), queue.enter(run("busy")).await.unwrap());
    let mut waiting: Vec<_> = (0..4).map(|_| Box::pin(queue.enter(run("busy")))).collect();
    for waits in &mut waiting {
        assert!(is_pending(waits.as_mut()).await);
    }
    // The queue is full, and room is made.
    let mut single = pin!(queue.enter(run("single")));
    assert!(is_pending(single.as_mut()).await);
    assert_eq!(waiting.pop().unwrap().await.unwrap_err(), Refused::Full);
    drop(first);
    let single = single.await.unwrap();
    assert!(is_pending(waiting[0].as_mut()).await, "the one with fewer places comes first");
    drop((single, second));
    drop((waiting.remove(0).await.unwrap(), waiting.remove(0).await.unwrap()));
}

#[tokio::test]
async fn promised_work_that_waits_for_its_apps_own_limit_takes_nobodys_room() {
    let queue = Queue::new(3, 4);
    let limited = |app: &str| PermitRequest { app: app.to_owned(), most: Some(1), run: true };
    let mut promised = Vec::new();
    let (a, b) = (queue.enter(limited("a")).await.unwrap(), queue.enter(limited("b")).await.unwrap());
    for app in ["a", "b"] {
        for _ in 0..2 {
            promised.push(queue.join(limited(app), Admission::Guaranteed).unwrap());
        }
        assert_eq!(queue.join(limited(app), Admission::Guaranteed).unwrap_err(), Refused::Full, "half of the room for an app");
        promised.push(queue.join(limited(app), Admission::Readmitted).unwrap());
    }
    let other = queue.enter(run("c")).await.unwrap();
    let mut waiting: Vec<_> = (0..4).map(|_| Box::pin(queue.enter(run("c")))).collect();
    for waits in &mut waiting {
        assert!(is_pending(waits.as_mut()).await, "all of the room is there");
    }
    assert_eq!(queue.enter(run("c")).await.unwrap_err(), Refused::Full);
    assert_eq!(queue.enter(limited("a")).await.unwrap_err(), Refused::Full);
    drop((other, a, b));
}

#[tokio::test]
async fn whatever_was_promised_each_app_may_have_one_that_waits() {
    let queue = Queue::new(1, 2);
    let place = queue.enter(run("a")).await.unwrap();
    let promised = [queue.join(run("a"), Admission::Guaranteed).unwrap(), queue.join(run("b"), Admission::Guaranteed).unwrap()];
    let (mut waits, mut too_many) = (pin!(queue.enter(run("c"))), pin!(queue.enter(run("c"))));
    assert!(is_pending(waits.as_mut()).await);
    assert!(!is_pending(too_many.as_mut()).await);
    drop((place, promised));
    waits.await.unwrap();
}

#[tokio::test]
async fn what_will_join_counts_among_what_is_promised() {
    let queue = Queue::new(1, 4);
    let _place = queue.enter(run("a")).await.unwrap();
    let reserved = [queue.reserve("a").unwrap(), queue.reserve("a").unwrap()];
    assert_eq!(queue.reserve("a").unwrap_err(), Refused::Full);
    assert_eq!(queue.join(run("a"), Admission::Guaranteed).unwrap_err(), Refused::Full);
    let _other = queue.reserve("b").unwrap();
    let joined = queue.join(run("a"), Admission::Readmitted).unwrap();
    drop(reserved);
    let _second = queue.reserve("a").unwrap();
    assert_eq!(queue.reserve("a").unwrap_err(), Refused::Full);
    drop(joined);
}

#[test]
fn what_was_promised_a_place_is_never_turned_away() {
    let queue = Queue::new(1, 2);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let _place = runtime.block_on(queue.enter(run("a"))).unwrap();
    // Others come and go all the time, and make room for themselves.
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for app in ["b", "c", "d"] {
            let (queue, stop) = (&queue, &stop);
            scope.spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    drop(queue.join(run(app), Admission::Evictable));
                }
            });
        }
        let evicted = (0..20_000).find(|_| {
            let Ok(mut promised) = queue.join(run("a"), Admission::Guaranteed) else { return false };
            promised.answer.try_recv().is_ok()
        });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(evicted, None);
    });
}

#[tokio::test]
async fn an_app_has_at_most_what_it_may_of_runs_and_turns() {
    let queue = Queue::new(4, 4);
    let limited = |run: bool| PermitRequest { app: "a".to_owned(), most: Some(2), run };
    let (run, turn) = (queue.enter(limited(true)).await.unwrap(), queue.enter(limited(false)).await.unwrap());
    let mut third = pin!(queue.enter(limited(true)));
    assert!(is_pending(third.as_mut()).await);
    queue.enter(super::tests::run("b")).await.unwrap();
    drop(turn);
    drop((third.await.unwrap(), run));
}
