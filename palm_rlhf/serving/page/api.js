/** Requests to the server in the chat-completions protocol, and its errors in words. */

/**
 * An error in words for people. `status` is the HTTP status, or 0 where no answer came; `code` is the server's code.
 */
export class ServerError extends Error {
    constructor(message, status, code = null) {
        super(message);
        this.status = status;
        this.code = code;
    }
}

/** Where replies are asked for: the protocol of the server. */
export const PROTOCOL = { path: "v1/chat/completions", headers: {} };

/** Returns the models of the server. */
export async function listModels(key) {
    const response = await ask("v1/models", {}, key);
    const models = parsed(await response.text())?.data;
    if (!models?.length) throw new ServerError("The server has no model to talk to.", 0);
    return models;
}

/**
 * Yields the pieces of a reply as they come: `{ text, finish, side }`; the last piece has the reason why the reply ends.
 * Where two answers come at once, `side` is 0 for the left one and 1 for the right one.
 *
 * `door` is another path than the protocol's, with its headers. Pieces `{ kept }` say what a server with feedback keeps.
 *
 * After the last piece of a reply that breaks off, ServerError is thrown, or AbortError where `signal` ended it.
 */
export async function* streamReply(body, key, signal, door = PROTOCOL) {
    const headers = { "Content-Type": "application/json", ...door.headers };
    const request = { method: "POST", headers, body: JSON.stringify({ ...body, stream: true }), signal };
    const response = await ask(door.path, request, key);
    for await (const data of events(response.body)) {
        if (data === "[DONE]") return;
        const chunk = parsed(data);
        if (chunk?.error) throw new ServerError(chunk.error.message ?? "The server broke off the reply.", 200);
        const choice = chunk?.choices?.[0];
        if (chunk?.feedback) yield { kept: chunk.feedback };
        if (choice) yield { text: choice.delta?.content ?? "", finish: choice.finish_reason ?? null, side: choice.index ?? 0 };
    }
    throw new ServerError("The connection was lost before the reply had ended.", 0);
}

/** Returns the JSON at a path. */
export async function getJson(path, key) {
    return parsed(await (await ask(path, {}, key)).text());
}

/** Sends JSON, and returns the JSON of the reply. */
export async function postJson(path, values, headers, key) {
    const body = JSON.stringify(values);
    const request = { method: "POST", headers: { "Content-Type": "application/json", ...headers }, body };
    return parsed(await (await ask(path, request, key)).text());
}

async function ask(path, request, key) {
    const headers = { ...request.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    let response;
    try {
        response = await fetch(path, { ...request, headers });
    } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError("The server cannot be reached. Is it still running?", 0);
    }
    if (!response.ok) {
        const error = parsed(await response.text())?.error;
        throw new ServerError(words(response, error?.message), statusOf(response, request, error), error?.code);
    }
    return response;
}

/** Returns the status of an error; 403 where a login has ended, for which no key helps. */
function statusOf(response, request, error) {
    const isOfLogin = request.headers?.["X-Form-Token"] && error?.code !== "invalid_api_key";
    return response.status === 401 && isOfLogin ? 403 : response.status;
}

function words(response, said) {
    const seconds = response.headers.get("Retry-After");
    if (response.status === 429) {
        return `The server is busy${seconds ? `; try again in ${seconds} s` : ""}. ${said ?? ""}`.trim();
    }
    return said ?? `The server answered ${response.status} ${response.statusText}`.trim();
}

/** Yields the data of server-sent events, one string for each event. */
async function* events(stream) {
    const reader = stream.getReader();
    const decoder = new TextDecoder();
    let lines = "";
    let data = [];
    try {
        for (;;) {
            const { value, done } = await read(reader);
            lines += decoder.decode(value, { stream: !done });
            const ends = lines.split(/\r\n|\n|\r(?!$)/);
            lines = ends.pop();
            for (const line of ends) {
                if (line === "" && data.length) {
                    yield data.join("\n");
                    data = [];
                } else if (line.startsWith("data:")) {
                    data.push(line.slice(line[5] === " " ? 6 : 5));
                }
            }
            if (done) return;
        }
    } finally {
        reader.cancel().catch(() => {}); // whoever stops listening lets the server stop, too
    }
}

async function read(reader) {
    try {
        return await reader.read();
    } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError("The connection was lost before the reply had ended.", 0);
    }
}

function parsed(text) {
    try {
        return JSON.parse(text);
    } catch {
        return null;
    }
}
