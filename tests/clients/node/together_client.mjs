// The official together-ai package against TOGETHER_BASE_URL (which ends in /v1 here, unlike in Python): models, chat,
// stream, errors. Exits non-zero at the first surprise.
import assert from "node:assert/strict";
import Together from "together-ai";

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
console.log("passed");
