//! When tokens were last used, on the way to the table `tokens`: by itself a note of that is worth no write.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, params};

use crate::clock;

/// By the token's name, in Unix seconds. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Used(Arc<Mutex<HashMap<String, i64>>>);

impl Used {
    fn get(&self) -> MutexGuard<'_, HashMap<String, i64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a token was used now.
    pub(super) fn touch(&self, name: &str) {
        self.get().insert(name.to_owned(), clock::now());
    }

    pub(super) fn is_empty(&self) -> bool {
        self.get().is_empty()
    }

    /// Takes the notes, to be written.
    pub(super) fn take(&self) -> HashMap<String, i64> {
        std::mem::take(&mut *self.get())
    }

    /// Takes back what was not written, unless it was used again since.
    pub(super) fn give_back(&self, notes: HashMap<String, i64>) {
        let mut later = self.get();
        for (name, at) in notes {
            later.entry(name).or_insert(at);
        }
    }
}

/// Writes notes.
pub(super) fn write(db: &Connection, notes: &HashMap<String, i64>) -> rusqlite::Result<()> {
    let mut statement = db.prepare_cached("UPDATE tokens SET last_used = ?2 WHERE name = ?1")?;
    notes.iter().try_for_each(|(name, at)| statement.execute(params![name, at]).map(drop))
}
