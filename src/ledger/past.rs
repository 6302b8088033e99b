//! Runs of a time that is past, for a demonstration.

use rusqlite::params;

use super::db::Ledger;
use super::error::Error;
use super::job::JobEnd;

/// A run that ended before.
#[derive(Clone, Debug)]
pub struct PastRun {
    /// 32 hex digits.
    pub run_id: String,
    /// The app.
    pub app_name: String,
    /// The model asked for.
    pub model: String,
    /// The prompt.
    pub prompt: String,
    /// Unix seconds.
    pub started_at: i64,
    /// How it ended.
    pub end: JobEnd,
}

impl Ledger {
    /// Writes runs as if they had been made when they say.
    pub async fn insert_past(&self, runs: Vec<PastRun>) -> Result<(), Error> {
        self.write(move |db| {
            let mut insert = db.prepare(
                "INSERT INTO runs (run_id, app_name, client_ip, model, prompt, queued_at, started_at, finished_at, duration_ms, ok,
                     stop_reason, error, result, first_text_ms, input_tokens, cached_tokens, output_tokens, cost_usd)
                 VALUES (?1, ?2, '127.0.0.1', ?3, ?4, ?5, ?5, ?5 + ?6 / 1000, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
            )?;
            for PastRun { run_id, app_name, model, prompt, started_at, end } in &runs {
                insert.execute(params![
                    run_id,
                    app_name,
                    model,
                    prompt,
                    started_at,
                    end.duration_ms,
                    end.ok,
                    end.stop_reason,
                    end.error,
                    end.result,
                    end.first_text_ms,
                    end.input_tokens,
                    end.cached_tokens,
                    end.output_tokens,
                    end.cost_usd,
                ])?;
            }
            Ok(())
        })
        .await
    }
}
