//! A run by an agent other than claude: a conversation of one turn, whose folder goes with it.
//!
//! Their programs have one-shot modes, too. The protocol says more (the reply as it comes, tools, questions), says it in one way for
//! all, and lets one be started ahead.

use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use serde_json::Value;

use super::{Direct, Unclaimed};
use crate::agent::acpx::command::Target;
use crate::agent::contract::{Ending, Event, Outcome, Setup, Spec, Usage};
use crate::agent::control::{Control, Emit, Report};
use crate::agent::folder::unprepared;
use crate::agent::turn::QUESTION;
use crate::agent::warm_pool::{Pool, WarmKey};

/// Runs by agents that are spoken to directly. Clones share them.
#[derive(Clone)]
pub struct Runs {
    direct: Direct,
    warm: Pool,
}

impl Runs {
    /// Runs by these agents, of which the pool may have started one ahead.
    pub fn new(direct: Direct, warm: Pool) -> Self {
        Self { direct, warm }
    }

    /// Makes a folder ready, or takes over one in which the agent waits already. It is nobody's session, so a start after a crash takes it
    /// away.
    pub async fn prepare(&self, setup: &Setup) -> io::Result<Target> {
        match self.warm.take_session(setup).await {
            Some(Unclaimed { target, connection, .. }) => {
                self.direct.keep_idle(&target, connection);
                Ok(target)
            }
            None => self.direct.make_unclaimed(setup).await,
        }
    }

    /// Has the agent do it. Reports when it has ended; returns when nothing of it is left.
    pub async fn work(&self, target: io::Result<Target>, spec: &Spec, control: Control<'_>, mut report: Report) {
        let target = match target {
            Ok(target) => target,
            Err(error) => return report.say(Outcome::of(Ending::Unprepared(unprepared(&error)))),
        };
        let (hold, calls) = (Mutex::new(Some(self.warm.hold())), Mutex::new(Calls::default()));
        let emit = |event| {
            drop(lock(&hold).take());
            lock(&calls).tell(event, control.emit);
        };
        let take = self.direct.take(&target, None, spec, Control { emit: &emit, ..control });
        // A defect must not cost more than its own run.
        if let Ok(outcome) = AssertUnwindSafe(take).catch_unwind().await {
            let Outcome { ending, text, usage, facts, stderr, duration, .. } = outcome;
            if matches!(ending, Ending::Completed(_)) {
                self.warm.used(WarmKey::Session(target.setup.clone()));
            }
            let usage = Usage { cost_usd: facts.total_cost_usd, ..usage };
            report.say(Outcome { text, usage, stderr, duration, ..Outcome::of(ending) });
        }
        self.abandon(target).await;
    }

    /// Ends what works in the folder, and takes it away.
    pub async fn abandon(&self, target: Target) {
        self.direct.end(&target.name).await;
        self.direct.clear_away(&target).await;
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The tool calls of a run. Some agents say first that there is one, and then of what; some say it where they ask for it.
#[derive(Default)]
struct Calls(Vec<Call>);

struct Call {
    id: Value,
    name: Value,
    args: Value,
    told: bool,
}

impl Calls {
    /// Tells of a message of the protocol as the stream of a run does, which has claude's in the same form.
    fn tell(&mut self, event: Event, emit: Emit<'_>) {
        let Event::Acp { kind, message } = event else { return emit(event) };
        let raw = message;
        let Ok(mut message) = serde_json::from_str::<Value>(raw.get()) else { return };
        let content = message["content"].as_str().unwrap_or_default().to_owned();
        let (added, mut update) = (message["name"].take(), message["params"]["update"].take());
        match kind.as_str() {
            "text" => emit(Event::Text { content }),
            "thinking" => emit(Event::Thinking { content }),
            "tool_call" => {
                let own = [&update["name"], &update["_meta"]["toolName"]].into_iter().find(|name| name.is_string()).cloned();
                self.begin(&update, own.unwrap_or(added));
                self.go_on(&update, emit);
            }
            QUESTION => {
                let call = &message["params"]["toolCall"];
                self.begin(call, call["title"].clone());
                // Others were answered by the run's permissions.
                if message["permission_id"].is_string() {
                    emit(Event::PermissionRequest { message: raw });
                }
            }
            "tool_call_update" => {
                let args = update["rawInput"].take();
                if let Some(call) = self.0.iter_mut().find(|call| call.id == update["toolCallId"] && !args.is_null()) {
                    call.args = args;
                }
                self.go_on(&update, emit);
                let Some(status) = update["status"].as_str().filter(|status| matches!(*status, "completed" | "failed")) else { return };
                let status = status.to_owned();
                let result = if update["rawOutput"].is_null() { update["content"].take() } else { update["rawOutput"].take() };
                emit(Event::ToolCallUpdate { id: update["toolCallId"].take(), result, status });
            }
            _ => {}
        }
    }

    fn begin(&mut self, call: &Value, name: Value) {
        let (id, args) = (call["toolCallId"].clone(), call["rawInput"].clone());
        if !id.is_null() && self.0.iter().all(|known| known.id != id) {
            self.0.push(Call { id, name, args, told: false });
        }
    }

    /// Tells of a call that is complete.
    fn go_on(&mut self, update: &Value, emit: Emit<'_>) {
        let is_it = |call: &&mut Call| !call.told && call.id == update["toolCallId"] && update["status"] != "pending";
        for call in self.0.iter_mut().filter(is_it) {
            call.told = true;
            emit(Event::ToolCall { args: call.args.take(), id: call.id.clone(), name: call.name.take() });
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use serde_json::value::to_raw_value;

    use super::*;

    #[test]
    fn a_call_is_told_when_it_is_complete() {
        let update = |kind: &str, update: Value| {
            let message = json!({"method": "session/update", "params": {"update": update}, "type": kind, "name": "the title"});
            Event::Acp { kind: kind.to_owned(), message: to_raw_value(&message).unwrap() }
        };
        let asks = json!({"params": {"toolCall": {"toolCallId": "3", "status": "pending", "title": "rm"}}, "type": QUESTION});
        let asks = Event::Acp { kind: QUESTION.to_owned(), message: to_raw_value(&asks).unwrap() };
        let (mut calls, told) = (Calls::default(), Mutex::new(Vec::new()));
        for event in [
            update("tool_call", json!({"toolCallId": "1", "status": "pending", "rawInput": {}, "_meta": {"toolName": "shell"}})),
            update("tool_call", json!({"toolCallId": "2", "status": "in_progress"})),
            update("available_commands_update", json!({})),
            update("tool_call_update", json!({"toolCallId": "1", "status": "in_progress", "rawInput": {"command": "pwd"}})),
            update("tool_call_update", json!({"toolCallId": "1", "status": "in_progress"})),
            update("tool_call_update", json!({"toolCallId": "1", "status": "completed", "content": ["/"]})),
            update("tool_call_update", json!({"toolCallId": "2", "status": "failed", "rawOutput": {"exit": 1}})),
            asks,
            update("tool_call_update", json!({"toolCallId": "3", "status": "completed"})),
        ] {
            calls.tell(event, &|event| told.lock().unwrap().push(serde_json::to_value(event).unwrap()));
        }
        let data: Vec<_> = told.into_inner().unwrap().into_iter().map(|mut event| event["data"].take()).collect();
        assert_eq!(
            data,
            [
                json!({"args": null, "id": "2", "name": "the title"}),
                json!({"args": {"command": "pwd"}, "id": "1", "name": "shell"}),
                json!({"id": "1", "result": ["/"], "status": "completed"}),
                json!({"id": "2", "result": {"exit": 1}, "status": "failed"}),
                json!({"args": null, "id": "3", "name": "rm"}),
                json!({"id": "3", "result": null, "status": "completed"}),
            ]
        );
    }
}
