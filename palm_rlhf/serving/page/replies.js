/** Replies as they come: asked for, written into their message, kept, and cut or stopped. */

import { PROTOCOL, ServerError, listModels, streamReply } from "./api.js";
import { withKey } from "./dialogs.js";
import * as feedback from "./feedback.js";
import * as store from "./store.js";
import { announce, byId, draw, drawModels, drawSoon, toEnd } from "./view.js";

/** How to stop the reply that is coming in a conversation. */
export const running = new Map();
let models = [];

/** Asks for the next message; `replaced` is put back where the reply has no text. */
export function reply(conversation, replaced = null) {
    return ask(conversation, { role: "assistant", content: "", finish: null }, replaced);
}

/** Asks for two answers side by side; the conversation goes on with the left one until the user chooses. */
export async function compare(conversation, replaced = null) {
    const sides = [0, 1].map(() => ({ content: "", finish: null, answer: null }));
    await ask(conversation, { role: "assistant", content: "", finish: null, comparison: { id: null, sides } }, replaced);
}

/** Asks for the rest of a reply that was cut. */
export function goOn(conversation) {
    if (running.has(conversation)) return;
    write(conversation, conversation.messages.at(-1));
    byId("input").focus();
}

async function ask(conversation, message, replaced) {
    conversation.messages.push(message);
    await write(conversation, message);
    if (message.comparison) settle(message);
    if (!message.content && message.finish === "stopped") {
        conversation.messages.splice(-1, 1, ...(replaced ? [replaced] : []));
    }
    keep(conversation);
    redraw();
    if (message.comparison?.id) offerVerdicts();
}

/** Lets a conversation go on with one of two answers, 0 for the left one. */
export function choose(message, side) {
    const { content, finish, answer } = message.comparison.sides[side];
    Object.assign(message, { content, finish, answer });
    message.comparison.chosen = side;
}

/** Ends a comparison: equal answers are shown as one, and nobody is asked which is better. */
function settle(message) {
    const { sides } = message.comparison;
    for (const side of sides) side.finish ??= "stopped";
    const isSame = sides[0].content.trim() === sides[1].content.trim();
    choose(message, sides[0].content || !sides[1].content ? 0 : 1);
    if (!isSame) return;
    delete message.comparison;
    if (message.content) announce("Both answers came out the same.", true);
}

/** Puts the focus where keys vote, unless the user is writing. */
function offerVerdicts() {
    announce("Both answers are complete. Which one is better?");
    if (!byId("input").value) byId("thread").querySelector(".last .verdicts button")?.focus();
}

/** Adds the reply of the server to a message of a conversation. */
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
            for await (const piece of fittingReply(conversation, message, key, controller.signal)) {
                receive(conversation, message, piece);
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

/** Puts a piece into its message, or into its side of a comparison. An answer has its id from its first piece on. */
function receive(conversation, message, { text, finish, side, kept }) {
    const parts = message.comparison?.sides ?? [message];
    if (kept?.answers) kept.answers.forEach((id, index) => (parts[index].next = id));
    if (kept?.error) conversation.error = `The reply is not kept for feedback: ${kept.error}`;
    if (kept?.kept) parts.filter(({ answer }) => !kept.kept.includes(answer)).forEach((part) => (part.answer = null));
    if (message.comparison && kept?.comparison) message.comparison.id = kept.comparison;
    if (kept) return;
    const part = parts[side];
    part.content += text;
    part.finish = finish ?? part.finish;
    if (part.next) part.answer = part.next;
    delete part.next;
}

/** Yields the pieces of a reply; the reply continues the last message where that is the assistant's. */
async function* fittingReply(conversation, message, key, signal) {
    const body = options();
    for (let isCut = true; isCut; ) {
        isCut = false;
        const messages = store.messagesFor(conversation);
        const isBegun = messages.at(-1).role === "assistant";
        const door = doorFor(message, isBegun);
        const continued = door === PROTOCOL ? {} : { continues: message.answer };
        const going = isBegun ? { continue_final_message: true, add_generation_prompt: false, ...continued } : {};
        try {
            for await (const piece of streamReply({ ...body, ...going, messages }, key, signal, door)) {
                const isFull = piece.finish === "length" && !message.comparison && !body.max_tokens;
                isCut ||= isFull && makeRoom(conversation, body);
                yield isCut ? { ...piece, finish: null } : piece;
            }
        } catch (error) {
            isCut = error.code === "context_length_exceeded" && makeRoom(conversation, body);
            if (!isCut) throw error;
        }
    }
}

/** Returns where a reply is asked for; the rest of a reply that is not known to the feedback cannot be kept there. */
function doorFor(message, isBegun) {
    if (message.comparison) return feedback.door("compare");
    return feedback.isOn() && (!isBegun || message.answer) ? feedback.door("reply") : PROTOCOL;
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

/** Asks the server for its models, and whether it takes feedback from this browser. */
export async function loadModels(key) {
    models = await listModels(key);
    drawModels(models, options().model);
    await feedback.enter(key);
    await loadGiven();
}

/** Asks what was given on the conversation that is shown, and shows it. */
export async function loadGiven() {
    if (!feedback.isOn()) return;
    try {
        await feedback.load(store.current().messages);
    } catch (error) {
        announce(error.message, true);
    }
    redraw();
}

/** Draws the conversation that is shown. */
export function redraw() {
    draw(running.has(store.current()));
}

/** Saves a conversation that has changed. */
export function keep(conversation) {
    store.touch(conversation);
    save();
}

/** Saves everything, and says so where there is no room. */
export function save() {
    if (!store.save()) announce("The browser's storage is full: what is new will be gone when this tab is.", true);
}
