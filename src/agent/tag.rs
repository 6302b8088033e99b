//! What marks an agent, and all that it starts: a variable of its environment, which those inherit.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::secret::sha256_hex;

/// The variable. Not named `CLAWDFORGE_…`: agents get none of those.
pub(super) const VARIABLE: &str = "AGENT_RUN";

/// What tags the family of one run, or of every run of a server. Nobody can make one for a run that is not his: it has a part that follows
/// from a secret of the server's.
#[derive(Clone, Debug)]
pub struct Tag {
    /// What the tags of all runs of the server begin with.
    server: String,
    secret: [u8; 32],
    /// The runs of which something may be there, with how often something was started for each.
    live: Arc<Mutex<BTreeMap<String, u64>>>,
    /// The run, with what nobody else knows.
    pub(super) run: Option<String>,
}

impl Tag {
    /// The tag that all runs of the server with this data folder share. The folder's device and inode tell two servers
    /// on one machine apart, in containers too.
    pub fn server(data_dir: &Path) -> io::Result<Self> {
        let folder = data_dir.metadata()?;
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(io::Error::other)?;
        Ok(Self { server: format!("{:x}-{:x}/", folder.dev(), folder.ino()), secret, live: Arc::default(), run: None })
    }

    /// The tag of one run of that server.
    #[must_use]
    pub fn run(&self, id: &str) -> Self {
        let own = &sha256_hex(&[&self.secret, id.as_bytes()].concat())[..32];
        Self { run: Some(format!("{id}{BETWEEN}{own}")), ..self.clone() }
    }

    pub(super) fn value(&self) -> String {
        format!("{}{}", self.server, self.run.as_deref().unwrap_or_default())
    }

    /// Notes that something is started that carries it.
    pub(super) fn begin(&self) {
        if let Some(run) = &self.run {
            *self.live().entry(run.clone()).or_default() += 1;
        }
    }

    /// How often something was started that carries it.
    pub(super) fn starts(&self) -> u64 {
        self.run.as_ref().and_then(|run| self.live().get(run).copied()).unwrap_or_default()
    }

    /// Notes that of so many starts nothing is left.
    pub(super) fn end(&self, starts: u64) {
        if let Some(run) = &self.run
            && self.starts() == starts
        {
            self.live().remove(run);
        }
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_in(&self, environ: &[u8]) -> bool {
        self.run_in(environ).is_some_and(|run| self.run.as_ref().is_none_or(|own| run == own.as_bytes()))
    }

    /// Whether an environment is that of a run of this server of which something may be there.
    pub(super) fn is_of_live_run(&self, environ: &[u8]) -> bool {
        self.run_of(environ).is_some()
    }

    /// The id of that run.
    pub(super) fn run_of(&self, environ: &[u8]) -> Option<String> {
        let run = std::str::from_utf8(self.run_in(environ)?).ok().filter(|run| self.live().contains_key(*run))?;
        run.split_once(BETWEEN).map(|(id, _)| id.to_owned())
    }

    fn run_in<'a>(&self, environ: &'a [u8]) -> Option<&'a [u8]> {
        value_in(environ)?.strip_prefix(self.server.as_bytes())
    }
}

/// What stands between an id and what nobody else knows.
const BETWEEN: char = '.';

fn value_in(environ: &[u8]) -> Option<&[u8]> {
    environ.split(|byte| *byte == 0).find_map(|variable| variable.strip_prefix(VARIABLE.as_bytes())?.strip_prefix(b"="))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(server: &str, run: Option<&str>) -> Tag {
        Tag { server: server.to_owned(), secret: [7; 32], live: Arc::default(), run: run.map(str::to_owned) }
    }

    #[test]
    fn a_run_that_is_over_or_was_never_there_is_nobodys() {
        let server = tag("1-2/", None);
        let run = server.run("abc");
        let environ = format!("AGENT_RUN={}\0", run.value());
        assert!(run.is_in(environ.as_bytes()) && !run.is_of_live_run(environ.as_bytes()));
        run.begin();
        assert_eq!(server.run_of(environ.as_bytes()).as_deref(), Some("abc"));
        assert!(!server.is_of_live_run(b"AGENT_RUN=1-2/abc\0") && !server.is_of_live_run(b"AGENT_RUN=1-2/abc.0\0"));
        run.begin();
        run.end(1);
        assert!(server.is_of_live_run(environ.as_bytes()));
        run.end(2);
        assert!(!server.is_of_live_run(environ.as_bytes()));
    }

    #[test]
    fn a_tag_is_a_whole_variable() {
        let environ = b"A=1\0AGENT_RUN=1-2/abc\0B=AGENT_RUN=1-2/xyz\0";
        assert!(tag("1-2/", Some("abc")).is_in(environ));
        assert!(tag("1-2/", None).is_in(environ));
        assert!(!tag("1-2/", Some("ab")).is_in(environ));
        assert!(!tag("1-2/", Some("xyz")).is_in(environ));
        assert!(!tag("1-3/", None).is_in(environ));
        assert!(!tag("1-2/", Some("abc")).is_in(b""));
    }
}
