// openai-node, unchanged, against a server; README.md says how to start both.
//     npm install --prefix scripts/clients
//     node scripts/clients/openai_node.js http://127.0.0.1:8123

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI, { APIError, AuthenticationError, BadRequestError, NotFoundError, RateLimitError } from "openai";

const [url, apiKey = "secret"] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "Tell me a story about a llama." }];
const chat = { model, messages, max_tokens: 20, seed: 7 };
const completion = { model, prompt: "Once upon a time", max_tokens: 20, seed: 7 };

const collect = async (stream) => {
  const found = [];
  for await (const item of stream) found.push(item);
  return found;
};
const contents = (chunks, index = 0) =>
  chunks.flatMap((chunk) => chunk.choices.filter((choice) => choice.index === index))
    .map((choice) => choice.delta?.content ?? choice.text ?? "").join("");

test("models: listed, and found by name", async () => {
  assert.equal((await client.models.retrieve(model)).id, model);
});

test("chat: an answer with its usage", async () => {
  const answer = await client.chat.completions.create(chat);
  assert.equal(answer.object, "chat.completion");
  assert.equal(answer.choices[0].message.role, "assistant");
  assert.ok(answer.choices[0].message.content.length > 0);
  const { prompt_tokens, completion_tokens, total_tokens } = answer.usage;
  assert.ok(prompt_tokens > 0 && completion_tokens > 0 && completion_tokens <= 20);
  assert.equal(total_tokens, prompt_tokens + completion_tokens);
});

test("chat: a stream is the same answer, and ends with the same usage", async () => {
  const answer = await client.chat.completions.create(chat);
  const chunks = await collect(
    await client.chat.completions.create({ ...chat, stream: true, stream_options: { include_usage: true } }));
  assert.equal(contents(chunks), answer.choices[0].message.content);
  assert.equal(chunks.filter((chunk) => chunk.choices[0]?.delta.role).length, 1);
  assert.equal(chunks.at(-2).choices[0].finish_reason, answer.choices[0].finish_reason);
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.deepEqual(chunks.at(-1).usage, answer.usage);
  assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
});

test("chat: without include_usage, a stream has no usage", async () => {
  const chunks = await collect(await client.chat.completions.create({ ...chat, stream: true }));
  assert.ok(chunks.every((chunk) => !chunk.usage && chunk.choices.length === 1));
});

test("chat: the client's stream helper puts an answer together", async () => {
  const stream = client.chat.completions.stream(chat);
  const answer = await client.chat.completions.create(chat);
  assert.equal(await stream.finalContent(), answer.choices[0].message.content);
});

test("completions: a text, several, and token ids", async () => {
  const answer = await client.completions.create(completion);
  assert.equal(answer.object, "text_completion");
  const two = await client.completions.create({ ...completion, prompt: ["Once upon a time", "The sea"] });
  assert.deepEqual(two.choices.map((choice) => choice.index), [0, 1]);
  assert.equal(two.choices[0].text, answer.choices[0].text);
  const ids = await client.completions.create({ ...completion, prompt: [100, 200, 300] });
  assert.equal(ids.usage.prompt_tokens, 3);
});

test("completions: a stream is the same answer", async () => {
  const answer = await client.completions.create(completion);
  const chunks = await collect(await client.completions.create({ ...completion, stream: true }));
  assert.equal(contents(chunks), answer.choices[0].text);
});

test("responses: an answer, and its stream", async () => {
  const asked = { model, input: "Tell me a story.", instructions: "Be brief.", max_output_tokens: 20, temperature: 0 };
  const answer = await client.responses.create(asked);
  assert.ok(answer.output_text.length > 0);
  assert.ok(answer.usage.output_tokens > 0 && answer.usage.output_tokens <= 20);
  const events = await collect(await client.responses.create({ ...asked, stream: true }));
  const text = events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta);
  assert.equal(text.join(""), answer.output_text);
  assert.equal(events[0].type, "response.created");
  assert.ok(["response.completed", "response.incomplete"].includes(events.at(-1).type));
  assert.deepEqual(events.map((event) => event.sequence_number), events.map((_, index) => index));
  const final = await client.responses.stream(asked).finalResponse();
  assert.equal(final.output_text, answer.output_text);
});

test("responses: previous messages, given whole", async () => {
  const first = await client.responses.create({ model, input: "Hi!", max_output_tokens: 10, temperature: 0 });
  const input = [{ role: "user", content: "Hi!" }, ...first.output, { role: "user", content: "And you?" }];
  const second = await client.responses.create({ model, input, max_output_tokens: 10, temperature: 0 });
  assert.ok(second.usage.input_tokens > first.usage.input_tokens);
});

test("logprobs: plain and streamed, of a chat", async () => {
  const asked = { ...chat, logprobs: true, top_logprobs: 2 };
  const [choice] = (await client.chat.completions.create(asked)).choices;
  const bytes = choice.logprobs.content.flatMap((token) => token.bytes);
  assert.ok(Buffer.from(bytes).toString().startsWith(choice.message.content));
  for (const token of choice.logprobs.content) {
    assert.ok(token.logprob <= 0);
    assert.equal(token.top_logprobs.length, 2);
  }
  const chunks = await collect(await client.chat.completions.create({ ...asked, stream: true }));
  assert.deepEqual(chunks.flatMap((chunk) => chunk.choices[0]?.logprobs?.content ?? []), choice.logprobs.content);
});

test("logprobs: plain and streamed, of a completion, with its prompt's", async () => {
  const asked = { ...completion, logprobs: 2, echo: true };
  const [choice] = (await client.completions.create(asked)).choices;
  assert.ok(choice.text.startsWith(completion.prompt));
  assert.equal(choice.logprobs.token_logprobs[0], null);
  assert.ok(choice.logprobs.token_logprobs.slice(1).every((logprob) => logprob <= 0));
  const chunks = await collect(await client.completions.create({ ...asked, stream: true }));
  for (const name of ["tokens", "token_logprobs", "text_offset"])
    assert.deepEqual(chunks.flatMap((chunk) => chunk.choices[0]?.logprobs?.[name] ?? []), choice.logprobs[name]);
});

test("n: three distinct answers, plain and streamed", async () => {
  const asked = { ...chat, n: 3, temperature: 1 };
  const answers = (await client.chat.completions.create(asked)).choices.map((choice) => choice.message.content);
  assert.equal(new Set(answers).size, 3);
  const chunks = await collect(await client.chat.completions.create({ ...asked, stream: true }));
  assert.deepEqual([0, 1, 2].map((index) => contents(chunks, index)), answers);
});

test("seed: the same one repeats an answer, none draws anew", async () => {
  const ask = async (seed) =>
    (await client.chat.completions.create({ ...chat, temperature: 1, seed })).choices[0].message.content;
  assert.equal(await ask(7), await ask(7));
  assert.notEqual(await ask(7), await ask(8));
  assert.notEqual(await ask(undefined), await ask(undefined));
});

test("stop: the answer ends before the text", async () => {
  const whole = (await client.completions.create({ ...completion, temperature: 0 })).choices[0].text;
  const stop = whole.slice(10, 14);
  const [choice] = (await client.completions.create({ ...completion, temperature: 0, stop: [stop] })).choices;
  assert.equal(choice.text, whole.slice(0, whole.indexOf(stop)));
  assert.equal(choice.finish_reason, "stop");
});

test("400: a bad value, and a prompt that is too long", async () => {
  const fails = (changes) => client.chat.completions.create({ ...chat, ...changes });
  await assert.rejects(fails({ temperature: -1 }), (error) => {
    assert.ok(error instanceof BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  await assert.rejects(fails({ messages: [{ role: "user", content: "llama ".repeat(20_000) }] }), (error) => {
    assert.ok(error instanceof BadRequestError);
    assert.equal(error.code, "context_length_exceeded");
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...chat, stream: true, top_p: 2 }), BadRequestError);
});

test("401: a wrong key", async () => {
  const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.chat.completions.create(chat), AuthenticationError);
});

test("404: an unknown model, and an endpoint that is missing", async () => {
  await assert.rejects(client.chat.completions.create({ ...chat, model: "gpt-4" }), NotFoundError);
  await assert.rejects(client.embeddings.create({ model, input: "Hi" }), NotFoundError);
});

test("413: a body that is too large", async () => {
  const content = "llama ".repeat(20_000_000);
  await assert.rejects(client.chat.completions.create({ ...chat, messages: [{ role: "user", content }] }), (error) => {
    assert.ok(error instanceof APIError);
    assert.equal(error.status, 413);
    return true;
  });
});

test("429: more requests than may wait", async () => {
  const asked = { ...completion, max_tokens: 100, ignore_eos: true };
  const results = await Promise.allSettled(Array.from({ length: 64 }, () => client.completions.create(asked)));
  const refused = results.filter((result) => result.status === "rejected").map((result) => result.reason);
  assert.ok(refused.length > 0 && refused.length < 64);
  for (const error of refused) {
    assert.ok(error instanceof RateLimitError);
    assert.ok(Number(error.headers.get("retry-after")) > 0);
  }
});
