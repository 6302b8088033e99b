//! An adapter that is at work, and what is said to it and by it.

use std::future::pending;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::Direct;
use crate::agent::acpx::command::{Error, Target};
use crate::agent::claude::files::obstacle_for;
use crate::agent::contract::Rules;
use crate::agent::environment::Environment;
use crate::agent::kinds::{self, Kind, Naming};
use crate::agent::process::{self, ConverseOptions, Line, MAX_LINE, Next};
use crate::agent::programs;
use crate::agent::turn::{ASK, CLAUDE_AGENT};
use crate::blocking::blocking;

/// How long an adapter may take to end when its input is closed. What was said last is on disk within 0.1 s.
const END_GRACE: Duration = Duration::from_secs(2);
/// By which an agent says that it has to be signed in.
const SIGN_IN: i64 = -32000;
/// Characters of what it said on standard error that stand in a message of its failure.
const LAST_WORDS: usize = 500;
/// Bytes that it may say while nobody listens. It has nothing to say between turns.
const MAX_UNHEARD: usize = 2 * MAX_LINE;

/// An adapter that is at work. Dropped, its input is closed.
#[derive(Debug)]
pub(super) struct Connection {
    /// The adapter's.
    pid: u32,
    say: mpsc::UnboundedSender<Vec<u8>>,
    heard: mpsc::UnboundedReceiver<Vec<u8>>,
    /// Bytes of what it said and nobody has listened to yet.
    unheard: Arc<AtomicUsize>,
    /// Ends it whatever it does.
    cancel: CancellationToken,
    over: CancellationToken,
    /// The end of its standard error, when it is over.
    stderr: Arc<OnceLock<String>>,
    next_id: i64,
    session: String,
    /// What was said on both sides and belongs to no turn yet.
    said: Vec<Vec<u8>>,
    /// Whether it had to wait for a turn, and may have died meanwhile.
    waited: bool,
    /// What the conversation had cost when it was started, as far as that goes on to be counted, in US dollars.
    pub(super) began_at_usd: f64,
    /// What binds the agent.
    pub(super) rules: Rules,
}

/// A message, as far as it is looked at.
pub(super) struct Message {
    pub(super) id: Value,
    pub(super) method: Option<String>,
    pub(super) all: Value,
}

impl Message {
    pub(super) fn read(line: &[u8]) -> Self {
        let all: Value = serde_json::from_slice(line).unwrap_or_default();
        Self { id: all["id"].clone(), method: all["method"].as_str().map(str::to_owned), all }
    }
}

impl Direct {
    /// Starts an adapter, and a session, or the one that is called so.
    pub(super) async fn connect(&self, target: &Target, resumes: Option<&str>, deadline: Instant) -> Result<Connection, Error> {
        let acpx = &self.0.acpx;
        let environment = &acpx.launcher.environment;
        let agent = &target.setup.agent;
        let kind = kinds::of(agent).ok_or_else(|| Error::Failed(format!("the server does not know how to speak to {agent}")))?;
        let is_claude = agent == CLAUDE_AGENT;
        if is_claude && let Some(why) = obstacle_for(environment).await {
            return Err(Error::Failed(why));
        }
        let named = if is_claude { self.0.adapter.clone() } else { kind.program.into() };
        let program = programs::find(&named, environment).ok_or(Error::NotInstalled(named))?;
        let began_at_usd = match resumes {
            Some(session) if is_claude => target.dir.kept_cost_of(session.to_owned()).await,
            _ => 0.0,
        };
        if !is_claude {
            let (dir, session) = (target.dir.clone(), resumes.map(str::to_owned));
            let prepare = move || {
                dir.clear_temporary()?;
                kind.prepare(&dir.home(), session.as_deref())
            };
            blocking(prepare).await.map_err(|error| Error::Failed(format!("the session's folder can't be made ready ({error})")))?;
        }
        let mut command = if is_claude { acpx.agents_command(target, &program, &[])? } else { acpx.command_of(target, kind, &program)? };
        command.current_dir(target.dir.work());
        let waiting = process::start(&mut command, &acpx.tag(&target.name))
            .map_err(|error| Error::Failed(format!("{} could not be started ({error})", program.display())))?;
        let pid = waiting.pid().unwrap_or_default();
        let ((say, more), (hear, heard)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
        let [cancel, over] = std::array::from_fn(|_| CancellationToken::new());
        let (tag, ends, ended) = (acpx.tag(&target.name), cancel.clone(), over.clone().drop_guard());
        let (unheard, stderr) = (Arc::new(AtomicUsize::new(0)), Arc::new(OnceLock::new()));
        let (said, last_words) = (unheard.clone(), stderr.clone());
        self.0.ending.spawn(async move {
            let options = ConverseOptions {
                input: Vec::new(),
                hold_input: true,
                // Turns have their own.
                time_up: Box::pin(pending()),
                cancel: &ends,
                patience: None,
                more: Some(more),
            };
            let read = |line: Line<'_>| match line {
                Line::Whole(line) if said.fetch_add(line.len(), Ordering::Relaxed) <= MAX_UNHEARD => {
                    let _ = hear.send(line.to_vec());
                    Next::More
                }
                Line::Whole(_) | Line::TooLong => Next::Stop,
            };
            let finished = process::converse_with(waiting, &tag, options, read).await;
            tracing::debug!(end = ?finished.end, stderr = finished.stderr, "an adapter ended");
            let _ = last_words.set(finished.stderr);
            drop(ended);
        });
        let mut connection = Connection {
            pid,
            say,
            heard,
            unheard,
            cancel,
            over,
            stderr,
            next_id: 0,
            session: String::new(),
            said: Vec::new(),
            waited: false,
            began_at_usd,
            rules: target.setup.rules.clone(),
        };
        match connection.begin(kind, target, resumes, environment, deadline).await {
            Ok(()) => Ok(connection),
            Err(error) => {
                let stderr = connection.end().await;
                Err(match (error, process::last_characters(stderr.trim(), LAST_WORDS)) {
                    (error, "") => error,
                    (error, said) => Error::Failed(format!("{error}; it said: {said}")),
                })
            }
        }
    }
}

impl Connection {
    /// What the agent calls the session.
    pub(super) fn session(&self) -> &str {
        &self.session
    }

    /// The adapter's process id.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it is dead.
    pub(super) fn is_over(&self) -> bool {
        self.over.is_cancelled()
    }

    /// Whether it had to wait for a turn, and may have died meanwhile.
    pub(super) fn has_waited(&self) -> bool {
        self.waited
    }

    /// Notes that it waits for a turn.
    pub(super) fn waits(&mut self) {
        self.waited = true;
    }

    /// Closes its input, and ends it where that does not. Returns when nothing of it is left, with the end of its standard error.
    pub(super) async fn end(self) -> String {
        let Self { say, heard, cancel, over, stderr, .. } = self;
        drop((say, heard));
        if timeout(END_GRACE, over.cancelled()).await.is_err() {
            cancel.cancel();
            over.cancelled().await;
        }
        stderr.get().cloned().unwrap_or_default()
    }

    /// Ends it at once, with all that it started. Gives the end of its standard error.
    pub(super) async fn kill(self) -> String {
        self.cancel.cancel();
        self.over.cancelled().await;
        self.stderr.get().cloned().unwrap_or_default()
    }

    async fn begin(
        &mut self,
        kind: &Kind,
        target: &Target,
        resumes: Option<&str>,
        environment: &Environment,
        deadline: Instant,
    ) -> Result<(), Error> {
        let client = json!({"name": "clawdforge", "version": env!("CARGO_PKG_VERSION")});
        let mut capabilities = json!({"fs": {"readTextFile": false, "writeTextFile": false}});
        // It has a tool to ask what it wants to know where somebody answers.
        if target.setup.permissions == ASK {
            capabilities["elicitation"] = json!({"form": {}});
        }
        self.ask("initialize", &json!({"protocolVersion": 1, "clientCapabilities": capabilities, "clientInfo": client}), deadline).await?;
        let mut place = json!({"cwd": target.dir.work(), "mcpServers": []});
        // The agent keeps it no longer than it lives.
        if let Some(system) = &target.setup.system {
            place["_meta"] = json!({"systemPrompt": {"append": system}});
        }
        let resumed = match resumes {
            Some(session) => self.take_up(kind, session, place.clone(), deadline).await?,
            None => false,
        };
        if !resumed {
            self.make(kind, &place, environment, deadline).await?;
        }
        if let Some(mode) = (kind.mode)(&target.setup.permissions) {
            self.ask("session/set_mode", &json!({"sessionId": self.session, "modeId": mode}), deadline).await?;
        }
        match (&kind.model, &target.setup.model) {
            (Naming::Method, Some(model)) => {
                self.ask("session/set_model", &json!({"sessionId": self.session, "modelId": model}), deadline).await.map(drop)
            }
            (Naming::Option, Some(model)) => {
                let option = json!({"sessionId": self.session, "configId": "model", "value": model});
                self.ask("session/set_config_option", &option, deadline).await.map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Begins a conversation; an agent that asks for it is signed in first.
    async fn make(&mut self, kind: &Kind, place: &Value, environment: &Environment, deadline: Instant) -> Result<(), Error> {
        let mut made = self.answer_to("session/new", place, deadline).await?;
        if made.as_ref().is_err_and(|refused| refused["code"] == SIGN_IN) {
            let Kind { name, sign_in, .. } = kind;
            let method = sign_in.method(environment).ok_or_else(|| Error::Failed(format!("{name} is not signed in; {}", sign_in.how)))?;
            self.ask("authenticate", &json!({"methodId": method}), deadline).await?;
            made = self.answer_to("session/new", place, deadline).await?;
        }
        let made = made.map_err(|refused| failure("session/new", &refused))?;
        let named = made["sessionId"].as_str().ok_or_else(|| Error::Failed("the agent did not name its session".to_owned()))?;
        named.clone_into(&mut self.session);
        Ok(())
    }

    /// Takes up a conversation. False where the agent has none of that name: it was never begun, or is lost.
    async fn take_up(&mut self, kind: &Kind, session: &str, mut place: Value, deadline: Instant) -> Result<bool, Error> {
        place["sessionId"] = session.into();
        session.clone_into(&mut self.session);
        let resumed = match self.answer_to("session/resume", &place, deadline).await? {
            Err(refused) if !kind.has_lost(&refused) => {
                let loaded = self.answer_to("session/load", &place, deadline).await?;
                // It tells all that was said before, which is no part of what comes.
                self.said.retain(|line| Message::read(line).method.as_deref() != Some("session/update"));
                loaded
            }
            resumed => resumed,
        };
        match resumed {
            Ok(_) => Ok(true),
            Err(refused) if kind.has_lost(&refused) => {
                tracing::warn!(session, "the agent does not know its conversation, and begins another");
                Ok(false)
            }
            Err(refused) => Err(failure("session/load", &refused)),
        }
    }

    /// Sends a message. It is told with the others.
    pub(super) fn send(&mut self, message: &Value) -> Vec<u8> {
        let line = message.to_string().into_bytes();
        // One that is dead is noticed where it is listened to.
        let _ = self.say.send([&line[..], b"\n"].concat());
        line
    }

    /// Begins a request. Gives its id, and the line.
    pub(super) fn request(&mut self, method: &str, params: &Value) -> (i64, Vec<u8>) {
        self.next_id += 1;
        let line = self.send(&json!({"jsonrpc": "2.0", "id": self.next_id, "method": method, "params": params}));
        (self.next_id, line)
    }

    /// The next line that it says; `None` when it is dead.
    pub(super) async fn hear(&mut self) -> Option<Vec<u8>> {
        let line = self.heard.recv().await?;
        self.unheard.fetch_sub(line.len(), Ordering::Relaxed);
        Some(line)
    }

    /// What was said and belongs to no turn yet, also while nobody listened.
    pub(super) fn take_said(&mut self) -> Vec<Vec<u8>> {
        while let Ok(line) = self.heard.try_recv() {
            self.unheard.fetch_sub(line.len(), Ordering::Relaxed);
            self.note(line);
        }
        std::mem::take(&mut self.said)
    }

    /// Keeps a line for the next turn, and refuses what it asks.
    fn note(&mut self, line: Vec<u8>) -> Message {
        let message = Message::read(&line);
        if self.said.iter().map(Vec::len).sum::<usize>() < MAX_LINE {
            self.said.push(line);
        }
        if message.method.is_some() && !message.id.is_null() {
            let refused = self.refuse(&message.id);
            self.said.push(refused);
        }
        message
    }

    /// Answers a request that nothing here can serve.
    pub(super) fn refuse(&mut self, id: &Value) -> Vec<u8> {
        self.send(&json!({"jsonrpc": "2.0", "id": id, "error": {"code": -32601, "message": "Method not found"}}))
    }

    /// A request that must not fail, and what came of it.
    async fn ask(&mut self, method: &str, params: &Value, deadline: Instant) -> Result<Value, Error> {
        self.answer_to(method, params, deadline).await?.map_err(|refused| failure(method, &refused))
    }

    /// A request, and the result or the error that came of it.
    async fn answer_to(&mut self, method: &str, params: &Value, deadline: Instant) -> Result<Result<Value, Value>, Error> {
        let (id, line) = self.request(method, params);
        self.said.push(line);
        loop {
            let heard = timeout_at(deadline, self.hear()).await;
            let line = heard.map_err(|_| Error::Failed(format!("the agent did not answer \"{method}\" in time")))?;
            let line = line.ok_or_else(|| Error::Failed(format!("the agent ended before it answered \"{method}\"")))?;
            let mut message = self.note(line);
            if message.method.is_none() && message.id == id {
                let error = message.all["error"].take();
                return Ok(if error.is_object() { Err(error) } else { Ok(message.all["result"].take()) });
            }
        }
    }
}

fn failure(method: &str, error: &Value) -> Error {
    let details = error["data"]["details"].as_str().map(|details| format!(" ({details})")).unwrap_or_default();
    Error::Failed(format!("{method}: {}{details}", error["message"].as_str().unwrap_or_default()))
}
