//! The environment that agents get.

use std::ffi::{OsStr, OsString};

/// The environment that agents get.
#[derive(Clone, Debug)]
pub struct Environment(Vec<(OsString, OsString)>);

impl Environment {
    /// The server's own environment, less everything named `CLAWDFORGE_…`.
    pub fn inherited() -> Self {
        Self(std::env::vars_os().filter(|(name, _)| !name.as_encoded_bytes().starts_with(b"CLAWDFORGE_")).collect())
    }

    /// These variables and no others.
    pub fn of<N: Into<OsString>, V: Into<OsString>>(variables: impl IntoIterator<Item = (N, V)>) -> Self {
        Self(variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }

    /// Whether a variable is set to something.
    pub fn has(&self, name: &str) -> bool {
        self.get(name).is_some_and(|value| !value.is_empty())
    }

    /// The value of a variable.
    pub fn get(&self, name: &str) -> Option<&OsStr> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_os_str())
    }

    /// Takes a variable out; gives its value.
    pub fn take(&mut self, name: &str) -> Option<OsString> {
        let at = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.remove(at).1)
    }

    /// Gives a variable a value.
    pub fn set(&mut self, name: &str, value: impl Into<OsString>) {
        self.take(name);
        self.0.push((name.into(), value.into()));
    }

    /// Every variable with its value.
    pub fn iter(&self) -> impl Iterator<Item = (&OsStr, &OsStr)> {
        self.0.iter().map(|(name, value)| (name.as_os_str(), value.as_os_str()))
    }
}
