//! The tables, as they came to be.

use rusqlite::{Connection, TransactionBehavior};

use super::error::Error;

/// Append only: each entry takes a database from the version that is its index to the next.
pub(super) const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE tokens (
        name TEXT PRIMARY KEY,
        token_sha256 TEXT NOT NULL UNIQUE,
        ip_cidrs TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        last_used INTEGER,
        enabled INTEGER NOT NULL DEFAULT 1
    ) STRICT;
    CREATE TABLE files (
        file_token TEXT PRIMARY KEY,
        app_name TEXT NOT NULL,
        name TEXT NOT NULL,
        size INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX files_expires_at ON files (expires_at);
    CREATE TABLE runs (
        run_id TEXT PRIMARY KEY,
        app_name TEXT NOT NULL,
        client_ip TEXT NOT NULL,
        model TEXT NOT NULL,
        prompt TEXT NOT NULL,
        started_at INTEGER NOT NULL,
        finished_at INTEGER,
        duration_ms INTEGER,
        ok INTEGER,
        stop_reason TEXT,
        error TEXT,
        result TEXT,
        input_tokens INTEGER,
        output_tokens INTEGER,
        cost_usd REAL
    ) STRICT;
    CREATE INDEX runs_started_at ON runs (started_at);
    CREATE INDEX runs_open ON runs (run_id) WHERE finished_at IS NULL;
",
    "
    CREATE TABLE sessions (
        session_id TEXT PRIMARY KEY,
        app_name TEXT NOT NULL,
        agent TEXT NOT NULL,
        model TEXT,
        permissions TEXT NOT NULL,
        meta TEXT,
        cwd TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        last_turn_at INTEGER,
        turn_count INTEGER NOT NULL DEFAULT 0,
        closed_at INTEGER,
        acpx_record_id TEXT,
        acp_session_id TEXT
    ) STRICT;
    CREATE INDEX sessions_app ON sessions (app_name, created_at);
    CREATE TABLE session_events (
        id INTEGER PRIMARY KEY,
        session_id TEXT NOT NULL,
        app_name TEXT NOT NULL,
        event TEXT NOT NULL,
        started_at INTEGER NOT NULL,
        finished_at INTEGER,
        model TEXT,
        client_ip TEXT,
        prompt TEXT,
        duration_ms INTEGER,
        ok INTEGER,
        stop_reason TEXT,
        error TEXT,
        result TEXT,
        input_tokens INTEGER,
        output_tokens INTEGER
    ) STRICT;
    CREATE INDEX session_events_session ON session_events (session_id);
    CREATE INDEX session_events_started_at ON session_events (started_at);
",
    "
    ALTER TABLE tokens ADD COLUMN max_concurrent INTEGER;
    ALTER TABLE tokens ADD COLUMN daily_usd REAL;
    ALTER TABLE sessions ADD COLUMN agent_cost_usd REAL;
    ALTER TABLE session_events ADD COLUMN cost_usd REAL;
    CREATE INDEX runs_app ON runs (app_name, started_at, model, finished_at, input_tokens, output_tokens, cost_usd);
    CREATE INDEX session_events_app ON session_events (app_name, started_at, model, event, finished_at, input_tokens, output_tokens, cost_usd);
",
    // `request` is what else a queued run or turn needs, to start after a restart.
    "
    ALTER TABLE runs ADD COLUMN queued_at INTEGER;
    ALTER TABLE runs ADD COLUMN queued INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN request TEXT;
    ALTER TABLE runs ADD COLUMN status TEXT AS (CASE
        WHEN finished_at IS NULL THEN iif(queued, 'queued', 'running')
        WHEN ok THEN 'succeeded'
        WHEN stop_reason = 'timeout' THEN 'timed_out'
        WHEN stop_reason IN ('cancelled', 'interrupted') THEN stop_reason
        ELSE 'failed' END) VIRTUAL;
    CREATE TABLE idempotency (
        app_name TEXT NOT NULL,
        key TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        id TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        PRIMARY KEY (app_name, key)
    ) STRICT;
    CREATE INDEX idempotency_created_at ON idempotency (created_at);
    ALTER TABLE session_events ADD COLUMN turn INTEGER;
    ALTER TABLE session_events ADD COLUMN queued_at INTEGER;
    ALTER TABLE session_events ADD COLUMN queued INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE session_events ADD COLUMN request TEXT;
    ALTER TABLE session_events ADD COLUMN status TEXT AS (CASE
        WHEN finished_at IS NULL THEN iif(queued, 'queued', 'running')
        WHEN ok THEN 'succeeded'
        WHEN stop_reason = 'timeout' THEN 'timed_out'
        WHEN stop_reason IN ('cancelled', 'interrupted') THEN stop_reason
        ELSE 'failed' END) VIRTUAL;
    UPDATE session_events SET turn = (SELECT count(*) FROM session_events AS before
        WHERE before.session_id = session_events.session_id AND before.event = 'turn' AND before.id <= session_events.id)
    WHERE event = 'turn';
    CREATE UNIQUE INDEX session_events_turn ON session_events (session_id, turn) WHERE turn IS NOT NULL;
",
    // Of the files that were attached to its turns.
    "ALTER TABLE sessions ADD COLUMN attached_bytes INTEGER NOT NULL DEFAULT 0;",
    // What was asked for by responses that are kept; what came of them is in their runs' feeds.
    "
    CREATE TABLE responses (
        run_id TEXT PRIMARY KEY,
        app_name TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        used_at INTEGER NOT NULL,
        previous TEXT,
        request TEXT NOT NULL,
        input TEXT NOT NULL
    ) STRICT;
    CREATE INDEX responses_used_at ON responses (used_at);
",
    // What speaks to its agent: acpx, or direct.
    "ALTER TABLE sessions ADD COLUMN driver TEXT NOT NULL DEFAULT 'acpx';",
    // What is added to its agent's system prompt.
    "ALTER TABLE sessions ADD COLUMN system TEXT;",
    // What its agent asks before it acts, and who answers; of runs too, whose id is the `session_id` then.
    "
    ALTER TABLE sessions ADD COLUMN permission_timeout_secs INTEGER;
    ALTER TABLE sessions ADD COLUMN allow_always INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE session_events ADD COLUMN permission_id TEXT;
    ALTER TABLE session_events ADD COLUMN option_id TEXT;
    ALTER TABLE session_events ADD COLUMN answered_by TEXT;
    CREATE UNIQUE INDEX session_events_permission ON session_events (permission_id) WHERE permission_id IS NOT NULL;
",
    // Who made a run or took a turn; a run's model is empty where none was named.
    "
    ALTER TABLE runs ADD COLUMN agent TEXT NOT NULL DEFAULT 'claude';
    ALTER TABLE session_events ADD COLUMN agent TEXT;
",
    // What binds an app's agents: open, web or model; fresh or kept.
    "
    ALTER TABLE tokens ADD COLUMN network TEXT NOT NULL DEFAULT 'open';
    ALTER TABLE tokens ADD COLUMN home TEXT NOT NULL DEFAULT 'fresh';
",
    // The token that one replaced, and until when it is good, too; the names of attached files, as JSON; how long the
    // first piece of a reply took, and what of its input was cached.
    "
    ALTER TABLE tokens ADD COLUMN old_sha256 TEXT;
    ALTER TABLE tokens ADD COLUMN old_until INTEGER;
    CREATE INDEX session_events_open ON session_events (id) WHERE finished_at IS NULL;
    CREATE INDEX tokens_old ON tokens (old_sha256) WHERE old_sha256 IS NOT NULL;
    ALTER TABLE runs ADD COLUMN files TEXT;
    ALTER TABLE session_events ADD COLUMN files TEXT;
    ALTER TABLE runs ADD COLUMN first_text_ms INTEGER;
    ALTER TABLE runs ADD COLUMN cached_tokens INTEGER;
    ALTER TABLE session_events ADD COLUMN first_text_ms INTEGER;
    ALTER TABLE session_events ADD COLUMN cached_tokens INTEGER;
",
    // Who is told of ends. Triggers write what is to be told, so that none is forgotten, however a job ends.
    "
    ALTER TABLE tokens ADD COLUMN webhook TEXT;
    ALTER TABLE tokens ADD COLUMN webhook_secret TEXT;
    ALTER TABLE tokens ADD COLUMN old_webhook_secret TEXT;
    ALTER TABLE tokens ADD COLUMN old_webhook_secret_until INTEGER;
    ALTER TABLE runs ADD COLUMN webhook TEXT;
    ALTER TABLE session_events ADD COLUMN webhook TEXT;
    CREATE TABLE deliveries (
        delivery_id TEXT PRIMARY KEY,
        app_name TEXT NOT NULL,
        event TEXT NOT NULL,
        subject TEXT,
        url TEXT NOT NULL,
        origin TEXT AS (substr(url || '/', 1, 8 + instr(substr(url || '/', 9), '/'))) VIRTUAL,
        created_at INTEGER NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        next_at INTEGER,
        delivered_at INTEGER,
        http_status INTEGER,
        error TEXT
    ) STRICT;
    CREATE INDEX deliveries_next ON deliveries (next_at) WHERE next_at IS NOT NULL;
    CREATE INDEX deliveries_app ON deliveries (app_name, event, created_at);
    CREATE TRIGGER runs_finished AFTER UPDATE OF finished_at ON runs
    WHEN OLD.finished_at IS NULL AND NEW.finished_at IS NOT NULL AND NEW.webhook IS NOT NULL
    BEGIN
        INSERT INTO deliveries (delivery_id, app_name, event, subject, url, created_at, next_at)
        VALUES ('msg_' || lower(hex(randomblob(16))), NEW.app_name, 'run.finished', NEW.run_id, NEW.webhook, NEW.finished_at, NEW.finished_at);
    END;
    CREATE TRIGGER turns_finished AFTER UPDATE OF finished_at ON session_events
    WHEN OLD.finished_at IS NULL AND NEW.finished_at IS NOT NULL AND NEW.webhook IS NOT NULL
    BEGIN
        INSERT INTO deliveries (delivery_id, app_name, event, subject, url, created_at, next_at)
        VALUES ('msg_' || lower(hex(randomblob(16))), NEW.app_name, 'turn.finished', NEW.session_id || '-' || NEW.turn, NEW.webhook,
            NEW.finished_at, NEW.finished_at);
    END;
    CREATE TRIGGER sessions_closed AFTER UPDATE OF closed_at ON sessions WHEN OLD.closed_at IS NULL AND NEW.closed_at IS NOT NULL
    BEGIN
        INSERT INTO deliveries (delivery_id, app_name, event, subject, url, created_at, next_at)
        SELECT 'msg_' || lower(hex(randomblob(16))), name, 'session.closed', NEW.session_id, webhook, NEW.closed_at, NEW.closed_at
        FROM tokens WHERE name = NEW.app_name AND enabled AND webhook IS NOT NULL;
    END;
",
    // Many runs at once. `batch_seq` counts those of a batch that have ended.
    "
    ALTER TABLE runs ADD COLUMN batch_id TEXT;
    ALTER TABLE runs ADD COLUMN custom_id TEXT;
    ALTER TABLE runs ADD COLUMN batch_seq INTEGER;
    CREATE INDEX runs_batch ON runs (batch_id, batch_seq) WHERE batch_id IS NOT NULL;
    CREATE INDEX runs_batch_waiting ON runs (app_name, batch_id, run_id) WHERE queued AND finished_at IS NULL AND batch_id IS NOT NULL;
    CREATE TABLE batches (
        batch_id TEXT PRIMARY KEY,
        app_name TEXT NOT NULL,
        webhook TEXT,
        created_at INTEGER NOT NULL,
        total INTEGER NOT NULL,
        done INTEGER NOT NULL DEFAULT 0,
        cancelled_at INTEGER,
        finished_at INTEGER
    ) STRICT;
    CREATE INDEX batches_app ON batches (app_name, batch_id);
    CREATE TABLE batch_lines (
        batch_id TEXT NOT NULL,
        line INTEGER NOT NULL,
        run_id TEXT NOT NULL,
        custom_id TEXT,
        agent TEXT,
        model TEXT,
        prompt TEXT NOT NULL,
        files TEXT,
        request TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        PRIMARY KEY (batch_id, line),
        UNIQUE (batch_id, custom_id)
    ) STRICT;
    CREATE TRIGGER batch_runs_finished AFTER UPDATE OF finished_at ON runs
    WHEN OLD.finished_at IS NULL AND NEW.finished_at IS NOT NULL AND NEW.batch_id IS NOT NULL
    BEGIN
        UPDATE runs SET batch_seq = 1 + (SELECT done FROM batches WHERE batch_id = NEW.batch_id) WHERE run_id = NEW.run_id;
        UPDATE batches SET done = done + 1, finished_at = iif(done + 1 = total, NEW.finished_at, NULL) WHERE batch_id = NEW.batch_id;
    END;
    CREATE TRIGGER batches_finished AFTER UPDATE OF finished_at ON batches
    WHEN OLD.finished_at IS NULL AND NEW.finished_at IS NOT NULL AND NEW.webhook IS NOT NULL
    BEGIN
        INSERT INTO deliveries (delivery_id, app_name, event, subject, url, created_at, next_at)
        VALUES ('msg_' || lower(hex(randomblob(16))), NEW.app_name, 'batch.finished', NEW.batch_id, NEW.webhook, NEW.finished_at, NEW.finished_at);
    END;
",
    // More than one machine. A job's `instance` is the start of its worker that carries it out; `gateway` is what workers know this ledger by.
    "
    ALTER TABLE runs ADD COLUMN worker TEXT;
    ALTER TABLE runs ADD COLUMN instance TEXT;
    ALTER TABLE session_events ADD COLUMN worker TEXT;
    ALTER TABLE session_events ADD COLUMN instance TEXT;
    ALTER TABLE sessions ADD COLUMN worker TEXT;
    CREATE INDEX sessions_worker ON sessions (worker) WHERE worker IS NOT NULL;
    CREATE TABLE gateway (name TEXT PRIMARY KEY) STRICT;
    INSERT INTO gateway VALUES (lower(hex(randomblob(8))));
    CREATE TABLE workers (
        name TEXT PRIMARY KEY,
        version TEXT NOT NULL,
        places INTEGER NOT NULL,
        runs INTEGER NOT NULL,
        turns INTEGER NOT NULL,
        clock_ms INTEGER NOT NULL,
        started_at INTEGER NOT NULL,
        seen_at INTEGER NOT NULL,
        forgotten_at INTEGER
    ) STRICT;
",
];

/// Brings the database to the newest version in one transaction.
pub(super) fn migrate(connection: &mut Connection, migrations: &[&str]) -> Result<(), Error> {
    let known = u32::try_from(migrations.len()).unwrap_or(u32::MAX);
    let version = |connection: &Connection| connection.query_row("PRAGMA user_version", [], |row| row.get(0));
    // A database that is up to date is not written to, so that a command can look into one that is in use.
    if version(connection)? == known {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let found: u32 = version(&transaction)?;
    let Some(missing) = migrations.get(found as usize..) else { return Err(Error::TooNew { found, known }) };
    for migration in missing {
        transaction.execute_batch(migration)?;
    }
    transaction.pragma_update(None, "user_version", known)?;
    Ok(transaction.commit()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::db::connect;

    #[test]
    fn migrating_twice_keeps_the_rows_and_a_newer_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ledger.db");
        let mut connection = connect(&file).unwrap();
        migrate(&mut connection, &["CREATE TABLE a (x)"]).unwrap();
        connection.execute("INSERT INTO a VALUES (7)", []).unwrap();
        let newer = ["CREATE TABLE a (x)", "ALTER TABLE a ADD COLUMN y DEFAULT 8"];
        migrate(&mut connection, &newer).unwrap();
        migrate(&mut connection, &newer).unwrap();
        let row: (i64, i64) = connection.query_row("SELECT x, y FROM a", [], |r| Ok((r.get(0)?, r.get(1)?))).unwrap();
        assert_eq!(row, (7, 8));
        let refused = migrate(&mut connection, &newer[..1]).unwrap_err();
        assert!(matches!(refused, Error::TooNew { found: 2, known: 1 }), "{refused}");
    }

    #[test]
    fn a_migration_that_fails_leaves_the_database_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let mut connection = connect(&folder.path().join("ledger.db")).unwrap();
        migrate(&mut connection, &["CREATE TABLE a (x)", "CREATE TABLE a (x)"]).unwrap_err();
        let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
        let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_master", [], |row| row.get(0)).unwrap();
        assert_eq!((version, tables), (0, 0));
    }
}
