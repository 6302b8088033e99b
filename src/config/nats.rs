//! How machines find each other.

use std::path::{Path, PathBuf};

use async_nats::ServerAddr;

use super::flags::{Flags, NatsFlags, WorkerFlags};
use super::value::{BadSetting, given, text};
use super::{Settings, is_machine_name};

/// The NATS servers, and what lets one in there.
#[derive(Clone, Debug)]
pub struct Nats {
    /// One of them is enough.
    pub servers: Vec<ServerAddr>,
    /// The file with the credentials, absolute.
    pub credentials: Option<PathBuf>,
    /// The file with the certificates of who signs theirs.
    pub certificates: Option<PathBuf>,
}

/// The settings of a machine that works for others.
#[derive(Clone, Debug)]
pub struct Worker {
    /// Its name, by which its sessions find it again.
    pub name: String,
    /// How it finds them.
    pub nats: Nats,
    /// How its agents work.
    pub settings: Settings,
}

impl NatsFlags {
    pub(super) fn read(&self) -> Result<Option<Nats>, BadSetting> {
        let Some(urls) = given(self.nats_url.as_deref()) else { return Ok(None) };
        let server = |url: &str| {
            let read = url.parse().ok().filter(|server: &ServerAddr| ["nats", "tls"].contains(&server.scheme()));
            let wrong =
                || format!("has \"{}\", which is not an address such as nats://HOST:4222 or tls://HOST:4222", without_password(url));
            read.ok_or_else(|| BadSetting::new("CLAWDFORGE_NATS_URL", wrong()))
        };
        Ok(Some(Nats {
            servers: urls.split(',').map(str::trim).filter(|url| !url.is_empty()).map(server).collect::<Result<_, _>>()?,
            credentials: file("CLAWDFORGE_NATS_CREDS", self.nats_creds.as_deref())?,
            certificates: file("CLAWDFORGE_NATS_CA", self.nats_ca.as_deref())?,
        }))
    }
}

impl WorkerFlags {
    /// Checks every setting.
    pub fn read(self) -> Result<Worker, BadSetting> {
        let wanted = || BadSetting::new("CLAWDFORGE_NATS_URL", "is needed: it says where work comes from, as nats://HOST:4222");
        let nats = self.nats.read()?.ok_or_else(wanted)?;
        let settings = Flags { agents: self.agents, nats: self.nats, ..Flags::default() }.read()?;
        let host = rustix::system::uname().nodename().to_string_lossy().replace('.', "-");
        let name = text(self.worker_name, &host);
        if !is_machine_name(&name) {
            let why = format!("is \"{name}\", which is not 1 to 64 of a-z, A-Z, 0-9, - and _, a letter or digit first");
            return Err(BadSetting::new("CLAWDFORGE_WORKER_NAME", why));
        }
        Ok(Worker { name, nats, settings })
    }
}

/// A file that can be read, by its whole path.
fn file(variable: &'static str, path: Option<&str>) -> Result<Option<PathBuf>, BadSetting> {
    let Some(path) = given(path) else { return Ok(None) };
    let wrong = |error| BadSetting::new(variable, format!("names \"{path}\", which can't be read ({error})"));
    std::fs::File::open(path).map_err(wrong)?;
    Path::new(path).canonicalize().map(Some).map_err(wrong)
}

/// An address as it may be shown.
fn without_password(url: &str) -> &str {
    url.rsplit_once('@').map_or(url, |(_, host)| host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_and_a_wrong_one_is_named_without_its_password() {
        let read = |url: &str| NatsFlags { nats_url: Some(url.into()), ..NatsFlags::default() }.read();
        assert!(read(" ").unwrap().is_none());
        assert_eq!(read("nats://a:4222, tls://b").unwrap().unwrap().servers.len(), 2);
        let wrong = read("http://me:secret@host").unwrap_err().to_string();
        assert!(wrong.contains("has \"host\", which is not an address") && !wrong.contains("secret"), "{wrong}");
        let missing = NatsFlags { nats_url: Some("nats://a".into()), nats_creds: Some("/nowhere".into()), ..NatsFlags::default() };
        assert!(missing.read().unwrap_err().to_string().starts_with("CLAWDFORGE_NATS_CREDS names \"/nowhere\""));
    }

    #[test]
    fn a_machine_has_the_name_of_its_host_unless_it_is_given_one() {
        let nats = NatsFlags { nats_url: Some("nats://a".into()), ..NatsFlags::default() };
        let named = |name: &str| WorkerFlags { nats: nats.clone(), worker_name: Some(name.into()), ..WorkerFlags::default() }.read();
        assert!(is_machine_name(&named("").unwrap().name));
        assert_eq!(named("b-1").unwrap().name, "b-1");
        assert!(named("a.b").unwrap_err().to_string().starts_with("CLAWDFORGE_WORKER_NAME is \"a.b\""));
        assert!(WorkerFlags::default().read().unwrap_err().to_string().starts_with("CLAWDFORGE_NATS_URL is needed"));
    }
}
