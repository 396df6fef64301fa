// The official openai package against OPENAI_BASE_URL: models, chat, stream, errors. Exits non-zero at the first surprise.
import assert from "node:assert/strict";
import OpenAI from "openai";

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
console.log("passed");
