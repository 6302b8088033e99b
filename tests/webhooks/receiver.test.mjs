// A receiver that verifies webhooks with the specification's own library. To be run by with-demo.sh.
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { createServer } from "node:http";
import { test } from "node:test";
import { Webhook } from "standardwebhooks";

const { CLAWDFORGE_URL: url, CLAWDFORGE_ADMIN_TOKEN: admin } = process.env;

async function call(path, token, body, headers = {}) {
  const answer = await fetch(url + path, { method: "POST", headers: { authorization: `Bearer ${token}`, "content-type": "application/json", ...headers }, body: JSON.stringify(body) });
  assert.ok(answer.ok, `${path}: ${answer.status}`);
  return answer.json();
}

test("what ends in the background is told and can be verified", { timeout: 60_000 }, async (t) => {
  const came = {};
  came.promise = new Promise((resolve) => { came.resolve = resolve; });
  const server = createServer((request, response) => {
    const pieces = [];
    request.on("data", (piece) => pieces.push(piece));
    request.on("end", () => {
      response.writeHead(204).end();
      came.resolve({ headers: request.headers, body: Buffer.concat(pieces).toString() });
    });
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => server.close());
  const webhook = `http://127.0.0.1:${server.address().port}/hook`;
  const { token, webhook_secret: secret } = await call("/admin/tokens", admin, { name: `hooks-${randomUUID().slice(0, 8)}`, webhook });
  const { run_id: id } = await call("/run", token, { prompt: "Hello." }, { prefer: "respond-async" });
  const { headers, body } = await came.promise;
  const said = new Webhook(secret).verify(body, headers);
  assert.deepEqual([said.type, said.data.run_id, said.data.status, said.data.result], ["run.finished", id, "succeeded", null]);
  assert.throws(() => new Webhook(secret).verify(`${body} `, headers));
});
