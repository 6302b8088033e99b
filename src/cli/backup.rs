//! `clawdforge backup` and `clawdforge restore`: the ledger as one file.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, ensure};
use tempfile::NamedTempFile;

use crate::agent::sandbox;
use crate::config::{DataFlags, Settings};
use crate::data_dir::{PARTIAL, lock, own_folder};
use crate::ledger::NoLedger;
use crate::{clock, ledger};

/// Copy the ledger into a file, with the server running or not
#[derive(clap::Args)]
#[command(after_help = "Example:\n  clawdforge backup ledger-2026-11-21.db\n  clawdforge backup - | gzip > ledger.db.gz")]
pub struct BackupArgs {
    /// The file to write, which must not exist yet; "-" is the standard output
    file: PathBuf,
    #[command(flatten)]
    data: DataFlags,
}

/// Put a backup in the ledger's place, with the server stopped
#[derive(clap::Args)]
#[command(after_help = "Example:\n  clawdforge restore ledger-2026-11-21.db")]
pub struct RestoreArgs {
    /// The backup; "-" is the standard input
    file: PathBuf,
    #[command(flatten)]
    data: DataFlags,
}

/// Copies the ledger as it is at one moment. Writers don't wait for it.
pub fn backup(args: BackupArgs) -> anyhow::Result<ExitCode> {
    let (ledger, file) = (Settings::ledger_file(&args.data.read()), args.file);
    ensure!(ledger.is_file(), "there is no ledger at {}; name its folder with --data-dir", ledger.display());
    let to_stdout = file == Path::new("-");
    // In the folder where it will stand, under its name only when it is whole.
    let folder = if to_stdout { ledger.parent() } else { file.parent() };
    let folder = folder.filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(to_stdout || !file.exists(), "{} is there already; name another file", file.display());
    let mut copy = NamedTempFile::with_prefix_in(PARTIAL, folder).with_context(|| format!("{} can't be written", folder.display()))?;
    ledger::copy(&ledger, copy.path())
        .with_context(|| format!("{} was not copied into {}; is there as much space as it takes?", ledger.display(), folder.display()))?;
    match ledger::check(copy.path()) {
        // What a newer release wrote is worth a backup too.
        Ok(()) | Err(NoLedger::TooNew(_)) => {}
        Err(error) => return Err(error).with_context(|| format!("{} is no good; restore an earlier backup", ledger.display())),
    }
    if to_stdout {
        io::copy(&mut copy.reopen()?, &mut io::stdout()).context("the backup was not written whole")?;
        io::stdout().flush()?;
    } else {
        copy.as_file_mut().sync_all()?;
        copy.persist_noclobber(&file).with_context(|| format!("{} was not written", file.display()))?;
        println!("The ledger is in {}.", file.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Checks the backup, sets the present ledger aside, and puts the backup in its place.
pub fn restore(args: RestoreArgs) -> anyhow::Result<ExitCode> {
    let data_dir = args.data.read();
    for entry in std::fs::read_dir(&data_dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_ours = matches!(name.as_str(), "feeds" | "files" | "lock" | "memories" | "network.sock" | "runs" | "sessions" | "sign-in")
            || ["clawdforge.db", PARTIAL, sandbox::CLAUDE.name].iter().any(|ours| name.starts_with(ours));
        ensure!(is_ours, "the folder {} holds other things, {name} for one; name the data folder with --data-dir", data_dir.display());
    }
    let data_dir = own_folder(&data_dir)?;
    let _lock = lock(&data_dir)?;
    let ledger = Settings::ledger_file(&data_dir);
    let asides = (clock::now()..).map(|second| data_dir.join(format!("clawdforge.db.replaced-{second}")));
    let aside = asides.into_iter().find(|aside| !aside.exists()).context("no name is free")?;

    let mut copy = NamedTempFile::with_prefix_in(PARTIAL, &data_dir)?;
    if args.file == Path::new("-") {
        io::copy(&mut io::stdin(), &mut copy).context("the standard input was not read whole")?;
    } else {
        let mut file = File::open(&args.file).with_context(|| format!("{} can't be read", args.file.display()))?;
        io::copy(&mut file, &mut copy).with_context(|| format!("{} was not read whole", args.file.display()))?;
    }
    ledger::check(copy.path()).with_context(|| format!("{} can't be restored; nothing was changed", args.file.display()))?;
    copy.as_file_mut().sync_all()?;

    // A damaged ledger can't be settled, and goes with its journals.
    ledger::settle(&ledger);
    for journal in ["", "-wal", "-shm"] {
        let [from, to] = [&ledger, &aside].map(|path| PathBuf::from(format!("{}{journal}", path.display())));
        match std::fs::rename(&from, &to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("{} was not set aside", from.display()));
            }
            _ => {}
        }
    }
    copy.persist(&ledger).with_context(|| format!("{} was not written; the ledger is in {}", ledger.display(), aside.display()))?;
    println!("{} is restored.", ledger.display());
    if aside.exists() {
        println!("What it replaced is in {}; delete it when it is not needed any more.", aside.display());
    }
    Ok(ExitCode::SUCCESS)
}
