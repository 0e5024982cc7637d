/** The actions of buttons and keys, beside those of feedback. */

import { copy } from "./clipboard.js";
import { withKey } from "./dialogs.js";
import * as feedback from "./feedback.js";
import { exportConversations, readConversations } from "./files.js";
import { judge } from "./judging_actions.js";
import { compare, goOn, loadGiven, loadModels, redraw, reply, running, save } from "./replies.js";
import * as store from "./store.js";
import { announce, byId, isSidebarOpen, noticeScroll, openSidebar, toEnd, turnPage } from "./view.js";

const input = byId("input");
let undo = null; // puts the conversation back that was deleted last
let draft = null; // what the input had before the last message was put there to be edited

/** Sends the message; `ask` is `reply`, or `compare` for two answers. */
function send(ask = reply) {
    const conversation = store.current();
    const content = input.value.trim();
    if (!content || running.has(conversation)) return;
    if (draft !== null) conversation.messages.splice(store.lastIndexOf(conversation.messages, "user"));
    stopEditing("");
    offerUndo(false);
    conversation.messages.push({ role: "user", content });
    ask(conversation);
}

/** Asks again for the last message of the assistant, or for the first time where there is none. */
function regenerate(ask = reply) {
    const conversation = store.current();
    if (running.has(conversation)) return;
    const isSaid = conversation.messages.at(-1)?.role === "assistant";
    ask(conversation, isSaid ? conversation.messages.pop() : null);
    input.focus();
}

/** Sends the message, or asks again for the last reply where nothing is written, for two answers. */
function sendToCompare() {
    if (!feedback.isOn()) return send();
    if (input.value.trim()) send(compare);
    else if (store.current().messages.length) regenerate(compare);
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
    loadGiven();
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

async function copyFrom(button) {
    const code = button.closest("figure")?.querySelector("code");
    const isCopied = await copy(code ? code.textContent : messageOf(button).content);
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
    if (button.matches(".continue")) goOn(store.current());
    judge(button, messageOf(button));
}

/** Returns the message that an element belongs to. */
function messageOf(element) {
    const index = [...byId("thread").querySelectorAll(".message")].indexOf(element.closest(".message"));
    return store.current().messages[index];
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
        if (event.ctrlKey || event.metaKey) sendToCompare();
        else send();
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
byId("compare").addEventListener("click", sendToCompare);
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
