/** Export and import of conversations: a line of JSON each, `{"messages": [...]}`, which `palm-rlhf data` reads too. */

import { isConversation } from "./store.js";

/** Offers the conversations as a file to download. */
export function exportConversations(conversations) {
    const lines = conversations
        .filter(({ messages }) => messages.length)
        .map(({ messages }) => ({ messages: messages.map(({ role, content }) => ({ role, content })) }));
    const text = lines.map((line) => `${JSON.stringify(line)}\n`).join("");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
    link.download = `conversations-${new Date().toISOString().slice(0, 10)}.jsonl`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Returns the messages of each conversation in a file. Throws an Error with the number of a line that has none. */
export function readConversations(text) {
    const lines = text.replace(/^\uFEFF/, "").split(/\r?\n/);
    const found = [];
    lines.forEach((line, index) => {
        if (!line.trim()) return;
        const value = parsed(line);
        if (!isConversation(value)) {
            const form = '{"messages": [{"role": ..., "content": ...}]}';
            throw new Error(`Line ${index + 1} is no conversation: expected ${form}.`);
        }
        found.push(value.messages.map(({ role, content }) => ({ role, content })));
    });
    if (!found.length) throw new Error("The file holds no conversation.");
    return found;
}

function parsed(line) {
    try {
        return JSON.parse(line);
    } catch {
        return null;
    }
}
