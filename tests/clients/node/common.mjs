// What the programs of this folder share: a tool, seeds that are tried until the model makes two calls at once, and a
// look at the server's own metrics. Random weights write nonsense: what is well formed is so because of the grammar.
import assert from "node:assert/strict";

export const CITIES = ["Bern", "Thun"];
export const MESSAGES = [{ role: "user", content: "How warm is it in Bern and in Thun?" }];
export const TOOL = {
  type: "function",
  function: {
    name: "weather",
    description: "Say how warm it is.",
    parameters: {
      type: "object",
      properties: { city: { type: "string", enum: CITIES }, days: { type: "integer", minimum: 0, maximum: 9 } },
      required: ["city", "days"],
      additionalProperties: false,
    },
  },
};
export const { SERVER_URL, SERVER_KEY, FLAKY_URL } = process.env;

export function checkArguments(given) {
  assert.deepEqual(Object.keys(given).sort(), ["city", "days"]);
  assert.ok(CITIES.includes(given.city), given.city);
  assert.ok(Number.isInteger(given.days) && given.days >= 0 && given.days <= 9, given.days);
}

/** The first answer of `ask(seed)` of which `count` finds more than one call. */
export async function withTwoCalls(ask, count) {
  for (let seed = 1; seed < 40; seed += 1) {
    const answer = await ask(seed);
    if (count(answer) > 1) return { answer, seed };
  }
  throw new Error("no seed gave two calls");
}

/** Pieces of streamed calls, put together by their index. */
export function addCallPieces(calls, pieces) {
  for (const piece of pieces ?? []) {
    assert.equal(typeof piece.index, "number");
    const call = (calls[piece.index] ??= { id: "", name: "", arguments: "" });
    call.id = piece.id ?? call.id;
    call.name += piece.function?.name ?? "";
    call.arguments += piece.function?.arguments ?? "";
  }
}

async function numRunning() {
  const response = await fetch(`${SERVER_URL}/metrics`, { headers: { Authorization: `Bearer ${SERVER_KEY}` } });
  const lines = (await response.text()).split("\n").filter((line) => line.startsWith("vllm:num_requests_running"));
  return lines.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

/** Wait until the server runs so many requests. */
export async function waitForRunning(number) {
  for (const deadline = Date.now() + 20_000; (await numRunning()) !== number; ) {
    assert.ok(Date.now() < deadline, `the server does not come to run ${number} requests`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
