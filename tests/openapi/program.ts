// Uses every endpoint through types that were generated from /openapi.json.

import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

declare const process: { env: Record<string, string | undefined> };
const { CLAWDFORGE_URL: baseUrl = "", CLAWDFORGE_TOKEN = "", CLAWDFORGE_ADMIN_TOKEN = "" } = process.env;
const client = (token: string) => createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${token}` } });
const app = client(CLAWDFORGE_TOKEN);
const operator = client(CLAWDFORGE_ADMIN_TOKEN);

function assert(condition: boolean, what: string): asserts condition {
  if (!condition) throw new Error(what);
}
function good<T>(answer: { data?: T; error?: unknown; response: Response }): NonNullable<T> {
  if (answer.data === undefined || answer.data === null) throw new Error(`${answer.response.status}: ${JSON.stringify(answer.error)}`);
  return answer.data;
}

const health: components["schemas"]["Health"] = good(await app.GET("/healthz"));
assert(health.ok && health.claude_version !== null, "healthz");

const minted = good(await operator.POST("/admin/tokens", { body: { name: "typescript", ip_cidrs: ["127.0.0.0/8"] } }));
const listed = good(await operator.GET("/admin/tokens")).tokens.find(({ name }) => name === minted.name);
assert(listed?.ip_cidrs === "127.0.0.0/8" && listed.last_used === null, "the token's row");
assert(good(await operator.DELETE("/admin/tokens/{name}", { params: { path: { name: minted.name } } })).ok, "revoke");

const run = await app.POST("/run", { body: { prompt: 'stub: {"text": "[1, 2]"}' } });
assert(JSON.stringify(good(run).result) === "[1,2]", "a run's value");
assert(run.response.headers.get("x-run-id") !== null, "a run's id");

const background = await app.POST("/run", { body: { prompt: "hello" }, params: { header: { Prefer: "respond-async", "Idempotency-Key": "once" } } });
assert(background.response.status === 202, "a run in the background");
const run_id = background.response.headers.get("x-run-id") ?? "";
const runPath = { path: { id: run_id } };
const stream = await app.GET("/runs/{id}/events", { params: runPath, parseAs: "text" });
assert(String(good(stream)).includes("event: result"), "a run's events");
assert(good(await app.GET("/runs/{id}", { params: runPath })).status === "succeeded", "a run's state");
assert(good(await app.DELETE("/runs/{id}", { params: runPath })).already_over, "a run's cancelling");
assert(good(await app.GET("/runs", { params: { query: { limit: 1 } } })).runs[0]?.run_id === run_id, "a list of runs");
assert(good(await app.GET("/usage")).usage.length > 0, "usage");
assert(good(await operator.GET("/admin/runs")).count > 0, "every app's runs");
assert(good(await operator.GET("/admin/usage")).cost_usd >= 0, "every app's usage");
assert(String(good(await operator.GET("/metrics", { parseAs: "text" }))).includes("clawdforge_requests_total"), "metrics");

const failed = await app.POST("/run", { body: { prompt: 'stub: {"error": 401}' } });
assert(failed.response.status === 502 && failed.error !== undefined, "a run that fails");
// What the error is follows from its type: a failure of the agent, or a problem.
assert("error" in failed.error && failed.error.error.includes("401"), "the failure's own words");
const refused = await app.POST("/run", { body: { prompt: "hello", timeout_secs: 1 } });
assert(refused.error !== undefined && "detail" in refused.error, "a problem");
assert(refused.error.errors?.[0]?.pointer === "/timeout_secs", "where the problem is");

const form = new FormData();
form.append("file", new Blob(["the cellar door"]), "note.txt");
const upload = good(
  await app.POST("/files", {
    params: { query: { ttl_secs: 600 } },
    body: { file: "" },
    bodySerializer: () => form,
  }),
);
assert(upload.size === 15 && upload.ttl_secs === 600, "an upload");

const session = good(await app.POST("/sessions", { body: { model: "haiku", meta: { for: ["supper", 2] } } }));
assert(session.meta !== null && Array.isArray(session.meta["for"]), "meta is any object");
const path = { id: session.session_id };
const turn = good(await app.POST("/sessions/{id}/turn", { params: { path }, body: { prompt: "hello", files: [upload.file_token] } }));
const spoken = turn.events.filter((event) => event.type === "text").map((event) => event.content ?? "");
assert(turn.turn_index === 1 && spoken.join("") === turn.text && turn.text.length > 0, "a turn");
assert(good(await app.GET("/sessions/{id}", { params: { path } })).turn_count === 1, "a session's state");
assert(!good(await app.DELETE("/sessions/{id}", { params: { path } })).already_closed, "a close");
const open = good(await app.GET("/sessions", { params: { query: { include_closed: false } } }));
assert(open.sessions.every(({ session_id }) => session_id !== session.session_id), "a list");
const first = { path: { ...path, turn: 1 } };
assert(good(await app.GET("/sessions/{id}/turns/{turn}", { params: first })).status === "succeeded", "a turn's state");
assert(good(await app.DELETE("/sessions/{id}/turns/{turn}", { params: first })).already_over, "a turn's cancelling");
assert(String(good(await app.GET("/sessions/{id}/turns/{turn}/events", { params: first, parseAs: "text" }))).includes("event: result"), "a turn's events");
assert(good(await app.POST("/sessions/{id}/cancel", { params: { path } })).cancelled === 0, "a session's cancelling");
const gone = await app.POST("/sessions/{id}/turn", { params: { path }, body: { prompt: "hello" } });
assert(gone.response.status === 410, "a turn of a closed session");

const messages = [{ role: "user", content: "hello" }];
const chat = good(await app.POST("/v1/chat/completions", { body: { model: "sonnet", messages, temperature: 0.5 } }));
assert(JSON.stringify(chat).includes("chat.completion"), "a chat completion");
const message = good(await app.POST("/v1/messages", { body: { model: "sonnet", max_tokens: 99, messages } }));
assert(JSON.stringify(message).includes("end_turn"), "a message");
assert(good(await app.POST("/v1/messages/count_tokens", { body: { model: "sonnet", max_tokens: 99, messages } })).estimated, "an estimate");
const kept = { params: { path: { id: (good(await app.POST("/v1/responses", { body: { model: "sonnet", input: "hello" } })) as { id: string }).id } } };
assert(JSON.stringify(good(await app.GET("/v1/responses/{id}", kept))).includes("completed"), "a response");
assert(JSON.stringify(good(await app.DELETE("/v1/responses/{id}", kept))).includes("deleted"), "a response's deletion");
assert(JSON.stringify(good(await app.GET("/v1/models"))).includes("sonnet"), "the models");
assert(JSON.stringify(good(await app.GET("/v1/models/{id}", { params: { path: { id: "sonnet" } } }))).includes("sonnet"), "a model");

console.log("The generated client used every endpoint.");
