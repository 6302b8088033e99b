//! What a start does about sessions that an earlier end left.

use super::{Error, Sessions};
use crate::agent::acpx::workspace::SessionDir;
use crate::agent::folder::{ATTACHING, clear};
use crate::blocking::blocking;

impl Sessions {
    /// Takes back sessions that were being created, and brings the others' folders up to date. `interrupted` says whether turns
    /// were cut short.
    pub async fn recover(&self, interrupted: bool) -> Result<(), Error> {
        for session in self.0.ledger.half_created_sessions().await? {
            self.0.forget(&session.new).await;
        }
        self.each_folder(
            "the folder of a session that was started ahead is left",
            |dir| if dir.is_unclaimed() { dir.remove() } else { Ok(()) },
        )
        .await;
        self.each_folder("a session's folder may not be up to date", move |dir| {
            // A file of a turn that was being copied.
            let cleared = if interrupted { clear(&dir.work(), |name| !name.starts_with(ATTACHING)).map(drop) } else { Ok(()) };
            cleared.and(dir.renew())
        })
        .await;
        self.forget_owners().await;
        self.0.count_open().await;
        Ok(())
    }

    /// Removes what acpx's owners leave when they are killed. Only for when none is alive.
    pub async fn forget_owners(&self) {
        self.each_folder("a lock or a socket of acpx may be left", SessionDir::forget_owner).await;
    }

    /// Does the same to each. One that fails keeps nobody from the others.
    async fn each_folder(&self, trouble: &'static str, work: impl Fn(&SessionDir) -> std::io::Result<()> + Send + 'static) {
        let folder = self.0.acpx.launcher.folder.clone();
        let each = move || {
            for session in folder.read_dir()?.flatten() {
                if let Err(error) = work(&SessionDir::new(session.path())) {
                    tracing::warn!(path = %session.path().display(), %error, trouble);
                }
            }
            Ok(())
        };
        if let Err(error) = blocking(each).await {
            tracing::warn!(%error, trouble);
        }
    }
}
