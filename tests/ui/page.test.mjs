// What an operator does on the page, in a headless Chromium.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { after, before, describe, test } from "node:test";
import { admin, launch, signIn, url } from "./browser.mjs";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
let browser;
before(async () => { browser = await launch(); });

// A page of its own. What is wrong in its console, or goes to another host, is a failure.
const wrong = [];
after(async () => {
  await browser.close();
  assert.deepEqual(wrong, []);
});
async function open(options = {}, expected = []) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  const note = (what) => { if (!expected.some((words) => what.includes(words))) wrong.push(what); };
  page.on("console", (message) => { if (message.type() === "error") note(`console: ${message.text()}`); });
  page.on("pageerror", (error) => note(`error: ${error}`));
  page.on("request", (request) => { if (!request.url().startsWith(`${url}/`)) note(`request: ${request.url()}`); });
  return page;
}

async function signedIn(options, expected) {
  const page = await open(options, expected);
  await signIn(page);
  return page;
}

// The page's own answer, without the page.
const call = (method, path, token, body) =>
  fetch(`${url}${path}`, { method, headers: { authorization: `Bearer ${token}`, "content-type": "application/json" }, body: body && JSON.stringify(body) });

async function mint(name, more = {}) {
  const answer = await call("POST", "/admin/tokens", admin, { name, ...more });
  assert.equal(answer.status, 200);
  return (await answer.json()).token;
}

async function inBackground(token, prompt) {
  const answer = await fetch(`${url}/run`, {
    method: "POST",
    headers: { authorization: `Bearer ${token}`, "content-type": "application/json", prefer: "respond-async" },
    body: JSON.stringify({ prompt }),
  });
  assert.equal(answer.status, 202);
  return (await answer.json()).run_id;
}

// Most of the time they wait.
describe("the page", { concurrency: 4 }, () => {
  test("one signs in with the operator's token alone, and out", async () => {
    const page = await open({}, ["401"]);
    await page.goto(`${url}/ui/runs?status=failed`);
    await page.getByLabel("The operator's token").fill("not-the-token-of-anyone");
    await page.getByRole("button", { name: "Sign in" }).click();
    await page.getByRole("alert").getByText("not the operator's token").waitFor();
    await page.getByLabel("The operator's token").fill(admin);
    await page.getByRole("button", { name: "Sign in" }).click();
    await page.getByRole("heading", { name: "Runs" }).waitFor();
    assert.equal(page.url(), `${url}/ui/runs?status=failed`);
    const [cookie] = await page.context().cookies();
    assert.deepEqual([cookie.httpOnly, cookie.sameSite, cookie.path, cookie.secure], [true, "Strict", "/ui", false]);
    const hours = (cookie.expires - Date.now() / 1000) / 3600;
    assert.ok(hours > 11.9 && hours <= 12, `${hours}`);
    await page.getByRole("button", { name: "Sign out" }).click();
    await page.getByRole("heading", { name: "Sign in" }).waitFor();
    // A cookie that was kept is good no more.
    await page.context().addCookies([cookie]);
    await page.goto(`${url}/ui`);
    await page.getByRole("heading", { name: "Sign in" }).waitFor();
  });

  test("a token is minted, shown once, changed, rotated, and revoked after asking", async () => {
    const page = await signedIn({}, ["422"]);
    await page.getByRole("link", { name: "Apps" }).click();
    await page.getByLabel("Name").fill(`"it's <b>`);
    await page.getByRole("button", { name: "Mint a token" }).click();
    await page.getByRole("alert").getByText("the name must match").waitFor();
    assert.equal(await page.getByLabel("Name").inputValue(), `"it's <b>`);
    await page.getByLabel("Name").fill("kitchen");
    await page.getByLabel("May be used from").fill("127.0.0.0/8, ::1");
    await page.getByLabel("Dollars a day").fill("1.50");
    await page.getByRole("button", { name: "Mint a token" }).click();
    await page.getByText("only time that it is shown").waitFor();
    const token = await page.getByLabel("Token", { exact: true }).inputValue();
    assert.match(token, /^cf_[0-9a-f]{64}$/);
    const line = await page.getByLabel("A line to paste").inputValue();
    assert.ok(line.startsWith(`curl -s ${url}/run `) && line.includes(token), line);
    await page.getByRole("button", { name: "Copy" }).first().click();
    await page.getByRole("button", { name: "Copied" }).waitFor();
    assert.equal((await call("GET", "/runs", token)).status, 200);

    await page.getByRole("link", { name: "To the apps" }).click();
    await page.getByRole("row", { name: /kitchen.*\$0\.00 of \$1\.50/ }).waitFor();
    assert.ok(!(await page.content()).includes(token));
    await page.getByRole("link", { name: "kitchen", exact: true }).click();
    await page.getByLabel("May be used from").fill("10.0.0.0/40");
    await page.getByRole("button", { name: "Change" }).click();
    await page.getByRole("alert").getByText("10.0.0.0/40").waitFor();
    await page.getByLabel("May be used from").fill("");
    await page.getByLabel("Dollars a day").fill("");
    await page.getByLabel("Runs and turns at once").fill("2");
    await page.getByRole("button", { name: "Change" }).click();
    await page.waitForURL(`${url}/ui/apps/kitchen`);
    assert.equal(await page.getByLabel("Runs and turns at once").inputValue(), "2");
    const { tokens } = await (await call("GET", "/admin/tokens", admin)).json();
    const known = tokens.find((one) => one.name === "kitchen");
    assert.deepEqual([known.ip_cidrs, known.daily_usd, known.max_concurrent], ["", null, 2]);

    await page.getByLabel("The old one is good").selectOption("not at all");
    await page.getByRole("button", { name: "Give it a new token" }).click();
    const second = await page.getByLabel("Token", { exact: true }).inputValue();
    assert.deepEqual([(await call("GET", "/runs", token)).status, (await call("GET", "/runs", second)).status], [401, 200]);

    await page.getByRole("link", { name: "To the apps" }).click();
    await page.getByRole("link", { name: "Revoke kitchen" }).click();
    assert.equal((await call("GET", "/runs", second)).status, 200);
    await page.getByRole("button", { name: "Revoke it" }).click();
    await page.getByRole("row", { name: /kitchen revoked/ }).waitFor();
    assert.equal((await call("GET", "/runs", second)).status, 401);
  });

  test("a run is seen live to its end", async () => {
    await mint("garden");
    const page = await signedIn();
    await page.getByRole("link", { name: "Try it" }).click();
    await page.getByLabel("As").selectOption("garden");
    const tool = { name: "Read", input: { file_path: "/etc/hostname" } };
    await page.getByLabel("Prompt", { exact: true }).fill(`stub: ${JSON.stringify({ tool, pace_ms: 0 })}`);
    await page.getByRole("button", { name: "Run" }).click();
    await page.getByRole("heading", { name: "Answer" }).waitFor();
    await page.getByText("As it came").click();
    await page.getByText("It calls Read").waitFor();

    const words = Array.from({ length: 60 }, (_, at) => `word ${at}`).join(", ");
    await page.goto(`${url}/ui/try`);
    await page.getByLabel("As").selectOption("garden");
    await page.getByLabel("Prompt", { exact: true }).fill(`stub: ${JSON.stringify({ text: words, pace_ms: 100 })}`);
    await page.getByRole("button", { name: "Run" }).click();
    await page.locator(".events").getByText("word 3,").waitFor();
    // It grows in its place, on the page that was loaded once.
    await page.evaluate(() => { window.loadedOnce = true; });
    const early = await page.locator(".events").innerText();
    assert.ok(!early.includes("word 59"), early);
    await page.locator(".events").getByText("word 20,").waitFor();
    await page.getByRole("heading", { name: "Answer" }).waitFor();
    assert.equal(await page.locator("pre.answer").innerText(), words);
    assert.equal(await page.evaluate(() => window.loadedOnce), true);
    await page.getByText("succeeded").first().waitFor();
  });

  test("what goes on is on the overview, live, and can be cancelled", async () => {
    const token = await mint("slow");
    const page = await signedIn();
    await page.getByText("Going on now").waitFor();
    const id = await inBackground(token, `stub: {"delay_ms": 60000}`);
    await page.getByRole("row", { name: /slow 1 0 0/ }).waitFor();
    await page.locator("section", { hasText: "Going on now" }).getByRole("link").first().click();
    await page.waitForURL(`${url}/ui/runs/${id}`);
    await page.getByRole("button", { name: "Cancel" }).click();
    await page.locator("h1", { hasText: "cancelled" }).waitFor();
    assert.equal((await (await call("GET", `/runs/${id}`, token)).json()).status, "cancelled");
  });

  test("runs are filtered", async () => {
    const [one, other] = [await mint("one"), await mint("other")];
    for (const [token, body] of [
      [one, { prompt: "What grows in the Shade?" }],
      [one, { prompt: `stub: {"error": 400}`, model: "opus" }],
      [other, { prompt: "What grows in the sun?" }],
    ]) await call("POST", "/run", token, body);
    const page = await signedIn();
    const found = async (fill) => {
      await page.goto(`${url}/ui/runs`);
      await fill();
      await page.getByRole("button", { name: "Filter" }).click();
      await page.waitForURL(/\?/);
      return page.locator("tbody tr td:nth-child(5)").allInnerTexts();
    };
    const app = (name) => page.getByLabel("App").selectOption(name);
    assert.deepEqual(await found(() => app("one")), [`stub: {"error": 400}`, "What grows in the Shade?"]);
    assert.deepEqual(await found(async () => { await app("one"); await page.getByLabel("Status").selectOption("failed"); }), [`stub: {"error": 400}`]);
    assert.deepEqual(await found(async () => { await app("one"); await page.getByLabel("Model").fill("opus"); }), [`stub: {"error": 400}`]);
    assert.deepEqual(await found(() => page.getByLabel("Text of the prompt").fill("the shade")), ["What grows in the Shade?"]);
    assert.deepEqual(await found(async () => { await app("other"); await page.getByLabel("To", { exact: true }).fill("2020-01-01"); }), []);
    await page.getByText("There are no such runs").waitFor();
    const today = new Date().toISOString().slice(0, 10);
    assert.deepEqual(await found(async () => { await app("other"); await page.getByLabel("From").fill(today); }), ["What grows in the sun?"]);
    assert.deepEqual(await found(async () => { await app("other"); await page.getByLabel("Took at least, seconds").fill("3600"); }), []);
    await page.goto(`${url}/ui`);
    await page.locator("section", { hasText: "What went wrong" }).getByText("API Error: 400").first().waitFor();
  });

  test("prompts and answers are text, whatever stands in them", async () => {
    const token = await mint("stranger");
    const attack = `<script>window.attacked = 1</script><img src=x onerror="window.attacked = 1">"'&</pre></main>`;
    const answer = await call("POST", "/run", token, { prompt: `${attack}\nstub: ${JSON.stringify({ text: attack })}`, model: "sonnet" });
    assert.equal((await answer.json()).result, attack);
    const id = answer.headers.get("x-run-id");
    const session = await (await call("POST", "/sessions", token, {})).json();
    await call("POST", `/sessions/${session.session_id}/turn`, token, { prompt: `${attack}\nstub: ${JSON.stringify({ text: attack })}` });
    const page = await signedIn();
    for (const path of [`/ui/runs/${id}`, "/ui/runs?app=stranger", `/ui/sessions/${session.session_id}`, `/ui/sessions/${session.session_id}/turns/1`, "/ui"]) {
      await page.goto(`${url}${path}`);
      await page.getByText("window.attacked").first().waitFor({ timeout: path === "/ui" ? 1 : 5000 }).catch((error) => { if (path !== "/ui") throw error; });
      assert.equal(await page.evaluate(() => window.attacked), undefined, path);
      assert.equal(await page.locator("main img, main script").count(), 0, path);
    }
    await page.goto(`${url}/ui/runs/${id}`);
    assert.equal(await page.locator("pre.answer").innerText(), attack);
    await page.goto(`${url}/ui/runs?text=${encodeURIComponent(attack)}`);
    assert.equal(await page.getByLabel("Text of the prompt").inputValue(), attack);
  });

  test("a session is a conversation that is followed, and closed", async () => {
    const token = await mint("talker");
    const session = await (await call("POST", "/sessions", token, { model: "sonnet" })).json();
    const turns = `/sessions/${session.session_id}/turn`;
    await call("POST", turns, token, { prompt: "My name is Mio." });
    const page = await signedIn();
    await page.goto(`${url}/ui/sessions?app=talker&state=open`);
    await page.locator("tbody a").click();
    await page.getByText("My name is Mio.").waitFor();
    const words = Array.from({ length: 200 }, (_, at) => `word ${at}`).join(", ");
    const turn = call("POST", turns, token, { prompt: `stub: ${JSON.stringify({ text: words, pace_ms: 100 })}` });
    await page.locator(".events").getByText("word 5,").waitFor();
    await page.locator(".events").getByText("word 9,").waitFor();
    await page.getByRole("button", { name: "Cancel the turn" }).click();
    await page.locator("h1", { hasText: "cancelled" }).waitFor();
    await turn;
    await page.getByRole("link", { name: "Its session" }).click();
    await page.getByRole("button", { name: "Close the session" }).click();
    await page.getByText("closed", { exact: true }).waitFor();
    assert.equal((await call("POST", turns, token, { prompt: "And now?" })).status, 410);
  });

  test("usage is drawn, and there as CSV", async () => {
    const token = await mint("user");
    await call("POST", "/run", token, { prompt: "Hello." });
    const page = await signedIn();
    await page.goto(`${url}/ui/usage?by=model&app=user`);
    await page.getByRole("img", { name: "Runs and turns" }).waitFor();
    await page.locator("#jobs-title + ul").getByText("sonnet").waitFor();
    await page.locator("figure", { hasText: "Runs and turns" }).getByText("The numbers").click();
    await page.getByRole("columnheader", { name: "sonnet" }).first().waitFor();
    await page.getByLabel("Time", { exact: true }).selectOption("the last 24 hours");
    await page.getByRole("button", { name: "Show" }).click();
    await page.getByRole("img", { name: "How long they took" }).waitFor();
    const download = page.waitForEvent("download");
    await page.getByRole("link", { name: "what was used" }).click();
    const csv = readFileSync(await (await download).path(), "utf8");
    assert.match(csv, /^start_utc,model,jobs,failed,input_tokens,cached_tokens,output_tokens,cost_usd\r\n\d{4}-\d\d-\d\d \d\d:00,sonnet,1,0,\d+,\d+,\d+,[\d.e-]+\r\n$/);
    const times = page.waitForEvent("download");
    await page.getByRole("link", { name: "how long it took" }).click();
    assert.match(readFileSync(await (await times).path(), "utf8"), /^start_utc,median_ms,.*\r\n\d{4}-\d\d-\d\d \d\d:00,\d+,\d+,\d+,\d+\r\n$/);
  });

  test("every page is in order, on a phone and a wide screen, by day and by night", async () => {
    const token = await mint("viewer", { daily_usd: 2, ip_cidrs: ["127.0.0.0/8"] });
    const id = (await call("POST", "/run", token, { prompt: "Hello." })).headers.get("x-run-id");
    await call("POST", "/run", token, { prompt: `stub: {"error": 401}` });
    const session = await (await call("POST", "/sessions", token, {})).json();
    await call("POST", `/sessions/${session.session_id}/turn`, token, { prompt: `A word that is long: ${"x".repeat(300)}` });
    const paths = ["", "/runs", `/runs/${id}`, "/sessions", `/sessions/${session.session_id}`, `/sessions/${session.session_id}/turns/1`,
      "/usage", "/usage?days=1&by=model", "/apps", "/apps/viewer", "/apps/viewer/revoke", "/try", "/nothing"];
    for (const [width, colorScheme] of [[390, "dark"], [1440, "light"]]) {
      const page = await signedIn({ viewport: { width, height: 900 }, colorScheme }, ["404"]);
      for (const path of [...paths, "/sign-in"]) {
        await page.goto(`${url}/ui${path}`);
        await page.evaluate(axe);
        const { violations } = await page.evaluate(() => axe.run());
        const told = violations.filter(({ impact }) => ["serious", "critical"].includes(impact)).map(({ id, nodes }) => [id, nodes.map(({ html }) => html)]);
        assert.deepEqual(told, [], `${path} at ${width}, ${colorScheme}`);
        const [inner, whole] = await page.evaluate(() => [window.innerWidth, document.documentElement.scrollWidth]);
        assert.ok(whole <= inner, `${path} at ${width} is ${whole} wide`);
      }
      await page.context().close();
    }
  });

  test("without a script everything is there, less live", async () => {
    const token = await mint("plain");
    const page = await signedIn({ javaScriptEnabled: false });
    const id = await inBackground(token, `stub: ${JSON.stringify({ text: Array.from({ length: 300 }, (_, at) => `word ${at}`).join(", "), pace_ms: 100 })}`);
    await page.goto(`${url}/ui/runs/${id}`);
    while (!(await page.locator(".events").innerText()).includes("word 3")) await page.reload();
    await page.getByRole("button", { name: "Cancel" }).click();
    await page.locator("h1", { hasText: "cancelled" }).waitFor();
    await page.getByRole("link", { name: "Apps" }).click();
    await page.getByLabel("Name").fill("plainer");
    await page.getByRole("button", { name: "Mint a token" }).click();
    assert.match(await page.getByLabel("Token", { exact: true }).inputValue(), /^cf_/);
    await page.getByRole("button", { name: "Sign out" }).click();
    await page.getByRole("heading", { name: "Sign in" }).waitFor();
  });
});
