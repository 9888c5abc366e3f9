// The calls of Vercel's AI SDK against a running server: `node calls.mjs URL` in a folder with `ai` and
// `@ai-sdk/openai-compatible`. Prints a JSON line for each call, as calls.py does.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(process.cwd() + "/");
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { generateText, streamText } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const version = require("@ai-sdk/openai-compatible/package.json").version;

const url = process.argv[2];
const name = (await (await fetch(`${url}/v1/models`)).json()).data[0].id;
const model = createOpenAICompatible({ name: "textgen", baseURL: `${url}/v1` }).completionModel(name);
const asked = { model, prompt: "The plot was", maxOutputTokens: 8, seed: 1, temperature: 0.8, maxRetries: 0 };
const calls = {
  complete: async () => (await generateText(asked)).text,
  stream: async () => {
    let text = "";
    for await (const piece of streamText(asked).textStream) text += piece;
    return text;
  },
};
for (const [call, action] of Object.entries(calls)) {
  const outcome = await action().then((result) => ({ result }), (error) => ({ error: String(error).slice(0, 300) }));
  console.log(JSON.stringify({ client: "@ai-sdk/openai-compatible", version, call, ...outcome }));
}
