//! What time takes away: expired uploads, rows past their retention, and files that an end in the middle left.

use std::time::Duration;

use crate::feed;
use crate::server::App;
use crate::uploads;

/// Sweeps every `period`, for ever. What fails is logged, and tried again the next time.
pub async fn sweep(period: Duration, retention_days: u32, app: &App) {
    loop {
        tokio::time::sleep(period).await;
        report("sessions", app.sessions.sweep().await);
        report("uploads", app.uploads.sweep(&app.ledger).await);
        report("last uses of tokens", app.ledger.flush_used().await.map(|()| 0));
        report("old runs", app.ledger.forget_runs(retention_days).await);
        report("old events of sessions", app.ledger.forget_session_events(retention_days).await);
        report("folders of runs", app.runs.sweep().await);
        report("feeds", app.feeds.sweep().await);
        report("feeds without a row", orphaned_feeds(app).await);
        report("idempotency keys", app.ledger.forget_keys(feed::KEPT.as_secs()).await);
    }
}

/// What a crash left of work that has no row, and what an earlier release left of deleted sessions.
async fn orphaned_feeds(app: &App) -> Result<usize, uploads::Error> {
    let orphans = app.ledger.without_row(app.feeds.settled().await?).await?;
    Ok(app.feeds.remove(orphans).await?)
}

fn report(what: &str, swept: Result<usize, impl std::error::Error>) {
    match swept {
        Ok(0) => {}
        Ok(count) => tracing::info!(what, count, "swept"),
        Err(error) => tracing::warn!(what, %error, "not swept"),
    }
}
