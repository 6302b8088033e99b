// OpenAI's and Anthropic's libraries for Node, and the Vercel AI SDK.

import assert from "node:assert/strict";
import { test } from "node:test";

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import Anthropic from "@anthropic-ai/sdk";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const { CLAWDFORGE_URL: url, CLAWDFORGE_TOKEN: token } = process.env;
const png = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP4z8CAFWEXHbQSACj/P8Fu7N9hAAAAAElFTkSuQmCC";
const pdf = Buffer.from("%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n%%EOF\n").toString("base64");
const words = "It is a long way to the sea, and a longer one back. ".repeat(3);
const told = (directive) => `stub: ${JSON.stringify(directive)}`;
const echo = told({ echo: true });
// Two calls at once, then one, then the whole request as the answer.
const steps = told({
  tools: [
    [{ name: "get_weather", input: { city: "Oslo" } }, { name: "get_weather", input: { city: "Rome" } }],
    [{ name: "get_weather", input: { city: "Bonn" } }],
  ],
  echo: true,
});
const weather = { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false };
const rain = ({ city }) => `rain in ${city}`;

// What a reply that echoes the request says of it, without what the CLI says of itself.
function reached(text) {
  const request = JSON.parse(text);
  const messages = request.messages
    .filter((message) => message.role !== "system")
    .map(({ role, content }) => {
      const blocks = typeof content === "string" ? [{ type: "text", text: content }] : content;
      return { role, content: blocks.filter((block) => !block.text?.startsWith("<system-reminder>")).map(({ cache_control, ...block }) => block) };
    });
  return { request, system: request.system.slice(2).map((block) => block.text).join(""), messages };
}

function checkSteps(text) {
  const { request, messages } = reached(text);
  const kinds = messages.map(({ role, content }) => [role, ...content.map((block) => block.type)]);
  assert.deepEqual(kinds, [
    ["user", "text"],
    ["assistant", "tool_use", "tool_use"],
    ["user", "tool_result", "tool_result"],
    ["assistant", "tool_use"],
    ["user", "tool_result"],
  ]);
  const blocks = messages.flatMap(({ content }) => content);
  const calls = blocks.filter((block) => block.type === "tool_use");
  const results = blocks.filter((block) => block.type === "tool_result");
  assert.deepEqual(calls.map((call) => call.id), results.map((result) => result.tool_use_id));
  const given = results.map(({ content }) => (typeof content === "string" ? content : content[0].text));
  assert.deepEqual(given.map((text) => text.split("\n\n<system-reminder>")[0]), ["rain in Oslo", "rain in Rome", "rain in Bonn"]);
  assert.deepEqual(request.tools.map(({ name }) => name), ["get_weather"]);
}

function checkFiles(text) {
  const kinds = reached(text).messages[0].content.map((block) => [block.type, block.source?.data]);
  assert.deepEqual(kinds, [["text", undefined], ["image", png], ["document", pdf]]);
}

async function checkCancelled() {
  const deadline = Date.now() + 20_000;
  for (;;) {
    const answer = await fetch(`${url}/runs?limit=1`, { headers: { authorization: `Bearer ${token}` } });
    const [run] = (await answer.json()).runs;
    if (!["queued", "running"].includes(run.status)) return assert.equal(run.status, "cancelled");
    assert.ok(Date.now() < deadline, "the run goes on");
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: token });
const anthropic = new Anthropic({ baseURL: url, apiKey: token });
const user = (content) => [{ role: "user", content }];

test("openai: plain, with what came before", async () => {
  const messages = [{ role: "system", content: "You are Mio." }, ...user("hi"), { role: "assistant", content: "hello" }, ...user(echo)];
  const answer = await openai.chat.completions.create({ model: "sonnet", messages });
  const sent = reached(answer.choices[0].message.content);
  assert.equal(sent.system, "You are Mio.");
  assert.deepEqual(sent.messages.map(({ role, content }) => [role, content[0].text]), [["user", "hi"], ["assistant", "hello"], ["user", echo]]);
});

test("openai: streamed", async () => {
  const pieces = [];
  const stream = await openai.chat.completions.create({ model: "sonnet", messages: user(told({ text: words, pace_ms: 5 })), stream: true });
  for await (const chunk of stream) pieces.push(chunk.choices[0]?.delta.content ?? "");
  assert.equal(pieces.join(""), words);
  assert.ok(pieces.length > 5);
});

test("openai: three steps with tools", async () => {
  const runner = openai.chat.completions.runTools({
    model: "sonnet",
    messages: user(steps),
    tools: [{ type: "function", function: { name: "get_weather", description: "Weather", parameters: weather, parse: JSON.parse, function: rain } }],
  });
  checkSteps(await runner.finalContent());
});

test("openai: image, PDF and schema", async () => {
  const content = [
    { type: "text", text: echo },
    { type: "image_url", image_url: { url: `data:image/png;base64,${png}` } },
    { type: "file", file: { filename: "a.pdf", file_data: `data:application/pdf;base64,${pdf}` } },
  ];
  const response_format = { type: "json_schema", json_schema: { name: "legs", schema: weather, strict: true } };
  const answer = await openai.chat.completions.create({ model: "sonnet", messages: user(content), response_format });
  checkFiles(answer.choices[0].message.content);
  assert.deepEqual(reached(answer.choices[0].message.content).request.output_config.format, { type: "json_schema", schema: weather });
});

test("openai: responses", async () => {
  const stream = openai.responses.stream({ model: "sonnet", input: told({ text: words, pace_ms: 5 }) });
  const first = await stream.finalResponse();
  assert.equal(first.output_text, words);
  const next = await openai.responses.create({ model: "sonnet", input: echo, previous_response_id: first.id });
  const { messages } = reached(next.output_text);
  assert.deepEqual(messages.map(({ role }) => role), ["user", "assistant", "user"]);
  assert.equal(messages[1].content[0].text, words);
});

test("openai: cancel and errors", async () => {
  const stream = await openai.chat.completions.create({ model: "sonnet", messages: user(told({ bytes: 4000, pace_ms: 20 })), stream: true });
  for await (const _ of stream) break;
  await checkCancelled();
  const failing = (status) => openai.chat.completions.create({ model: "sonnet", messages: user(told({ error: status })) });
  await assert.rejects(failing(400), OpenAI.BadRequestError);
  await assert.rejects(failing(429), OpenAI.RateLimitError);
  await assert.rejects(failing(529), OpenAI.InternalServerError);
  await assert.rejects(new OpenAI({ baseURL: `${url}/v1`, apiKey: "cf_no" }).models.list(), OpenAI.AuthenticationError);
});

test("anthropic: plain and streamed", async () => {
  const messages = [...user("hi"), { role: "assistant", content: "hello" }, ...user(echo)];
  const answer = await anthropic.messages.create({ model: "sonnet", max_tokens: 99, system: "You are Mio.", messages });
  const sent = reached(answer.content[0].text);
  assert.equal(sent.system, "You are Mio.");
  assert.deepEqual(sent.messages.map(({ role, content }) => [role, content[0].text]), [["user", "hi"], ["assistant", "hello"], ["user", echo]]);
  const pieces = [];
  const stream = anthropic.messages.stream({ model: "sonnet", max_tokens: 99, messages: user(told({ text: words, pace_ms: 5 })) });
  stream.on("text", (piece) => pieces.push(piece));
  assert.equal(await stream.finalText(), words);
  assert.ok(pieces.length > 5);
});

test("anthropic: three steps with tools, by their runner", async () => {
  const run = async (input) => rain(input);
  const tools = [{ type: "custom", name: "get_weather", description: "Weather", input_schema: weather, run, parse: (input) => input }];
  const answer = await anthropic.beta.messages.toolRunner({ model: "sonnet", max_tokens: 500, tools, messages: user(steps) });
  checkSteps(answer.content[0].text);
});

test("anthropic: image, PDF and schema", async () => {
  const file = (type, media_type, data) => ({ type, source: { type: "base64", media_type, data } });
  const content = [{ type: "text", text: echo }, file("image", "image/png", png), file("document", "application/pdf", pdf)];
  const output_config = { format: { type: "json_schema", schema: weather } };
  const answer = await anthropic.messages.create({ model: "sonnet", max_tokens: 99, messages: user(content), output_config });
  checkFiles(answer.content[0].text);
  assert.deepEqual(reached(answer.content[0].text).request.output_config.format, output_config.format);
});

test("anthropic: cancel and errors", async () => {
  const stream = await anthropic.messages.create({ model: "sonnet", max_tokens: 9, messages: user(told({ bytes: 4000, pace_ms: 20 })), stream: true });
  for await (const _ of stream) break;
  await checkCancelled();
  const failing = (status) => anthropic.messages.create({ model: "sonnet", max_tokens: 9, messages: user(told({ error: status })) });
  await assert.rejects(failing(400), Anthropic.BadRequestError);
  await assert.rejects(failing(429), Anthropic.RateLimitError);
  await assert.rejects(failing(529), Anthropic.InternalServerError);
  await assert.rejects(new Anthropic({ baseURL: url, apiKey: "cf_no" }).models.list(), Anthropic.AuthenticationError);
});

const providers = {
  responses: createOpenAI({ baseURL: `${url}/v1`, apiKey: token }).responses("sonnet"),
  "chat completions": createOpenAICompatible({ name: "clawdforge", baseURL: `${url}/v1`, apiKey: token, supportsStructuredOutputs: true })("sonnet"),
  messages: createAnthropic({ baseURL: `${url}/v1`, apiKey: token })("sonnet"),
};
for (const [api, model] of Object.entries(providers)) {
  test(`ai over ${api}: plain and streamed`, async () => {
    const { text } = await generateText({ model, system: "You are Mio.", prompt: echo });
    const sent = reached(text);
    assert.equal(sent.system, "You are Mio.");
    assert.deepEqual(sent.messages.map(({ role, content }) => [role, content[0].text]), [["user", echo]]);
    const pieces = [];
    const stream = streamText({ model, prompt: told({ text: words, pace_ms: 5 }) });
    for await (const piece of stream.textStream) pieces.push(piece);
    assert.equal(pieces.join(""), words);
    assert.ok(pieces.length > 5);
  });

  test(`ai over ${api}: three steps with tools`, async () => {
    const tools = { get_weather: tool({ description: "Weather", inputSchema: z.object({ city: z.string() }), execute: async (input) => rain(input) }) };
    const { text } = await generateText({ model, prompt: steps, tools, stopWhen: stepCountIs(4) });
    checkSteps(text);
  });

  test(`ai over ${api}: image and PDF`, async () => {
    const content = [
      { type: "text", text: echo },
      { type: "image", image: Buffer.from(png, "base64"), mediaType: "image/png" },
      { type: "file", data: Buffer.from(pdf, "base64"), mediaType: "application/pdf", filename: "a.pdf" },
    ];
    const { text } = await generateText({ model, messages: [{ role: "user", content }] });
    checkFiles(text);
  });

  test(`ai over ${api}: schema`, async () => {
    // Over messages the SDK asks some models by a tool, others by the format.
    const prompts = [told({ text: '{"legs": 8}' }), told({ tool: { name: "json", input: { legs: 8 } } })];
    const answers = prompts.map((prompt) => generateObject({ model, schema: z.object({ legs: z.number() }), prompt, maxRetries: 0 }));
    const { object } = await Promise.any(answers);
    await Promise.allSettled(answers);
    assert.deepEqual(object, { legs: 8 });
  });

  test(`ai over ${api}: cancel and an error`, async () => {
    const cancel = new AbortController();
    const stream = streamText({ model, prompt: told({ bytes: 4000, pace_ms: 20 }), abortSignal: cancel.signal, onError: () => {} });
    for await (const _ of stream.textStream) {
      cancel.abort();
      break;
    }
    await checkCancelled();
    await assert.rejects(generateText({ model, prompt: told({ error: 400 }) }), { statusCode: 400 });
  });
}

