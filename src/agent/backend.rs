//! What executes an agent's work: for a run the `claude` CLI or another agent, for a turn acpx or an agent. It knows nothing of who asked, of places, or of rows.

use std::io;

use futures_util::future::{BoxFuture, ready};
use uuid::Uuid;

use super::acpx::command::Target;
use super::acpx::turn::Turns;
use super::claude::run::{self, Claude};
use super::contract::{Conversation, Driver, Ending, Outcome, Spec};
use super::control::{Control, Report};
use super::direct::Direct;
use super::direct::run::Runs;
use super::warm_pool::Pool;

/// What executes. Another kind of agent is another field, and another variant of [`Ready`].
#[derive(Clone)]
pub struct Backends {
    /// Runs by claude.
    pub claude: Claude,
    /// Runs by other agents.
    pub others: Runs,
    /// Turns of sessions by way of acpx.
    pub acpx: Turns,
    /// Turns of sessions whose agents are spoken to directly.
    pub direct: Direct,
    /// What they find started already.
    pub warm: Pool,
}

/// Work for which all is ready.
pub enum Ready<'a> {
    /// By the `claude` CLI.
    Claude(&'a Claude, Box<io::Result<run::Ready>>),
    /// By another agent, in this folder.
    Other(&'a Runs, Box<io::Result<Target>>),
    /// By acpx.
    Acpx(&'a Turns, &'a Conversation),
    /// By an agent that is spoken to directly.
    Direct(&'a Direct, &'a Conversation),
}

/// Work that is over for its caller.
pub struct Executed<'a> {
    /// How it ended.
    pub outcome: Outcome,
    /// What the agent still does until nothing is left of it.
    pub cleanup: BoxFuture<'a, ()>,
    /// Whether it keeps its place until then.
    pub keeps_place: bool,
}

impl Backends {
    /// Makes ready what the work needs and nobody else sees.
    pub async fn prepare<'a>(&'a self, uuid: Uuid, spec: &'a Spec) -> Ready<'a> {
        self.warm.renew_sign_in().await;
        match (&spec.session, &spec.agent) {
            (None, None) => Ready::Claude(&self.claude, Box::new(self.claude.prepare(uuid, spec).await)),
            (None, Some(setup)) => Ready::Other(&self.others, Box::new(self.others.prepare(setup).await)),
            (Some(conversation), _) => match conversation.driver {
                Driver::Acpx => Ready::Acpx(&self.acpx, conversation),
                Driver::Direct => Ready::Direct(&self.direct, conversation),
            },
        }
    }
}

impl<'a> Ready<'a> {
    /// Takes it back.
    pub async fn abandon(self) {
        match self {
            Self::Claude(_, ready) => {
                if let Ok(ready) = *ready {
                    ready.abandon().await;
                }
            }
            Self::Other(others, target) => {
                if let Ok(target) = *target {
                    others.abandon(target).await;
                }
            }
            Self::Acpx(..) | Self::Direct(..) => {}
        }
    }

    /// Has it done, until its time is up or it is cancelled.
    pub async fn execute(self, spec: &'a Spec, control: Control<'a>) -> Executed<'a> {
        let (report, mut reported) = Report::new();
        let (mut working, keeps_place): (BoxFuture<'a, ()>, _) = match self {
            Self::Claude(claude, ready) => (Box::pin(claude.work(*ready, spec, control, report)), true),
            Self::Other(others, target) => (Box::pin(others.work(*target, spec, control, report)), true),
            // The session's processes stay, and only a last second of acpx's is still to come.
            Self::Acpx(acpx, conversation) => (Box::pin(acpx.work(conversation, spec, control, report)), false),
            Self::Direct(direct, conversation) => (Box::pin(direct.work(conversation, spec, control, report)), false),
        };
        let (outcome, cleanup) = tokio::select! {
            biased;
            outcome = &mut reported => (outcome.ok(), working),
            () = &mut working => (reported.try_recv().ok(), Box::pin(ready(())) as BoxFuture<'a, ()>),
        };
        let defect = || Outcome::of(Ending::Failed("the server met a defect; its operator finds it in its log".to_owned()));
        Executed { outcome: outcome.unwrap_or_else(defect), cleanup, keeps_place }
    }
}
