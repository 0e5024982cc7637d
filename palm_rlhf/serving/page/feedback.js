/**
 * The feedback of this server, where it has any: who gives it, and what was given, which the server keeps.
 *
 * Answers and comparisons have ids. What was given on one is `{ reaction, correction, vote }`, each with an id of its
 * own, by which it is taken back.
 */

import { getJson, postJson } from "./api.js";
import { key } from "./store.js";

const BASE = document.documentElement.dataset.feedback; // such as "feedback/", where the server has put it
const MOST_IDS = 500; // of one request
const KINDS = {
    reaction: { table: "reactions", judged: "answer", value: "value" },
    correction: { table: "corrections", judged: "answer", value: "text" },
    vote: { table: "votes", judged: "comparison", value: "verdict" },
};
const given = new Map(); // by the id of the answer or comparison
let visitor = null;

/** Whether this browser may give feedback. */
export function isOn() {
    return visitor !== null;
}

/** Returns the address of the feedback's own pages; undefined where the server has none. */
export function pages() {
    return BASE;
}

/** Asks the server who is here; feedback stays off where nobody has logged in. */
export async function enter(apiKey) {
    if (BASE === undefined || visitor) return;
    try {
        visitor = await getJson(`${BASE}chat/visitor`, apiKey);
    } catch (error) {
        if (error.status !== 401 || error.code === "invalid_api_key") throw error;
    }
}

/** Returns where a reply is asked for that the server keeps: reply, or compare for two answers. */
export function door(kind) {
    return { path: `${BASE}chat/${kind}`, headers: { "X-Form-Token": visitor.token } };
}

/** Returns what was given on an answer or a comparison. */
export function givenOn(id) {
    return given.get(id) ?? {};
}

/** Asks the server what was given on messages, as far as that is not known yet. */
export async function load(messages) {
    const parts = messages.flatMap((message) => [message, ...(message.comparison?.sides ?? [])]);
    const answers = unknown(parts.map(({ answer }) => answer));
    const comparisons = unknown(messages.map(({ comparison }) => comparison?.id));
    while (answers.length || comparisons.length) {
        const asked = { answers: answers.splice(0, MOST_IDS), comparisons: comparisons.splice(0, MOST_IDS) };
        const found = await post("given", asked);
        for (const id of [...asked.answers, ...asked.comparisons]) given.set(id, found[id] ?? {});
    }
}

function unknown(ids) {
    return [...new Set(ids)].filter((id) => id && !given.has(id));
}

/** Gives a reaction, a correction or a vote on an answer or comparison; what was given before is taken back. */
export async function give(kind, judged, value) {
    const names = KINDS[kind];
    if (givenOn(judged)[kind]) await takeBack(kind, judged);
    const { id } = await post(names.table, { [names.judged]: judged, [names.value]: value });
    given.set(judged, { ...givenOn(judged), [kind]: { id, [names.value]: value } });
}

/** Takes a reaction, a correction or a vote back. */
export async function takeBack(kind, judged) {
    await post("withdrawals", { table: KINDS[kind].table, id: givenOn(judged)[kind].id });
    given.set(judged, { ...givenOn(judged), [kind]: undefined });
}

function post(path, values) {
    return postJson(`${BASE}chat/${path}`, values, door(path).headers, key());
}
