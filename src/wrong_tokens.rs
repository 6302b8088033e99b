//! Wrong bearer tokens: an address from which many came waits for each answer, so that guessing gets it nowhere. Right tokens never wait.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// So many in a minute are answered at once.
const AT_ONCE: u32 = 10;
const WINDOW: Duration = Duration::from_mins(1);
/// The others wait for each other, this long each.
const EACH: Duration = Duration::from_secs(1);
/// What one waits at most: its connection is held meanwhile.
const LONGEST: Duration = Duration::from_secs(10);
/// Addresses of which it is known how many came.
const MOST: usize = 10_000;

/// Who sent wrong tokens lately.
#[derive(Debug, Default)]
pub struct WrongTokens(Mutex<HashMap<IpAddr, Tries>>);

#[derive(Debug)]
struct Tries {
    began: Instant,
    count: u32,
    /// When the last of them is answered.
    last: Instant,
}

impl WrongTokens {
    /// Notes a wrong token from an address, and waits where there were many.
    pub async fn note(&self, address: IpAddr) {
        if let Some(until) = self.until(network(address)) {
            sleep_until(until).await;
        }
    }

    fn until(&self, address: IpAddr) -> Option<Instant> {
        let now = Instant::now();
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST {
            known.retain(|_, tries| now - tries.began < WINDOW);
        }
        if known.len() >= MOST && !known.contains_key(&address) {
            return Some(now + EACH);
        }
        let fresh = || Tries { began: now, count: 0, last: now };
        let tries = known.entry(address).or_insert_with(fresh);
        if now - tries.began >= WINDOW && tries.last <= now {
            *tries = fresh();
        }
        tries.count = tries.count.saturating_add(1);
        if tries.count <= AT_ONCE {
            return None;
        }
        if tries.count == AT_ONCE + 1 {
            tracing::warn!(%address, "more than ten wrong tokens in a minute: this address waits for the answers to further ones");
        }
        tries.last = (tries.last.max(now) + EACH).min(now + LONGEST);
        Some(tries.last)
    }
}

/// What stands for an address: one machine may have all those of an IPv6 network.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(six) => Ipv6Addr::from_bits(six.to_bits() & (u128::MAX << 64)).into(),
        four @ IpAddr::V4(_) => four,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_eleventh_in_a_minute_waits_and_later_ones_longer() {
        let wrong = WrongTokens::default();
        let address = "192.168.1.2".parse().unwrap();
        let took = async |address| {
            let begun = Instant::now();
            wrong.note(address).await;
            begun.elapsed()
        };
        for _ in 0..AT_ONCE {
            assert_eq!(took(address).await, Duration::ZERO);
        }
        assert!(took(address).await >= EACH);
        let (first, second) = tokio::join!(took(address), took(address));
        assert!(second >= first + EACH, "{first:?} {second:?}");
        assert_eq!(took("192.168.1.3".parse().unwrap()).await, Duration::ZERO);
        tokio::time::sleep(WINDOW).await;
        assert_eq!(took(address).await, Duration::ZERO);
    }

    #[test]
    fn a_machine_is_one_whatever_it_calls_itself_in_its_network() {
        let known = |address: &str| network(address.parse().unwrap());
        assert_eq!(known("2001:db8::1"), known("2001:db8::ffff:1"));
        assert_ne!(known("2001:db8::1"), known("2001:db8:0:1::1"));
        assert_eq!(known("::ffff:10.0.0.1"), known("10.0.0.1"));
    }
}
