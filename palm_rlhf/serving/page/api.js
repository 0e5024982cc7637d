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

/** Returns the models of the server. */
export async function listModels(key) {
    const response = await ask("v1/models", {}, key);
    const models = parsed(await response.text())?.data;
    if (!models?.length) throw new ServerError("The server has no model to talk to.", 0);
    return models;
}

/**
 * Yields the pieces of a reply as they come: `{ text, finish }`; the last piece has the reason why the reply ends.
 *
 * After the last piece of a reply that breaks off, ServerError is thrown, or AbortError where `signal` ended it.
 */
export async function* streamReply(body, key, signal) {
    const headers = { "Content-Type": "application/json" };
    const request = { method: "POST", headers, body: JSON.stringify({ ...body, stream: true }), signal };
    const response = await ask("v1/chat/completions", request, key);
    for await (const data of events(response.body)) {
        if (data === "[DONE]") return;
        const chunk = parsed(data);
        if (chunk?.error) throw new ServerError(chunk.error.message ?? "The server broke off the reply.", 200);
        const choice = chunk?.choices?.[0];
        if (choice) yield { text: choice.delta?.content ?? "", finish: choice.finish_reason ?? null };
    }
    throw new ServerError("The connection was lost before the reply had ended.", 0);
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
        throw new ServerError(words(response, error?.message), response.status, error?.code);
    }
    return response;
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
