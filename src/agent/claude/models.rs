//! The models that the CLI says it has.

use std::sync::{Arc, PoisonError, RwLock};

use serde::Deserialize;

/// A model, as the CLI lists it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Model {
    /// The name by which it is asked for.
    pub value: String,
    /// The full name that stands for.
    pub resolved_model: Option<String>,
    /// What people call it.
    #[serde(default)]
    pub display_name: String,
}

/// What the CLI told last. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct KnownModels(Arc<RwLock<Vec<Model>>>);

impl KnownModels {
    /// Notes what the CLI told.
    pub fn tell(&self, models: Vec<Model>) {
        if *self.0.read().unwrap_or_else(PoisonError::into_inner) != models {
            *self.0.write().unwrap_or_else(PoisonError::into_inner) = models;
        }
    }

    /// All of them; none where nothing was told yet.
    pub fn all(&self) -> Vec<Model> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The full name behind a name, where the CLI told.
    pub fn resolved(&self, name: &str) -> Option<String> {
        self.all().into_iter().find(|model| model.value == name)?.resolved_model
    }
}
