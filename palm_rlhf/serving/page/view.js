/** The view of the conversations. */

import { drawComparison, drawJudgments, drawOffer, drawSides } from "./judging.js";
import { show } from "./markdown.js";
import * as store from "./store.js";

const CUT = ["length", "stopped"];
const NAMES = { user: "You", assistant: "Assistant", system: "System prompt" };
const NOTES = { length: "The reply was cut at the limit of its length.", stopped: "Stopped." };
const scroller = byId("scroller");
const elements = new WeakMap(); // of messages and conversations
let isDrawingSoon = false;
let pause = 0; // between two drawings of a growing message, in milliseconds

/** Returns the element of an id. */
export function byId(id) {
    return document.getElementById(id);
}

/** Draws everything; `isRunning` is whether a reply is growing in the conversation that is shown. */
export function draw(isRunning) {
    const conversation = store.current();
    const { messages, error } = conversation;
    const isFollowed = isAtEnd();
    const leftOut = conversation.leftOut ?? 0;
    const nodes = messages.map((message, index) => drawMessage(message, index, messages, isRunning));
    nodes.slice(0, leftOut).forEach((node) => node.classList.add("left-out"));
    if (leftOut) nodes.splice(leftOut, 0, drawLeftOut(leftOut));
    if (error) nodes.push(drawError(error));
    synchronise(byId("thread"), nodes);
    byId("thread").setAttribute("aria-busy", isRunning);
    byId("greeting").hidden = nodes.length > 0;
    byId("send").hidden = isRunning;
    byId("stop").hidden = !isRunning;
    document.title = messages.length ? store.titleOf(conversation) : "Chat";
    synchronise(byId("conversations"), store.conversations.map(drawConversation));
    drawKept();
    drawOffer();
    follow(isFollowed);
}

function drawMessage(message, index, messages, isRunning) {
    if (message.comparison) return drawTwo(message, index === messages.length - 1, isRunning);
    const element = elementOf(message, "message-template");
    const part = (name) => element.querySelector(name);
    const isLast = index === messages.length - 1;
    const isGrowing = isLast && isRunning;
    const isReply = message.role === "assistant";
    element.className = `message ${message.role}`;
    element.classList.toggle("last", isLast);
    element.classList.toggle("growing", isGrowing);
    element.setAttribute("aria-label", NAMES[message.role]);
    drawText(message, element);
    const note = isGrowing ? "" : (NOTES[message.finish] ?? (message.content ? "" : "The reply is empty."));
    part(".note").textContent = note;
    part(".note").hidden = !note;
    part(".actions").hidden = isGrowing;
    part(".edit").hidden = isRunning || index !== store.lastIndexOf(messages, "user");
    part(".regenerate").hidden = !isLast || !isReply;
    part(".continue").hidden = !isLast || !message.content || !CUT.includes(message.finish);
    drawJudgments(element, message, isGrowing);
    return element;
}

function drawTwo(message, isLast, isRunning) {
    const element = elementOf(message.comparison, "comparison-template");
    element.classList.toggle("last", isLast);
    element.querySelector(".actions").hidden = !isLast || isRunning;
    drawComparison(element, message, NOTES, isLast, isLast && isRunning);
    return element;
}

function drawText(message, element) {
    const text = element.querySelector(".text");
    if (message.role === "assistant") show(text, message.content);
    else text.textContent = message.content;
}

/** Draws a growing message once for the pieces that come soon after each other; long ones are drawn less often. */
export function drawSoon(message) {
    if (isDrawingSoon) return;
    isDrawingSoon = true;
    setTimeout(() => requestAnimationFrame(() => drawGrowing(message)), pause);
}

function drawGrowing(message) {
    const start = performance.now();
    const isFollowed = isAtEnd();
    if (message.comparison) drawSides(elements.get(message.comparison), message.comparison);
    else drawText(message, elements.get(message));
    follow(isFollowed);
    isDrawingSoon = false;
    pause = 2 * (performance.now() - start);
}

function drawLeftOut(count) {
    const element = clone("left-out-template");
    const said = count === 1 ? "message is" : `${count} messages are`;
    element.textContent = `The context is full: the first ${said} no longer sent to the model.`;
    return element;
}

function drawError(error) {
    const element = clone("error-template");
    element.querySelector("p").textContent = error;
    return element;
}

function drawConversation(conversation) {
    const element = elementOf(conversation, "conversation-template");
    const [opening, removal] = element.children;
    const title = store.titleOf(conversation);
    element.dataset.id = conversation.id;
    opening.textContent = opening.title = title;
    opening.setAttribute("aria-current", conversation === store.current());
    removal.setAttribute("aria-label", `Delete ${title}`);
    return element;
}

/** Shows where conversations are kept. */
export function drawKept() {
    byId("kept").textContent = `Conversations ${store.outlivesTab() ? "are kept in this browser" : "stay in this tab"}.`;
}

/** Shows which models there are, and which one answers. */
export function drawModels(models, chosen) {
    const select = document.querySelector("[name=model]");
    select.replaceChildren(...models.map(({ id }) => new Option(id, id)));
    select.value = chosen;
    byId("model").textContent = chosen;
    byId("model-choice").hidden = models.length < 2;
}

function elementOf(thing, template) {
    if (!elements.has(thing)) elements.set(thing, clone(template));
    return elements.get(thing);
}

function clone(template) {
    return byId(template).content.firstElementChild.cloneNode(true);
}

/** Makes nodes the children of an element, without touching those that are in place already. */
function synchronise(parent, nodes) {
    nodes.forEach((node, i) => node !== parent.children[i] && parent.insertBefore(node, parent.children[i] ?? null));
    while (parent.children.length > nodes.length) parent.lastElementChild.remove();
}

/** Announces an event to screen readers, and shows it to everyone where it is a warning. */
export function announce(text, isWarning = false) {
    byId("status").textContent = text;
    byId("status").classList.toggle("hidden", !isWarning);
}

function isAtEnd() {
    return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
}

/** Stays at the latest message while it grows, unless someone has scrolled back to read. */
function follow(isFollowed) {
    if (isFollowed) toEnd();
    noticeScroll();
}

/** Scrolls to the latest message. */
export function toEnd() {
    scroller.scrollTop = scroller.scrollHeight;
}

/** Shows the button to the latest message while that message is out of sight. */
export function noticeScroll() {
    byId("latest").hidden = isAtEnd();
}

/** Scrolls by most of a screen, up for -1 and down for 1. */
export function turnPage(direction) {
    scroller.scrollBy({ top: direction * 0.85 * scroller.clientHeight });
}

/** Opens or closes the list of conversations on narrow screens, where it covers the current one. */
export function openSidebar(isOpen) {
    if (isOpen === isSidebarOpen()) return;
    document.body.classList.toggle("sidebar-open", isOpen);
    byId("menu-button").setAttribute("aria-expanded", isOpen);
    byId(isOpen ? "new" : "menu-button").focus();
}

/** Whether that list is open. */
export function isSidebarOpen() {
    return document.body.classList.contains("sidebar-open");
}
