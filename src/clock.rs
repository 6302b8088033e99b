//! The wall clock, as the wire and the ledger write it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Unix time in whole seconds.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Unix time in whole milliseconds.
pub fn now_ms() -> i64 {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// A duration in whole milliseconds.
pub fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// The last midnight in UTC, as Unix time.
pub fn midnight() -> i64 {
    now().div_euclid(DAY) * DAY
}

/// Seconds until the next midnight in UTC; at least one.
pub fn until_midnight() -> i64 {
    midnight() + DAY - now()
}

/// Seconds of a day.
pub const DAY: i64 = 86_400;
