// openai for Node: chats whole and streaming, JSON by a schema, tools, text completions, the Responses API, models.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const hello = { model, temperature: 0, messages: [{ role: "user", content: "Hello" }] };
const animal = {
  type: "object",
  properties: { kind: { enum: ["cat", "dog"] }, legs: { enum: [2, 4] } },
  required: ["kind", "legs"],
  additionalProperties: false,
};

assert.equal((await client.models.list()).data[0].id, model);

const whole = await client.chat.completions.create(hello);
const said = whole.choices[0].message.content;
assert.equal(said, "Hi there! How are you?");

let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...hello, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(streamed, said);

const form = { type: "json_schema", json_schema: { name: "animal", schema: animal, strict: true } };
const parsed = await client.chat.completions.parse({ ...hello, response_format: form });
assert.ok([2, 4].includes(JSON.parse(parsed.choices[0].message.content).legs));

const tools = [{ type: "function", function: { name: "describe", parameters: animal } }];
const called = await client.chat.completions.create({ ...hello, tools, tool_choice: "required", parallel_tool_calls: false });
assert.equal(called.choices[0].finish_reason, "tool_calls");
assert.ok([2, 4].includes(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).legs));

const text = await client.completions.create({ model, prompt: "Hello", max_tokens: 3 });
assert.equal(text.usage.completion_tokens, 3);

const ask = { model, input: "Hello", temperature: 0 };
assert.equal((await client.responses.create(ask)).output_text, said);
const kinds = [];
for await (const event of await client.responses.create({ ...ask, stream: true })) kinds.push(event.type);
assert.deepEqual([kinds[0], kinds.at(-1)], ["response.created", "response.completed"]);

await assert.rejects(client.chat.completions.create({ ...hello, temperature: 9 }), OpenAI.BadRequestError);
console.log("models, chat, stream, json_schema, tools, completion, responses, errors");
