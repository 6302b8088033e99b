//! What marks an agent, and all that it starts: a variable of its environment, which those inherit.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The variable. Not named `CLAWDFORGE_…`: agents get none of those.
pub(super) const VARIABLE: &str = "AGENT_RUN";

/// What tags the family of one run, or of every run of a server.
#[derive(Clone, Debug)]
pub struct Tag {
    /// What the tags of all runs of the server begin with.
    server: String,
    pub(super) run: Option<String>,
}

impl Tag {
    /// The tag that all runs of the server with this data folder share. The folder's device and inode tell two servers
    /// on one machine apart, in containers too.
    pub fn server(data_dir: &Path) -> io::Result<Self> {
        let folder = data_dir.metadata()?;
        Ok(Self { server: format!("{:x}-{:x}/", folder.dev(), folder.ino()), run: None })
    }

    /// The tag of one run of that server.
    #[must_use]
    pub fn run(&self, id: &str) -> Self {
        Self { server: self.server.clone(), run: Some(id.to_owned()) }
    }

    pub(super) fn value(&self) -> String {
        format!("{}{}", self.server, self.run.as_deref().unwrap_or_default())
    }

    pub(super) fn is_in(&self, environ: &[u8]) -> bool {
        value_in(environ).and_then(|value| value.strip_prefix(self.server.as_bytes())).is_some_and(|id| match &self.run {
            Some(run) => id == run.as_bytes(),
            None => true,
        })
    }

    pub(super) fn is_of_this_server(&self, environ: &[u8]) -> bool {
        value_in(environ).is_some_and(|value| value.starts_with(self.server.as_bytes()))
    }

    /// The id of the run of this server that an environment is of.
    pub(super) fn run_of(&self, environ: &[u8]) -> Option<String> {
        value_in(environ)?.strip_prefix(self.server.as_bytes()).map(|id| String::from_utf8_lossy(id).into_owned())
    }
}

fn value_in(environ: &[u8]) -> Option<&[u8]> {
    environ.split(|byte| *byte == 0).find_map(|variable| variable.strip_prefix(VARIABLE.as_bytes())?.strip_prefix(b"="))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(server: &str, run: Option<&str>) -> Tag {
        Tag { server: server.to_owned(), run: run.map(str::to_owned) }
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
