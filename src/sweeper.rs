//! What time takes away: expired uploads, rows past their retention, and files that an end in the middle left.

use std::time::Duration;

use crate::ledger::Ledger;
use crate::runs::Runs;
use crate::uploads::Uploads;

/// Sweeps every `period`, for ever. What fails is logged, and tried again the next time.
pub async fn sweep(period: Duration, retention_days: u32, ledger: &Ledger, uploads: &Uploads, runs: &Runs) {
    loop {
        tokio::time::sleep(period).await;
        report("uploads", uploads.sweep(ledger).await);
        report("last uses of tokens", ledger.flush_used().await.map(|()| 0));
        report("old runs", ledger.forget_runs(retention_days).await);
        report("folders of runs", runs.sweep().await);
    }
}

fn report(what: &str, swept: Result<usize, impl std::error::Error>) {
    match swept {
        Ok(0) => {}
        Ok(count) => tracing::info!(what, count, "swept"),
        Err(error) => tracing::warn!(what, %error, "not swept"),
    }
}
