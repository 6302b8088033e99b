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
function good<T>(answer: { data?: T; error?: unknown; response: Response }): T {
  if (answer.data === undefined) throw new Error(`${answer.response.status}: ${JSON.stringify(answer.error)}`);
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
const gone = await app.POST("/sessions/{id}/turn", { params: { path }, body: { prompt: "hello" } });
assert(gone.response.status === 410, "a turn of a closed session");

console.log("The generated client used every endpoint.");
