//! Single values, read into types that can't be wrong.

use std::str::FromStr;

use crate::network::Networks;

/// A setting that can't be right: one sentence that names it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable} {why}.")]
pub struct BadSetting {
    variable: &'static str,
    why: String,
}

impl BadSetting {
    pub(super) fn new(variable: &'static str, why: impl Into<String>) -> Self {
        Self { variable, why: why.into() }
    }
}

/// Compose files pass unset variables on as empty ones.
pub(super) fn given(value: Option<&str>) -> Option<&str> {
    value.map(str::trim).filter(|text| !text.is_empty())
}

pub(super) fn text(value: Option<String>, default: &str) -> String {
    given(value.as_deref()).unwrap_or(default).to_owned()
}

pub(super) fn networks(variable: &'static str, list: &str) -> Result<Networks, BadSetting> {
    list.parse().map_err(|error| BadSetting::new(variable, format!("is wrong: {error}")))
}

pub(super) fn number<T>(
    variable: &'static str,
    value: Option<String>,
    default: T,
    range: std::ops::RangeInclusive<T>,
) -> Result<T, BadSetting>
where
    T: FromStr + PartialOrd + std::fmt::Display,
{
    let Some(text) = given(value.as_deref()) else { return Ok(default) };
    text.parse().ok().filter(|number| range.contains(number)).ok_or_else(|| {
        BadSetting::new(variable, format!("is \"{text}\", which is not a whole number from {} to {}", range.start(), range.end()))
    })
}

/// A bound in MiB; none where it is not given, or 0.
pub(super) fn bound(variable: &'static str, value: Option<String>) -> Result<Option<u64>, BadSetting> {
    Ok(Some(number(variable, value, 0, 0..=1 << 20)?).filter(|mib| *mib > 0))
}
