//! Which models there are, and what other names they go by.

use std::collections::BTreeMap;

use crate::agent::claude::run::Claude;

/// Names that the CLI has taken in every release, for where it can't be asked.
const ALIASES: [&str; 3] = ["sonnet", "opus", "haiku"];

/// The models.
pub struct Models {
    /// What apps that insist on names of their own get for them.
    map: BTreeMap<String, String>,
    claude: Claude,
}

/// A model that may be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offered {
    /// By this name.
    pub id: String,
    /// What people call it.
    pub name: String,
}

impl Models {
    /// Those that this CLI has, and these other names.
    pub fn new(map: BTreeMap<String, String>, claude: Claude) -> Self {
        Self { map, claude }
    }

    /// The model behind a name.
    pub fn mapped(&self, name: String) -> String {
        self.map.get(&name).cloned().unwrap_or(name)
    }

    /// All that have a name here. Asks the CLI where it has not told yet.
    pub async fn all(&self) -> Vec<Offered> {
        let mut all: Vec<Offered> = Vec::new();
        let mut offer = |id: &str, name: &str| {
            if all.iter().all(|offered| offered.id != id) {
                all.push(Offered { id: id.to_owned(), name: name.to_owned() });
            }
        };
        let told = self.claude.models().await;
        for model in told.iter().filter(|model| model.value != "default") {
            offer(&model.value, &model.display_name);
        }
        for alias in ALIASES {
            offer(alias, alias);
        }
        for model in told.iter().filter(|model| model.value != "default").chain(&told) {
            if let Some(full) = &model.resolved_model {
                offer(full, &model.display_name);
            }
        }
        for (name, model) in &self.map {
            offer(name, &format!("{name} ({model})"));
        }
        all
    }
}
