// The Vercel AI SDK, unchanged, against a server; README.md says how to start both.
//     npm install --prefix scripts/clients
//     node scripts/clients/ai_sdk.js http://127.0.0.1:8123

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, streamText } from "ai";
import assert from "node:assert/strict";
import { test } from "node:test";

const [url, apiKey = "secret"] = process.argv.slice(2);
const headers = { Authorization: `Bearer ${apiKey}` };
const { data } = await (await fetch(`${url}/v1/models`, { headers })).json();
const llamajax = createOpenAICompatible({ name: "llamajax", baseURL: `${url}/v1`, apiKey, includeUsage: true });
const asked = {
  system: "You tell short stories.",
  prompt: "Tell me a story about a llama.",
  maxOutputTokens: 20,
  seed: 7,
  maxRetries: 0,
};

for (const [name, model] of [["chat", llamajax(data[0].id)], ["completion", llamajax.completionModel(data[0].id)]]) {
  test(`${name}: an answer with its usage`, async () => {
    const { text, usage } = await generateText({ model, ...asked });
    assert.ok(text.length > 0);
    assert.ok(usage.inputTokens > 0 && usage.outputTokens > 0 && usage.outputTokens <= 20);
  });

  test(`${name}: a stream is the same answer, with the same usage`, async () => {
    const plain = await generateText({ model, ...asked });
    const stream = streamText({ model, ...asked });
    let text = "";
    for await (const piece of stream.textStream) text += piece;
    assert.equal(text, plain.text);
    assert.equal(await stream.finishReason, plain.finishReason);
    assert.equal((await stream.usage).outputTokens, plain.usage.outputTokens);
  });
}

test("a conversation", async () => {
  const messages = [
    { role: "user", content: [{ type: "text", text: "Hi!" }] },
    { role: "assistant", content: "Hello." },
    { role: "user", content: "Name a colour." },
  ];
  const { text } = await generateText({ ...asked, model: llamajax(data[0].id), prompt: undefined, messages });
  assert.ok(text.length > 0);
});

test("an error has the server's message", async () => {
  await assert.rejects(generateText({ ...asked, model: llamajax(data[0].id), topP: 2 }), (error) => {
    assert.ok(APICallError.isInstance(error));
    assert.equal(error.statusCode, 400);
    assert.match(error.message, /top_p/);
    return true;
  });
});
