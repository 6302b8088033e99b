//! A turn by an adapter, from its files to its end.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, sleep_until};

use super::connection::{Connection, Message};
use super::{BEGIN, Direct};
use crate::agent::acpx::command::{Acpx, Error, Target};
use crate::agent::claude::command::prompt_text;
use crate::agent::contract::{Conversation, Ending, Outcome, Spec};
use crate::agent::control::{Control, Report};
use crate::agent::family;
use crate::agent::folder::unprepared;
use crate::agent::questions::Settled;
use crate::agent::tag::Tag;
use crate::agent::turn::{APPROVE_ALL, ELICITATION, Heard, Turn};

/// How long a turn may take to end when it was cancelled.
const CANCELLED_GRACE: Duration = Duration::from_secs(4);
/// How long what its tools started may go on behind that, and how often that is looked for.
const TOOLS_GRACE: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(20);

/// What became of an agent that was prompted.
enum Prompted {
    /// Its turn has ended, and it can go on.
    Ended(Connection),
    /// It is over, or must be; with the end of its standard error.
    Over(String),
    /// The same, and it had not heard the prompt.
    Unheard(String),
}

impl Direct {
    /// Has the session's agent take the turn. Reports when it has ended; returns when nothing of it goes on. The agent stays.
    pub async fn work(&self, conversation: &Conversation, spec: &Spec, control: Control<'_>, mut report: Report) {
        let target = self.0.acpx.target(&conversation.session_id, &conversation.setup);
        // A defect must not cost more than its own session's processes.
        let take = self.take(&target, conversation.agent_session.as_deref(), spec, control);
        match AssertUnwindSafe(take).catch_unwind().await {
            Ok(outcome) => report.say(outcome),
            Err(_) => drop(family::end(&self.0.acpx.tag(&target.name)).await),
        }
    }

    /// Has the session's agent take the turn, to its end. The agent stays.
    pub(super) async fn take(&self, target: &Target, known_as: Option<&str>, spec: &Spec, control: Control<'_>) -> Outcome {
        // What came of it before has nothing to do with this turn.
        let _ = self.0.acpx.why_ended(&target.name);
        let started = Instant::now();
        let files = match self.0.acpx.attach(target, &spec.files).await {
            Ok(files) => files,
            Err(error) => return Outcome::of(Ending::Unprepared(unprepared(&error))),
        };
        let paths: Vec<_> = files.iter().map(|name| target.dir.work().join(name)).collect();
        let prompt = prompt_text(&spec.prompt, &paths);
        let mut turn = Turn::new(&target.setup, control, (started, spec.timeout), files, prompt.len());
        let connection = match self.connection(target, known_as, &turn, control).await {
            Ok(connection) => connection,
            Err(error) => {
                family::end(&self.0.acpx.tag(&target.name)).await;
                let ending = match error {
                    Error::NotInstalled(program) => Ending::NotInstalled(program.to_string_lossy().into_owned()),
                    Error::Failed(error) => turn.ending(|_| error),
                };
                return turn.outcome(ending, String::new(), 0.0);
            }
        };
        let mut began_at_usd = connection.began_at_usd;
        let prompted = match self.prompt(target, connection, &prompt, &mut turn, control).await {
            // One that died unnoticed while it had no turn has not seen the prompt.
            Prompted::Unheard(_) => match self.connection(target, known_as, &turn, control).await {
                Ok(connection) => {
                    began_at_usd = connection.began_at_usd;
                    self.prompt(target, connection, &prompt, &mut turn, control).await
                }
                Err(error) => Prompted::Over(error.to_string()),
            },
            prompted => prompted,
        };
        let ending = turn.ending(|last| last.map_or_else(|| "the agent ended before the turn did".to_owned(), str::to_owned));
        let ending = ending.or_failed(self.0.acpx.why_ended(&target.name));
        let stderr = match prompted {
            Prompted::Ended(connection) => {
                self.keep_idle(target, connection);
                String::new()
            }
            Prompted::Over(stderr) | Prompted::Unheard(stderr) => {
                family::end(&self.0.acpx.tag(&target.name)).await;
                stderr
            }
        };
        turn.outcome(ending, stderr, began_at_usd)
    }

    /// Whether nothing goes on any more of a turn that was cancelled. Its agent says so a little before.
    async fn is_over(&self, connection: &Connection, tag: &Tag) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < TOOLS_GRACE {
            if family::has_no_tools(tag, connection.pid()).await {
                return true;
            }
            sleep(LOOK).await;
        }
        false
    }

    /// The session's agent, as it is or started again.
    async fn connection(
        &self,
        target: &Target,
        known_as: Option<&str>,
        turn: &Turn<'_>,
        control: Control<'_>,
    ) -> Result<Connection, Error> {
        // Whoever works there could keep nothing.
        Acpx::check(target)?;
        let idle = self.idle().remove(&target.name);
        if let Some((connection, _)) = idle {
            // One that is bound by other rules than its app is now does not go on.
            if !connection.is_over() && connection.rules == target.setup.rules {
                return Ok(connection);
            }
            connection.end().await;
        }
        let deadline = turn.deadline().min(Instant::now() + BEGIN);
        tokio::select! {
            biased;
            connection = self.connect(target, known_as, deadline) => connection,
            () = control.cancel.cancelled() => Err(Error::Failed("it was cancelled".to_owned())),
        }
    }

    /// Sends the prompt and takes what comes of it.
    async fn prompt(
        &self,
        target: &Target,
        mut connection: Connection,
        prompt: &str,
        turn: &mut Turn<'_>,
        control: Control<'_>,
    ) -> Prompted {
        let params = json!({"sessionId": connection.session(), "prompt": [{"type": "text", "text": prompt}]});
        let mut unheard = connection.take_said();
        let (id, line) = connection.request("session/prompt", &params);
        unheard.push(line);
        let mut cancelled_at = None;
        loop {
            let unwanted = async {
                match cancelled_at {
                    None => turn.unwanted().await,
                    Some(at) => sleep_until(at + CANCELLED_GRACE).await,
                }
            };
            let line = tokio::select! {
                biased;
                line = connection.hear() => line,
                settled = control.questions.next() => {
                    let answer = connection.send(&answer_to(&settled));
                    turn.line(&answer);
                    continue;
                }
                () = unwanted => {
                    if cancelled_at.is_some() {
                        tracing::warn!(session = connection.session(), "the turn did not let itself be cancelled; ending the agent");
                        return Prompted::Over(connection.kill().await);
                    }
                    control.questions.cancel_all();
                    let session = connection.session().to_owned();
                    connection.send(&json!({"jsonrpc": "2.0", "method": "session/cancel", "params": {"sessionId": session}}));
                    cancelled_at = Some(Instant::now());
                    continue;
                }
            };
            let Some(line) = line else {
                let stderr = connection.end().await;
                return if unheard.is_empty() { Prompted::Over(stderr) } else { Prompted::Unheard(stderr) };
            };
            // Its claude died while it had no turn, or it has forgotten the conversation: nothing was begun.
            if !unheard.is_empty() && connection.has_waited() && is_refusal(&line, id) {
                tracing::info!(session = target.name, answer = %String::from_utf8_lossy(&line), "the agent refused a prompt after it had waited; starting it again");
                return Prompted::Unheard(connection.kill().await);
            }
            for line in unheard.drain(..) {
                turn.line(&line);
            }
            match turn.line(&line) {
                Heard::Asked => {}
                Heard::More => {
                    let answer = answer(&mut connection, &line, &target.setup.permissions, cancelled_at.is_some());
                    if let Some(answer) = answer {
                        turn.line(&answer);
                    }
                }
                Heard::Ended if cancelled_at.is_some() && !self.is_over(&connection, &self.0.acpx.tag(&target.name)).await => {
                    return Prompted::Over(connection.end().await);
                }
                Heard::Ended => return Prompted::Ended(connection),
                Heard::Stop => return Prompted::Over(connection.kill().await),
            }
        }
    }
}

/// What the agent is told of the answer to its question.
fn answer_to(Settled { question, answer, .. }: &Settled) -> Value {
    let result = if question.is_elicitation {
        match &answer.option_id {
            Some(_) if question.is_allowed(answer) => {
                json!({"action": "accept", "content": answer.answers.clone().unwrap_or_else(|| json!({}))})
            }
            Some(_) => json!({"action": "decline"}),
            None => json!({"action": "cancel"}),
        }
    } else {
        match &answer.option_id {
            Some(id) => json!({"outcome": {"outcome": "selected", "optionId": id}}),
            None => json!({"outcome": {"outcome": "cancelled"}}),
        }
    };
    json!({"jsonrpc": "2.0", "id": question.agent_id, "result": result})
}

/// Whether a line says that the request of this id failed.
fn is_refusal(line: &[u8], id: i64) -> bool {
    let Message { id: answered, method, all } = Message::read(line);
    method.is_none() && answered == id && all["error"].is_object()
}

/// Answers what the agent asks, if it asks. Gives the answer.
fn answer(connection: &mut Connection, line: &[u8], permissions: &str, cancelled: bool) -> Option<Vec<u8>> {
    // Most lines are no requests, and some are large.
    if !line.windows(8).any(|part| part == b"\"method\"") {
        return None;
    }
    let Message { id, method, all } = Message::read(line);
    if id.is_null() {
        return None;
    }
    Some(match method?.as_str() {
        ELICITATION => connection.send(&json!({"jsonrpc": "2.0", "id": id, "result": {"action": "cancel"}})),
        "session/request_permission" => {
            let outcome = if cancelled { json!({"outcome": "cancelled"}) } else { choose(&all["params"], permissions) };
            connection.send(&json!({"jsonrpc": "2.0", "id": id, "result": {"outcome": outcome}}))
        }
        _ => connection.refuse(&id),
    })
}

/// What the session's permissions say to a question: once, never for always, which is wider than its label.
fn choose(question: &Value, permissions: &str) -> Value {
    let reads = matches!(question["toolCall"]["kind"].as_str(), Some("read" | "search"));
    let allowed = permissions == APPROVE_ALL || (permissions == "approve-reads" && reads);
    let wanted = if allowed { "allow_once" } else { "reject_once" };
    let option = question["options"].as_array().into_iter().flatten().find(|option| option["kind"] == wanted);
    match option.map(|option| &option["optionId"]) {
        Some(id) => json!({"outcome": "selected", "optionId": id}),
        None => json!({"outcome": "cancelled"}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_decide_once_and_never_for_always() {
        let question = |kind: &str| {
            json!({"toolCall": {"kind": kind}, "options": [
                {"kind": "allow_always", "optionId": "always"}, {"kind": "allow_once", "optionId": "yes"}, {"kind": "reject_once", "optionId": "no"},
            ]})
        };
        for (permissions, kind, option) in [
            ("approve-all", "execute", "yes"),
            ("approve-reads", "read", "yes"),
            ("approve-reads", "search", "yes"),
            ("approve-reads", "edit", "no"),
            ("approve-reads", "execute", "no"),
            ("deny-all", "read", "no"),
        ] {
            assert_eq!(choose(&question(kind), permissions)["optionId"], option, "{permissions} {kind}");
        }
        assert_eq!(
            choose(&json!({"options": [{"kind": "allow_always", "optionId": "always"}]}), "approve-all"),
            json!({"outcome": "cancelled"})
        );
    }
}
