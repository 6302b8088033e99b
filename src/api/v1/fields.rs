//! Parameters that are not handed on, and such as may have two forms.

use serde::de::{DeserializeOwned, Error, IgnoredAny};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use utoipa::openapi::schema::SchemaType;
use utoipa::openapi::{ObjectBuilder, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::api::error::FieldError;

/// A parameter that can't be had: anything but nothing is refused.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Unavailable;

impl<'de> Deserialize<'de> for Unavailable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Option::<IgnoredAny>::deserialize(deserializer)? {
            None => Ok(Self),
            Some(_) => Err(D::Error::custom("this parameter can't be had here; leave it out")),
        }
    }
}

/// A parameter that applications send by themselves, and that has no effect. Whether it was sent.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NoEffect(bool);

impl PartialSchema for NoEffect {
    fn schema() -> RefOr<Schema> {
        let any = ObjectBuilder::new().schema_type(SchemaType::AnyValue);
        any.description(Some("Taken, because applications send it by themselves, and without effect.")).into()
    }
}

impl ToSchema for NoEffect {}

impl<'de> Deserialize<'de> for NoEffect {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(Option::<IgnoredAny>::deserialize(deserializer)?.is_some()))
    }
}

/// A text, or something else that says more. By hand: what is kept to the letter can't be read by trying one after the other.
#[derive(Debug)]
pub(super) enum TextOr<T> {
    Text(String),
    Other(T),
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for TextOr<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        if raw.get().starts_with('"') {
            return serde_json::from_str(raw.get()).map(Self::Text).map_err(D::Error::custom);
        }
        serde_json::from_str(raw.get())
            .map(Self::Other)
            .map_err(|error| D::Error::custom(format!("it is neither text nor what else it may be ({error})")))
    }
}

/// The names of those that were sent.
pub(super) fn without_effect(parameters: &[(&'static str, NoEffect)]) -> Vec<&'static str> {
    parameters.iter().filter(|(_, sent)| sent.0).map(|(name, _)| *name).collect()
}

/// Says that a parameter may only have the value that it has by itself.
pub(super) fn only<T: PartialEq>(pointer: &str, value: Option<&T>, only: &T, what: &str, errors: &mut Vec<FieldError>) {
    if value.is_some_and(|value| value != only) {
        errors.push(FieldError::new(pointer, format!("only {what} can be had here; leave it out")));
    }
}

/// Says that a count must be at least one. Gives it.
pub(super) fn at_least_one(pointer: &str, count: Option<i64>, errors: &mut Vec<FieldError>) {
    if count.is_some_and(|count| count < 1) {
        errors.push(FieldError::new(pointer, "it must be at least 1"));
    }
}
