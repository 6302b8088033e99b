//! A job, as it is asked for.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::agent::completion::Completion;
use crate::agent::contract::{Attachment, Rules, Setup, Spec};
use crate::agent::questions::Ask;
use crate::ledger::{JobId, Key, Limits, NewJob, WaitingJob};

/// A run or a turn.
#[derive(Clone, Debug)]
pub struct Job {
    /// A run's id.
    pub uuid: Uuid,
    /// The caller's token name.
    pub app: String,
    /// The caller's address.
    pub client_ip: String,
    /// What its agent is to do.
    pub spec: Spec,
    /// What its app may cost the others.
    pub limits: Limits,
    /// Who is told of its end; its row says so, too.
    pub webhook: Option<String>,
}

/// For how long a job is remembered, and who may end it.
#[derive(Clone, Debug)]
pub enum Durability {
    /// It ends with its client, and has a row from its start.
    Plain,
    /// It ends with its client, and has a row from its acceptance, so that others can see it.
    Watched,
    /// It goes on without its client, and starts after a restart of the server if it has not begun.
    Detached {
        /// The key under which the request may be sent again.
        key: Option<Key>,
    },
}

/// What the ledger keeps of a job only until it starts, beside its row.
#[derive(Debug, Deserialize, Serialize)]
struct Kept {
    system: Option<String>,
    files: Vec<Attachment>,
    schema: Option<Box<RawValue>>,
    timeout: Duration,
    limits: Limits,
    #[serde(default)]
    completion: Option<Completion>,
    #[serde(default)]
    ask: Option<Ask>,
    #[serde(default)]
    agent: Option<Setup>,
    #[serde(default)]
    rules: Rules,
    #[serde(default)]
    yields: bool,
}

impl Job {
    /// What it is called in metrics and the log.
    pub fn kind(&self) -> &'static str {
        if self.spec.session.is_some() { "turn" } else { "run" }
    }

    /// Bytes of its files that stay in its session.
    pub fn attached(&self) -> u64 {
        if self.spec.session.is_some() { self.spec.files.iter().map(|file| file.size).sum() } else { 0 }
    }

    /// Its row; a session's files may have `most_attached` bytes together.
    pub fn row(&self, id: JobId, most_attached: u64) -> NewJob {
        NewJob {
            id,
            app_name: self.app.clone(),
            client_ip: self.client_ip.clone(),
            agent: self.spec.agent.as_ref().map(|setup| setup.agent.clone()),
            model: self.spec.model.clone(),
            prompt: self.spec.prompt.clone(),
            files: self.spec.files.iter().map(|file| file.name.clone()).collect(),
            webhook: self.webhook.clone(),
            attached: self.attached(),
            most_attached,
            elsewhere: None,
        }
    }

    /// What is kept of it beside its row.
    pub fn kept(&self) -> String {
        let Spec { system, files, schema, timeout, completion, ask, agent, rules, yields, .. } = &self.spec;
        let (system, files, schema) = (system.clone(), files.clone(), schema.clone());
        // A turn's are its session's.
        let rules = self.spec.session.as_ref().map_or(rules, |conversation| &conversation.setup.rules).clone();
        let (completion, agent) = (completion.clone(), agent.clone());
        let (timeout, ask, yields) = (*timeout, *ask, *yields);
        let kept = Kept { system, files, schema, timeout, limits: self.limits, completion, ask, agent, rules, yields };
        serde_json::to_string(&kept).expect("a job is JSON")
    }

    /// A job that was kept. `None` where it can't be read any more.
    pub(super) fn read(waiting: WaitingJob) -> Option<Self> {
        let WaitingJob { job: NewJob { id, app_name, client_ip, model, prompt, .. }, session, request } = waiting;
        let uuid = match &id {
            JobId::Run(run_id) => Uuid::try_parse(run_id).ok()?,
            JobId::Turn { .. } => Uuid::nil(),
        };
        let Kept { system, files, schema, timeout, limits, completion, ask, agent, rules, yields } = serde_json::from_str(&request).ok()?;
        let session = session.map(|session| session.conversation());
        let spec = Spec { prompt, model, system, schema, files, timeout, session, completion, ask, agent, rules: Rules::default(), yields }
            .bound_by(&rules);
        // The row says who is told.
        Some(Self { uuid, app: app_name, client_ip, spec, limits, webhook: None })
    }
}

impl Durability {
    pub(super) fn is_detached(&self) -> bool {
        matches!(self, Self::Detached { .. })
    }
}
