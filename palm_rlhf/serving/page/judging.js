/** The view of feedback: thumbs, better answers and comparisons, drawn into the elements of their messages. */

import * as feedback from "./feedback.js";
import { show } from "./markdown.js";

const VERDICTS = {
    left: "You found the left answer better.",
    right: "You found the right answer better.",
    tie: "You found both answers equally good.",
    both_bad: "You found both answers bad.",
};

/** Draws the thumbs and the better answer of a reply; none of a reply that the feedback does not know. */
export function drawJudgments(element, { answer, role }, isGrowing) {
    const isJudged = role === "assistant" && Boolean(answer) && feedback.isOn() && !isGrowing;
    const { reaction, correction } = isJudged ? feedback.givenOn(answer) : {};
    for (const thumb of element.querySelectorAll(".thumb")) {
        thumb.hidden = !isJudged;
        thumb.setAttribute("aria-pressed", Number(thumb.dataset.value) === reaction?.value);
    }
    element.querySelector(".better").hidden = !isJudged || Boolean(correction);
    element.querySelector(".correction").hidden = !correction;
    show(element.querySelector(".correction .better-text"), correction?.text ?? "");
}

/** Draws two answers side by side, with the verdicts, or the verdict that was given. */
export function drawComparison(element, { comparison }, notes, isLast, isGrowing) {
    const vote = comparison.id ? feedback.givenOn(comparison.id).vote : null;
    const isOpen = Boolean(comparison.id) && !vote && feedback.isOn() && !isGrowing;
    const isPassed = !isLast && Boolean(vote);
    element.classList.toggle("passed", isPassed);
    drawSides(element, comparison);
    [...element.querySelectorAll(".side")].forEach((side, index) => {
        const { content, finish } = comparison.sides[index];
        const isChosen = comparison.chosen === index;
        const note = isGrowing ? "" : (notes[finish] ?? (content ? "" : "The reply is empty."));
        side.classList.toggle("growing", isGrowing && !finish);
        side.classList.toggle("chosen", isChosen && !isOpen && !isGrowing);
        side.querySelector(".note").textContent = note;
        side.querySelector(".note").hidden = !note;
        side.querySelector(".go-on").hidden = !isLast || isGrowing || isOpen || isChosen || !content;
    });
    element.querySelector(".question").hidden = !isOpen;
    element.querySelector(".given").hidden = !vote;
    element.querySelector(".given span").textContent = VERDICTS[vote?.verdict] ?? "";
}

/** Draws the texts of two answers, which may be growing. */
export function drawSides(element, { sides }) {
    [...element.querySelectorAll(".side .text")].forEach((text, index) => show(text, sides[index].content));
}

/** Shows what a server with feedback has: the button for two answers, and the link to the pages of the feedback. */
export function drawOffer() {
    const byId = (id) => document.getElementById(id);
    byId("compare").hidden = byId("compare-hint").hidden = !feedback.isOn();
    byId("feedback-pages").hidden = feedback.pages() === undefined;
    const link = byId("feedback-pages").querySelector("a");
    link.href = feedback.pages() ?? "";
    link.textContent = feedback.isOn() ? "Pages of the feedback" : "Log in to give feedback";
}
