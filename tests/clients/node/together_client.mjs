// The official together-ai package against TOGETHER_BASE_URL (which ends in /v1 here, unlike in Python): models, chat,
// stream, tools, structured answers, errors, retry, cancel. Exits non-zero at the first surprise.
import assert from "node:assert/strict";
import Together from "together-ai";
import { addCallPieces, checkArguments, FLAKY_URL, MESSAGES, TOOL, waitForRunning, withTwoCalls } from "./common.mjs";

const model = process.argv[2];
const client = new Together({ maxRetries: 0 });
const request = {
  model,
  messages: [{ role: "user", content: "Count to three." }],
  max_tokens: 12,
  seed: 7,
};

const models = await client.models.list();
assert.ok(Array.isArray(models), "Together's clients want a bare array of models");
assert.deepEqual(models.map((item) => item.id), [model]);
assert.equal(models[0].object, "model");
assert.equal(models[0].type, "chat");

const completion = await client.chat.completions.create(request);
assert.equal(completion.object, "chat.completion");
assert.deepEqual(completion.prompt, []);
assert.equal(typeof completion.choices[0].message.content, "string");
assert.ok(["stop", "length"].includes(completion.choices[0].finish_reason));
assert.equal(completion.usage.total_tokens, completion.usage.prompt_tokens + completion.usage.completion_tokens);

let text = "";
let finishReason = null;
let usage = null;
const stream = await client.chat.completions.create({ ...request, stream: true });
for await (const chunk of stream) {
  for (const choice of chunk.choices) {
    assert.equal(choice.delta.role, "assistant");
    text += choice.delta.content ?? "";
    finishReason = choice.finish_reason ?? finishReason;
  }
  usage = chunk.usage ?? usage;
}
assert.equal(text, completion.choices[0].message.content);
assert.equal(finishReason, completion.choices[0].finish_reason);
assert.equal(usage.completion_tokens, completion.usage.completion_tokens);

await assert.rejects(client.chat.completions.create({ ...request, model: "no/such-model" }), Together.NotFoundError);
await assert.rejects(client.chat.completions.create({ ...request, messages: [] }), Together.BadRequestError);
await assert.rejects(
  new Together({ apiKey: "wrong", maxRetries: 0 }).chat.completions.create(request),
  Together.AuthenticationError,
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

const results = message.tool_calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: "21 degrees" }));
const after = await client.chat.completions.create({
  ...calling,
  messages: [...MESSAGES, message, ...results],
  tool_choice: "none",
  max_tokens: 8,
});
assert.ok(["stop", "length"].includes(after.choices[0].finish_reason));

const helper = client.chat.completions.stream({ ...calling, seed }); // throws if a role, id or name is missing
assert.equal((await helper.finalMessage()).tool_calls.length, message.tool_calls.length);

const structured = await client.chat.completions.create({
  model,
  messages: MESSAGES,
  response_format: { type: "json_schema", json_schema: { name: "place", schema: TOOL.function.parameters } },
  max_tokens: 600,
  seed: 1,
});
checkArguments(JSON.parse(structured.choices[0].message.content));

const flaky = new Together({ baseURL: `${FLAKY_URL}/together-node/v1`, maxRetries: 1 });
assert.equal((await flaky.chat.completions.create({ ...request, max_tokens: 1 })).usage.completion_tokens, 1);

const long = await client.chat.completions.create({ ...request, max_tokens: 3000, ignore_eos: true, stream: true });
for await (const chunk of long) {
  if (chunk.choices[0]?.delta?.content) break; // leaving the loop aborts the request
}
await waitForRunning(0);
console.log("passed");
