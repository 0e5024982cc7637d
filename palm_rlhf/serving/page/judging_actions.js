/** What the buttons and keys of feedback do. */

import * as feedback from "./feedback.js";
import { choose, keep, redraw } from "./replies.js";
import * as store from "./store.js";
import { announce, byId } from "./view.js";

const KEYS = { 1: "left", 2: "right", 0: "tie", b: "both_bad" };
const SIDES = { left: 0, right: 1 };
const dialog = byId("better");
const field = dialog.querySelector("textarea");
let corrected = null; // the message for which a better answer is being written

/** Does what a button of feedback under a message is for. */
export function judge(button, message) {
    if (button.matches(".thumb")) return during(button, () => react(message, Number(button.dataset.value)));
    if (button.matches(".better")) return openBetter(message);
    if (button.matches("[data-verdict]")) return during(button, () => vote(message, button.dataset.verdict));
    if (button.matches(".go-on")) return goOnWith(message, button.closest(".side"));
    const { kind } = button.dataset;
    if (button.matches(".take-back")) during(button, () => takeBack(kind, message));
}

/** Votes by a key, where a comparison waits and nobody is writing. */
export function judgeByKey(event) {
    const isFree = !event.target.closest("input, textarea, select, dialog") && !event.repeat;
    if (!isFree || event.ctrlKey || event.metaKey || event.altKey || !(event.key.toLowerCase() in KEYS)) return;
    const comparison = event.target.closest(".comparison") ?? byId("thread").querySelector(".comparison.last");
    const button = comparison?.querySelector(`[data-verdict="${KEYS[event.key.toLowerCase()]}"]`);
    if (!button || button.closest(".question").hidden) return;
    event.preventDefault();
    button.click();
}

async function react({ answer }, value) {
    const isGiven = feedback.givenOn(answer).reaction?.value === value;
    await (isGiven ? feedback.takeBack("reaction", answer) : feedback.give("reaction", answer, value));
    announce(isGiven ? "Taken back." : "Thank you, that is kept.");
}

async function vote(message, verdict) {
    await feedback.give("vote", message.comparison.id, verdict);
    const conversation = store.current();
    if (message === conversation.messages.at(-1) && verdict in SIDES) {
        choose(message, SIDES[verdict]);
        keep(conversation);
    }
    announce("Thank you, your vote is kept.");
    byId("input").focus();
}

async function takeBack(kind, message) {
    await feedback.takeBack(kind, kind === "vote" ? message.comparison.id : message.answer);
    announce("Taken back.");
}

function goOnWith(message, side) {
    choose(message, [...side.parentElement.children].indexOf(side));
    keep(store.current());
    redraw();
    announce("The conversation goes on with this answer.");
    byId("input").focus();
}

/** Sends something while its button is disabled, so that it is sent once; says so where it is refused. */
async function during(button, action) {
    if (button.disabled) return;
    button.disabled = true;
    try {
        await action();
    } catch (error) {
        announce(error.message, true);
    } finally {
        button.disabled = false;
        redraw();
    }
}

function openBetter(message) {
    corrected = message;
    field.value = message.content;
    dialog.returnValue = "";
    dialog.showModal();
}

function keepBetter() {
    const message = corrected;
    if (dialog.returnValue !== "keep" || !field.value.trim()) return;
    const { answer } = message;
    during(dialog.querySelector("[value=keep]"), async () => {
        await feedback.give("correction", answer, field.value);
        announce("Thank you, your answer is kept.");
    });
}

function onFieldKey(event) {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    dialog.querySelector("form").requestSubmit(dialog.querySelector("[value=keep]"));
}

dialog.addEventListener("close", keepBetter);
field.addEventListener("keydown", onFieldKey);
byId("cancel-better").addEventListener("click", () => dialog.close());
document.addEventListener("keydown", judgeByKey);
