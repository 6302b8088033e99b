//! What a start does about sessions that an earlier end left.

use super::{Error, Sessions};

impl Sessions {
    /// Takes back sessions that were being created, and brings the others' folders up to date. `interrupted` says whether turns
    /// were cut short.
    pub async fn recover(&self, interrupted: bool) -> Result<(), Error> {
        for session in self.0.ledger.half_created_sessions().await? {
            self.0.forget(&session).await;
        }
        self.0.executors.here().recover_sessions(interrupted).await;
        self.0.count_open().await;
        Ok(())
    }
}
