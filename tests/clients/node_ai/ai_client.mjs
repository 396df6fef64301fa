// Vercel's `ai` with the providers of OpenAI-compatible servers and of Together: text, streams, tools in a loop,
// objects, errors, retry, cancel. It checks every chunk against a schema of its own. Exits non-zero at the first surprise.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createTogetherAI } from "@ai-sdk/togetherai";
import { APICallError, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { checkArguments, FLAKY_URL, MESSAGES, SERVER_KEY, SERVER_URL, waitForRunning, withTwoCalls } from "./common.mjs";

const model = process.argv[2];
const require = createRequire(import.meta.url);
const names = ["ai", "@ai-sdk/openai-compatible", "@ai-sdk/togetherai"];
console.log(names.map((name) => `${name} ${require(`${name}/package.json`).version}`).join(", "));

const makers = {
  "openai-compatible": (baseURL, apiKey) =>
    createOpenAICompatible({ name: "lfm", baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: true }),
  togetherai: (baseURL, apiKey) => createTogetherAI({ baseURL, apiKey }),
};
const Place = z.object({ city: z.enum(["Bern", "Thun"]), days: z.number().int().min(0).max(9) });

for (const [name, make] of Object.entries(makers)) {
  const did = (what) => console.log(`  ${name}: ${what}`);
  const common = { model: make(`${SERVER_URL}/v1`, SERVER_KEY)(model), messages: MESSAGES, maxRetries: 0 };

  const whole = await generateText({ ...common, seed: 1, maxOutputTokens: 24 });
  const stream = streamText({ ...common, seed: 1, maxOutputTokens: 24 });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, whole.text);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  did("stream");

  const asked = [];
  const weather = tool({
    description: "Say how warm it is.",
    inputSchema: Place,
    execute: async (given) => {
      checkArguments(given);
      asked.push(given);
      return "21 degrees";
    },
  });
  const calling = { ...common, tools: { weather }, toolChoice: "required", maxOutputTokens: 600 };
  const { answer, seed } = await withTwoCalls(
    (seed) => generateText({ ...calling, seed, stopWhen: stepCountIs(2) }),
    (answer) => answer.steps[0].toolCalls.length,
  );
  assert.equal(answer.steps.length, 2);
  assert.ok(asked.length > 1);
  did(`parallel calls: ${answer.steps[0].toolCalls.length}, results returned over ${answer.steps.length} steps`);

  const streamed = streamText({ ...calling, seed });
  const parts = [];
  for await (const part of streamed.fullStream) parts.push(part.type);
  const calls = await streamed.toolCalls;
  assert.deepEqual(calls.map((call) => call.input), answer.steps[0].toolCalls.map((call) => call.input));
  assert.ok(parts.filter((type) => type === "tool-input-delta").length >= calls.length);
  assert.ok(!parts.includes("error"));
  did("calls streamed");

  // Together's provider sends no schema for a model that its own list lacks, only that JSON is wanted.
  const hasSchema = name !== "togetherai";
  const output = hasSchema ? Output.object({ schema: Place }) : Output.json();
  const parsed = (await generateText({ ...common, output, seed: 1, maxOutputTokens: 600 })).output;
  if (hasSchema) Place.parse(parsed);
  else assert.equal(typeof parsed, "object");
  did(hasSchema ? "structured parse" : "JSON");

  const status = (code) => (error) => APICallError.isInstance(error) && error.statusCode === code;
  await assert.rejects(generateText({ ...common, model: make(`${SERVER_URL}/v1`, "wrong")(model) }), status(401));
  await assert.rejects(generateText({ ...common, model: make(`${SERVER_URL}/v1`, SERVER_KEY)("no/model") }), status(404));
  did("errors");

  const flaky = make(`${FLAKY_URL}/ai-${name}/v1`, SERVER_KEY)(model);
  const retried = await generateText({ ...common, model: flaky, maxRetries: 1, maxOutputTokens: 4 });
  assert.ok(retried.usage.outputTokens <= 4);
  did("retry after a 503");

  const controller = new AbortController();
  const long = streamText({ ...common, maxOutputTokens: 3000, abortSignal: controller.signal, onError: () => {} });
  for await (const piece of long.textStream) {
    if (piece) break;
  }
  controller.abort();
  await waitForRunning(0);
  did("cancel");
}
console.log("passed");
