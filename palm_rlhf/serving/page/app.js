/** The logic of the page: requests to the server, and the actions of buttons and keys. */

import { ServerError, listModels, streamReply } from "./api.js";
import { copy } from "./clipboard.js";
import { withKey } from "./dialogs.js";
import { exportConversations, readConversations } from "./files.js";
import * as store from "./store.js";
import { announce, byId, draw, drawModels, drawSoon, isSidebarOpen, noticeScroll, openSidebar } from "./view.js";
import { toEnd, turnPage } from "./view.js";

const input = byId("input");
const running = new Map(); // how to stop the reply that is coming in a conversation
let models = [];
let undo = null; // puts the conversation back that was deleted last
let draft = null; // what the input had before the last message was put there to be edited

/** Asks for the next message; `replaced` is put back where the reply has no text. */
async function reply(conversation, replaced = null) {
    const message = { role: "assistant", content: "", finish: null };
    conversation.messages.push(message);
    await write(conversation, message);
    if (message.content || message.finish !== "stopped") return;
    conversation.messages.splice(-1, 1, ...(replaced ? [replaced] : []));
    keep(conversation);
    redraw();
}

/** Asks for the rest of a reply that was cut. */
function goOn() {
    const conversation = store.current();
    if (running.has(conversation)) return;
    write(conversation, conversation.messages.at(-1));
    input.focus();
}

/** Adds the reply of the server to the last message of a conversation. */
async function write(conversation, message) {
    const controller = new AbortController();
    running.set(conversation, controller);
    conversation.error = null;
    message.finish = null;
    redraw();
    toEnd();
    announce("The assistant is writing.");
    try {
        await withKey(async (key) => {
            if (!models.length) await loadModels(key);
            for await (const { text, finish } of fittingReply(conversation, key, controller.signal)) {
                message.content += text;
                message.finish = finish ?? message.finish;
                if (conversation === store.current()) drawSoon(message);
            }
        });
        announce("The reply is complete.");
    } catch (error) {
        message.finish = "stopped";
        announce("The reply has stopped.");
        if (error.name !== "AbortError") conversation.error = error.message;
        if (error.name !== "AbortError" && !(error instanceof ServerError)) throw error;
    } finally {
        running.delete(conversation);
        keep(conversation);
        redraw();
    }
}

/** Returns the pieces of a reply; the reply continues the last message where that is the assistant's. */
async function* fittingReply(conversation, key, signal) {
    const body = options();
    for (let isCut = true; isCut; ) {
        isCut = false;
        const messages = store.messagesFor(conversation);
        const isBegun = messages.at(-1).role === "assistant";
        const going = isBegun ? { continue_final_message: true, add_generation_prompt: false } : {};
        try {
            for await (const piece of streamReply({ ...body, ...going, messages }, key, signal)) {
                isCut = piece.finish === "length" && !body.max_tokens && makeRoom(conversation, body);
                yield isCut ? { ...piece, finish: null } : piece;
            }
        } catch (error) {
            isCut = error.code === "context_length_exceeded" && makeRoom(conversation, body);
            if (!isCut) throw error;
        }
    }
}

/** Leaves out the oldest exchange, and limits the reply to a quarter of the context; false where none is left. */
function makeRoom(conversation, body) {
    if (!store.leaveOutOldest(conversation)) return false;
    const context = models.find(({ id }) => id === body.model)?.max_model_len;
    if (context) body.max_tokens ??= Math.max(Math.floor(context / 4), 1);
    redraw();
    return true;
}

/** Returns the parameters of a request, beside the messages. */
function options() {
    const { model, temperature, topP, maxTokens, stop, seed } = store.settings;
    const chosen = models.some(({ id }) => id === model) ? model : models[0].id;
    const stops = stop.split("\n").filter(Boolean);
    return {
        model: chosen,
        temperature,
        ...(topP < 1 && { top_p: topP }),
        ...(maxTokens && { max_tokens: maxTokens }),
        ...(stops.length && { stop: stops }),
        ...(seed !== null && { seed }),
    };
}

async function loadModels(key) {
    models = await listModels(key);
    drawModels(models, options().model);
}

function send() {
    const conversation = store.current();
    const content = input.value.trim();
    if (!content || running.has(conversation)) return;
    if (draft !== null) conversation.messages.splice(store.lastIndexOf(conversation.messages, "user"));
    stopEditing("");
    offerUndo(false);
    conversation.messages.push({ role: "user", content });
    reply(conversation);
}

/** Asks again for the last message of the assistant, or for the first time where there is none. */
function regenerate() {
    const conversation = store.current();
    if (running.has(conversation)) return;
    const isSaid = conversation.messages.at(-1)?.role === "assistant";
    reply(conversation, isSaid ? conversation.messages.pop() : null);
    input.focus();
}

function stop() {
    running.get(store.current())?.abort();
    input.focus();
}

/** Puts the last message of the user back into the input; sent again, it replaces the old one and all after it. */
function edit() {
    const conversation = store.current();
    const last = conversation.messages[store.lastIndexOf(conversation.messages, "user")];
    if (!last || running.has(conversation)) return;
    draft ??= input.value;
    byId("editing").hidden = false;
    fill(last.content);
}

function stopEditing(text) {
    draft = null;
    byId("editing").hidden = true;
    fill(text);
}

function fill(text) {
    input.value = text;
    fit();
    input.focus();
}

function fit() {
    input.style.height = "auto";
    input.style.height = `${input.scrollHeight}px`;
}

function open(conversation) {
    if (draft !== null) stopEditing(draft);
    store.select(conversation);
    save();
    redraw();
    toEnd();
    openSidebar(false);
    input.focus();
}

function remove(conversation) {
    running.get(conversation)?.abort();
    const putBack = store.remove(conversation);
    undo = () => {
        putBack();
        open(conversation);
    };
    offerUndo(conversation.messages.length > 0);
    open(store.current());
}

function offerUndo(isOffered) {
    byId("deleted").hidden = !isOffered;
    if (isOffered) announce("The conversation is deleted. It can be put back.");
}

function undoRemoval() {
    offerUndo(false);
    undo();
}

async function importFile({ target }) {
    const [file] = target.files;
    try {
        const found = readConversations(await file.text());
        found.reverse().forEach(store.add); // the first of the file is the first of the list
        open(store.conversations[0]);
        announce(`${found.length} conversations were read.`);
    } catch (error) {
        announce(`${file.name}: ${error.message}`, true);
    } finally {
        target.value = ""; // so that the same file can be chosen again
    }
}

function redraw() {
    draw(running.has(store.current()));
}

function keep(conversation) {
    store.touch(conversation);
    save();
}

function save() {
    if (!store.save()) announce("The browser's storage is full: what is new will be gone when this tab is.", true);
}

async function copyFrom(button) {
    const code = button.closest("figure")?.querySelector("code");
    const index = [...byId("thread").querySelectorAll(".message")].indexOf(button.closest(".message"));
    const isCopied = await copy(code ? code.textContent : store.current().messages[index].content);
    button.classList.toggle("done", isCopied);
    setTimeout(() => button.classList.remove("done"), 1500);
    announce(isCopied ? "Copied." : "The browser does not let this page copy.", !isCopied);
}

function onThreadClick({ target }) {
    const button = target.closest("button");
    if (!button) return;
    if (button.matches(".copy, .copy-message")) copyFrom(button);
    if (button.matches(".edit")) edit();
    if (button.matches(".regenerate, .retry")) regenerate();
    if (button.matches(".continue")) goOn();
}

function onConversationClick({ target }) {
    const id = target.closest("li")?.dataset.id;
    const conversation = store.conversations.find((other) => String(other.id) === id);
    if (conversation) (target.closest(".remove") ? remove : open)(conversation);
}

function onInputKey(event) {
    if (event.isComposing) return; // this Enter ends a word of an input method
    if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
    }
    if (event.key === "ArrowUp" && !input.value) {
        event.preventDefault();
        edit();
    }
    if (event.key === "PageUp" || event.key === "PageDown") {
        event.preventDefault();
        turnPage(event.key === "PageUp" ? -1 : 1);
    }
}

function onKey(event) {
    if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
    if (isSidebarOpen()) openSidebar(false);
    else if (running.has(store.current())) stop();
    else if (draft !== null) stopEditing(draft);
}

function onSubmit(event) {
    event.preventDefault();
    send();
}

byId("composer").addEventListener("submit", onSubmit);
input.addEventListener("keydown", onInputKey);
input.addEventListener("input", fit);
byId("stop").addEventListener("click", stop);
byId("cancel-edit").addEventListener("click", () => stopEditing(draft));
byId("thread").addEventListener("click", onThreadClick);
byId("conversations").addEventListener("click", onConversationClick);
byId("undo").addEventListener("click", undoRemoval);
byId("export").addEventListener("click", () => exportConversations(store.conversations));
byId("import").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", importFile);
byId("new").addEventListener("click", () => open(store.create()));
byId("menu-button").addEventListener("click", () => openSidebar(!isSidebarOpen()));
byId("shade").addEventListener("click", () => openSidebar(false));
byId("latest").addEventListener("click", toEnd);
byId("scroller").addEventListener("scroll", noticeScroll, { passive: true });
document.addEventListener("keydown", onKey);
window.addEventListener("pagehide", () => store.save());
window.addEventListener("resize", fit);

redraw();
toEnd();
withKey(loadModels).catch((error) => announce(error.message, true));
