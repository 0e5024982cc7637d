/** What pages do beyond links and forms, which work without it. */

import { show } from "../page/markdown.js";
import { setUpTask } from "./tasks.js";

/** Shows the Markdown of the assistant's messages inside an element. */
function showMarkdown(element) {
    for (const text of element.querySelectorAll("[data-markdown]")) {
        const source = text.textContent;
        delete text.dataset.markdown;
        text.classList.add("is-markdown");
        text.replaceChildren();
        show(text, source);
    }
}

/** Closes a menu by Escape, and when the user goes on elsewhere. */
function closeMenus(event) {
    for (const menu of document.querySelectorAll(".menu[open]")) {
        const isEscape = event.type === "keydown" && event.key === "Escape";
        if (isEscape || (event.type !== "keydown" && !menu.contains(event.target))) menu.open = false;
        if (isEscape && menu.contains(document.activeElement)) menu.querySelector("summary").focus();
    }
}

/** Whether keys go into a text now. */
function isTyping(element) {
    const typed = "textarea, select, [contenteditable], input:not([type=radio], [type=checkbox], [type=button])";
    return element instanceof Element && element.matches(typed);
}

/** Presses the button of a key, such as <button data-key="1 arrowleft">; <kbd> beside its label shows the key. */
function pressByKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || isTyping(event.target)) return;
    const button = document.querySelector(`[data-key~="${CSS.escape(event.key.toLowerCase())}"]`);
    if (!button || button.disabled) return;
    event.preventDefault();
    button.click();
}

/** Sends the form of a field by Ctrl and Enter. */
function sendByKey(event) {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    const form = event.target.closest?.("form") ?? document.querySelector("form.task");
    if (!form) return;
    event.preventDefault();
    form.requestSubmit(form.querySelector("[data-sends]") ?? undefined);
}

/** Sets up the content of a page, at first and after each replacement. */
function setUp(element) {
    showMarkdown(element);
    setUpTask(element);
}

/** Goes on at the beginning of a replaced page, or at the field that the page is about. */
function focusContent(event) {
    if (event.target.id !== "main") return;
    const main = document.getElementById("main");
    setUp(main);
    const heading = main.querySelector("h1");
    if (heading) heading.tabIndex = -1;
    (main.querySelector("[aria-invalid=true] input, [aria-invalid=true], [autofocus]") ?? heading ?? main).focus();
}

document.addEventListener("keydown", closeMenus);
document.addEventListener("keydown", pressByKey);
document.addEventListener("keydown", sendByKey);
document.addEventListener("click", closeMenus);
document.addEventListener("focusin", closeMenus);
document.addEventListener("htmx:afterSettle", focusContent);
setUp(document);
document.querySelector(".bar nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
