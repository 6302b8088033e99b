//! What time takes away of sessions.

use std::time::Duration;

use super::{Error, Limits, Sessions, Shared};
use crate::clock;
use crate::ledger::Session;

impl Sessions {
    /// Closes the sessions that are idle for too long, and deletes those that are closed for long enough. Gives how many
    /// of both there were.
    pub async fn sweep(&self) -> Result<usize, Error> {
        let Shared { limits: Limits { idle, closed, .. }, ledger, lanes, .. } = &*self.0;
        let before = |age: &Duration| clock::now() - clock::millis(*age) / 1000;
        let mut swept = 0;
        for session in ledger.idle_sessions(before(idle)).await? {
            let Some((place, turn)) = lanes.enter_idle(&session.new.session_id) else { continue };
            let closed = self.0.close_in_turn(&session, &place, turn, "sweep_close", Some(before(idle))).await?;
            swept += usize::from(closed);
        }
        for session in ledger.old_sessions(before(closed)).await? {
            // Not while its close is still going on.
            let Some(_idle) = lanes.enter_idle(&session.new.session_id) else { continue };
            // One that can't be deleted must not keep the others.
            match self.0.delete(&session).await {
                Ok(()) => swept += 1,
                Err(error) => tracing::warn!(session_id = session.new.session_id, %error, "the session was not deleted"),
            }
        }
        Ok(swept)
    }
}

impl Shared {
    /// Takes away all that there is of a closed session.
    async fn delete(&self, session: &Session) -> Result<(), Error> {
        let session_id = &session.new.session_id;
        self.executors.remove_session(&session.conversation()).await?;
        self.feeds.forget_session(session_id).await?;
        self.ledger.delete_session(session_id).await?;
        tracing::info!(session_id, "session deleted");
        Ok(())
    }
}
