/**
 * The data of this tab: conversations, settings and the key, in sessionStorage; light or dark is shared by all tabs.
 *
 * If the user chooses so, conversations and settings are kept in localStorage too, beyond the tab. Several tabs may
 * keep them there: each adds its own, and of a conversation that two tabs have changed the later version stays.
 */

const STATE = "palm-rlhf.state";
const HISTORY = "palm-rlhf.history";
const KEY = "palm-rlhf.key";
const DEFAULTS = { model: null, system: "", temperature: 0.7, topP: 1, maxTokens: null, stop: "", seed: null };

const history = read(localStorage, HISTORY);
const saved = read(sessionStorage, STATE) ?? history ?? {};
const removed = new Set(); // ids that this tab no longer keeps

/**
 * Conversations, the newest first: `{ id, messages, error, changed, leftOut }`. A message has a role, its content and
 * the reason why it ended; `changed` is a time; the first `leftOut` messages no longer fit the context.
 *
 * On a server with feedback a reply has the id by which it is kept there, `answer`, or two answers to choose from:
 * `comparison` is `{ id, sides, chosen }`, where a side has a content, a finish and an answer.
 */
export const conversations = Array.isArray(saved.conversations) ? saved.conversations : [];
export const settings = { ...DEFAULTS, ...saved.settings };
let currentId = saved.currentId;
merge(history?.conversations ?? []);

/** Saves everything; false where there is no room, and new messages will be lost with the tab. */
export function save() {
    try {
        sessionStorage.setItem(STATE, JSON.stringify({ conversations, settings, currentId }));
        if (outlivesTab()) {
            merge(read(localStorage, HISTORY)?.conversations ?? []);
            const filled = conversations.filter(({ messages }) => messages.length);
            localStorage.setItem(HISTORY, JSON.stringify({ conversations: filled, settings }));
        }
        return true;
    } catch {
        return false;
    }
}

/** Whether conversations outlive their tabs; all tabs follow when one of them changes it. */
export function outlivesTab() {
    return localStorage.getItem(HISTORY) !== null;
}

/** Keeps conversations beyond their tabs from the next `save` on, or deletes everything that was kept of any tab. */
export function keepBeyondTab(wanted) {
    if (wanted) localStorage.setItem(HISTORY, "{}");
    else localStorage.removeItem(HISTORY);
}

/** Adds the conversations of another tab, and replaces those that were changed there later. */
function merge(others) {
    for (const other of others) {
        if (!isConversation(other) || removed.has(other.id)) continue;
        const known = conversations.findIndex(({ id }) => id === other.id);
        if (known < 0) conversations.push(other);
        else if ((other.changed ?? 0) > (conversations[known].changed ?? 0)) Object.assign(conversations[known], other);
    }
}

/** Returns the conversation that is shown. */
export function current() {
    return conversations.find((conversation) => conversation.id === currentId) ?? conversations[0] ?? create();
}

/** Shows a conversation. */
export function select(conversation) {
    currentId = conversation.id;
}

/** Notes the time at which a conversation was changed. */
export function touch(conversation) {
    conversation.changed = Date.now();
}

/** Begins a conversation, or returns to one that has no message yet. */
export function create() {
    const conversation = conversations.find(({ messages }) => !messages.length) ?? add([]);
    select(conversation);
    return conversation;
}

/** Adds a new conversation of these messages, before all others. */
export function add(messages) {
    const id = `${Date.now()}-${Math.random()}`; // other tabs make their own at the same time
    const conversation = { id, messages, error: null, changed: Date.now(), leftOut: 0 };
    conversations.unshift(conversation);
    return conversation;
}

/** Deletes a conversation; the function that it returns puts it back. */
export function remove(conversation) {
    const place = conversations.indexOf(conversation);
    conversations.splice(place, 1);
    removed.add(conversation.id);
    return () => {
        removed.delete(conversation.id);
        conversations.splice(Math.min(place, conversations.length), 0, conversation);
    };
}

/** Returns the title of a conversation, its first words. */
export function titleOf(conversation) {
    return conversation.messages[0]?.content.trim().split("\n")[0].slice(0, 80) || "New chat";
}

/** Returns the index of the last message of a role, or -1. */
export function lastIndexOf(messages, role) {
    return messages.findLastIndex((message) => message.role === role);
}

/** Returns the messages to send: the system prompt first, no empty message, and roles that take turns. */
export function messagesFor(conversation) {
    const said = [];
    if (settings.system.trim()) said.push({ role: "system", content: settings.system });
    for (const { role, content } of conversation.messages.slice(conversation.leftOut ?? 0)) {
        if (!content) continue;
        if (said.at(-1)?.role === role) said.at(-1).content += `\n\n${content}`;
        else said.push({ role, content });
    }
    return said;
}

/** Leaves out the oldest exchange that is still sent; false where only the last message of the user is left. */
export function leaveOutOldest(conversation) {
    const last = lastIndexOf(conversation.messages, "user");
    const start = conversation.leftOut ?? 0;
    const next = conversation.messages.findIndex(({ role }, index) => index > start && role === "user");
    if (next < 0 || next > last) return false;
    conversation.leftOut = next;
    return true;
}

/** Returns the key for the server, or null. */
export function key() {
    return sessionStorage.getItem(KEY);
}

/** Keeps a key in this tab, or deletes it. */
export function keepKey(value) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
}

/** Whether a value is a conversation that the page can show. */
export function isConversation(thing) {
    return Array.isArray(thing?.messages) && thing.messages.every(isMessage);
}

function isMessage(thing) {
    return ["system", "user", "assistant"].includes(thing?.role) && typeof thing.content === "string";
}

function read(storage, name) {
    try {
        return JSON.parse(storage.getItem(name));
    } catch {
        return null;
    }
}
