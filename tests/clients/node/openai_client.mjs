// The official openai package against OPENAI_BASE_URL: models, chat, stream, tools, structured parse, errors, retry,
// cancel. Exits non-zero at the first surprise.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { addCallPieces, checkArguments, FLAKY_URL, MESSAGES, TOOL, waitForRunning, withTwoCalls } from "./common.mjs";

const model = process.argv[2];
const client = new OpenAI({ maxRetries: 0 });
const request = {
  model,
  messages: [{ role: "user", content: "Count to three." }],
  max_tokens: 12,
  seed: 7,
};

const models = await client.models.list();
assert.deepEqual(models.data.map((item) => item.id), [model]);

const completion = await client.chat.completions.create(request);
assert.equal(completion.object, "chat.completion");
assert.equal(completion.model, model);
assert.equal(completion.choices.length, 1);
assert.equal(typeof completion.choices[0].message.content, "string");
assert.ok(["stop", "length"].includes(completion.choices[0].finish_reason));
assert.ok(completion.usage.prompt_tokens > 0);
assert.equal(completion.usage.total_tokens, completion.usage.prompt_tokens + completion.usage.completion_tokens);

let text = "";
let finishReason = null;
let usage = null;
const stream = await client.chat.completions.create({
  ...request,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  finishReason = chunk.choices[0]?.finish_reason ?? finishReason;
  usage = chunk.usage ?? usage;
}
assert.equal(text, completion.choices[0].message.content);
assert.equal(finishReason, completion.choices[0].finish_reason);
assert.equal(usage.completion_tokens, completion.usage.completion_tokens);

await assert.rejects(client.chat.completions.create({ ...request, model: "no/such-model" }), OpenAI.NotFoundError);
await assert.rejects(client.chat.completions.create({ ...request, messages: [] }), OpenAI.BadRequestError);
await assert.rejects(
  new OpenAI({ apiKey: "wrong", maxRetries: 0 }).chat.completions.create(request),
  OpenAI.AuthenticationError,
);

const calling = { model, messages: MESSAGES, tools: [TOOL], tool_choice: "required", max_tokens: 600 };
const { answer, seed } = await withTwoCalls(
  (seed) => client.chat.completions.create({ ...calling, seed }),
  (answer) => answer.choices[0].message.tool_calls.length,
);
const message = answer.choices[0].message;
assert.equal(answer.choices[0].finish_reason, "tool_calls");
for (const call of message.tool_calls) checkArguments(JSON.parse(call.function.arguments));

const streamedCalls = [];
for await (const chunk of await client.chat.completions.create({ ...calling, seed, stream: true })) {
  addCallPieces(streamedCalls, chunk.choices[0]?.delta?.tool_calls);
}
assert.deepEqual(
  streamedCalls.map((call) => [call.name, call.arguments]),
  message.tool_calls.map((call) => [call.function.name, call.function.arguments]),
);
assert.equal(new Set(streamedCalls.map((call) => call.id)).size, streamedCalls.length);

const results = message.tool_calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: "21 degrees" }));
const after = await client.chat.completions.create({
  ...calling,
  messages: [...MESSAGES, message, ...results],
  tool_choice: "none",
  max_tokens: 8,
});
assert.equal(after.choices[0].message.tool_calls, undefined);
assert.ok(after.usage.prompt_tokens_details.cached_tokens > 0);

const asked = [];
const runner = client.chat.completions.runTools(
  {
    ...calling,
    seed,
    tool_choice: { type: "function", function: { name: "weather" } }, // this helper ends after a named call
    tools: [{ type: "function", function: { ...TOOL.function, parse: JSON.parse, function: (given) => asked.push(given) } }],
  },
  { maxChatCompletions: 1 },
);
await runner.done();
assert.ok(asked.length >= 1);
asked.forEach(checkArguments);

const Place = z.object({ city: z.enum(["Bern", "Thun"]), isHigh: z.boolean() });
const parsed = await client.chat.completions.parse({
  model,
  messages: MESSAGES,
  response_format: zodResponseFormat(Place, "place"),
  max_tokens: 600,
  seed: 1,
});
Place.parse(parsed.choices[0].message.parsed);

const flaky = new OpenAI({ baseURL: `${FLAKY_URL}/openai-node/v1`, maxRetries: 1 });
assert.equal((await flaky.chat.completions.create({ ...request, max_tokens: 1 })).usage.completion_tokens, 1);

const long = await client.chat.completions.create({ ...request, max_tokens: 3000, ignore_eos: true, stream: true });
for await (const chunk of long) {
  if (chunk.choices[0]?.delta?.content) break; // leaving the loop aborts the request
}
await waitForRunning(0);
console.log("passed");
