/** The pages of the tasks: drafts of texts, labels by keys, and rankings by dragging and by keys. */

const DRAFT = "palm-rlhf.draft.";

/** Says something to screen readers. */
function announce(text) {
    document.getElementById("announcement").textContent = text;
}

/** Keeps a draft in this browser until its task is done or skipped, and counts its characters. */
function setUpText(area) {
    const key = DRAFT + area.dataset.draft;
    const count = document.getElementById("count");
    const most = Number(area.dataset.most);
    const update = () => {
        const length = [...area.value.trim()].length; // as the server counts: an emoji is one
        const over = length - most;
        count.hidden = false;
        count.classList.toggle("over", over > 0);
        count.textContent = over > 0 ? area.dataset.tooLong.replace("{over}", over) : `\u2066${length} / ${most}\u2069`; // from the left in every language
    };
    if (!area.value) area.value = localStorage.getItem(key) ?? "";
    area.setSelectionRange(area.value.length, area.value.length); // a user goes on where the text ends
    area.addEventListener("input", () => {
        if (area.value) localStorage.setItem(key, area.value);
        else localStorage.removeItem(key);
        update();
    });
    update();
}

/** Forgets the draft of a task that is skipped; that of a done one is forgotten when the server has thanked for it. */
function forgetDraft(event) {
    const area = event.target.querySelector("[data-draft]");
    if (area && event.submitter?.hasAttribute("formaction")) localStorage.removeItem(DRAFT + area.dataset.draft);
}

/** Chooses in a row of labels by a key, and goes on to the next row; the keys work in a row only. */
function chooseByKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !event.target.matches?.(".options input")) return;
    const row = event.target.closest("fieldset");
    const choice = row.querySelector(`[data-choose="${CSS.escape(event.key.toLowerCase())}"]`);
    if (!choice) return;
    event.preventDefault();
    choice.checked = true;
    const rows = [...row.closest("form").querySelectorAll("fieldset")];
    const next = rows[rows.indexOf(row) + 1];
    (next?.querySelector("input:checked, input") ?? choice).focus();
}

/** Makes a list of replies movable: by dragging its heads, by its buttons, and by the arrow keys on a reply. */
function setUpRanking(list) {
    const say = (item) => {
        const place = [...list.children].indexOf(item) + 1;
        const words = { name: item.dataset.name, place, count: list.children.length };
        announce(list.dataset.moved.replace(/\{(\w+)\}/g, (_, word) => words[word]));
    };
    const move = (item, isUp) => {
        const other = isUp ? item.previousElementSibling : item.nextElementSibling;
        if (other) list.insertBefore(isUp ? item : other, isUp ? other : item);
        say(item);
    };
    list.addEventListener("keydown", (event) => {
        if (event.target.parentElement !== list || !["ArrowUp", "ArrowDown"].includes(event.key)) return;
        event.preventDefault();
        move(event.target, event.key === "ArrowUp");
        event.target.focus();
    });
    list.addEventListener("click", (event) => {
        const button = event.target.closest("[name=move]");
        if (!button) return;
        event.preventDefault();
        move(button.closest("li"), button.value.startsWith("up "));
        button.focus();
    });
    window.Sortable.create(list, {
        animation: 150,
        handle: ".card-head",
        filter: "button",
        preventOnFilter: false,
        forceFallback: true, // the same on touch screens and with a mouse
        onEnd: (event) => say(event.item),
    });
}

/** Sets up what a task's page has. */
export function setUpTask(element) {
    for (const done of element.querySelectorAll("[data-done]")) localStorage.removeItem(DRAFT + done.dataset.done);
    element.querySelectorAll("[data-draft]").forEach(setUpText);
    element.querySelectorAll(".ranking").forEach(setUpRanking);
}

document.addEventListener("keydown", chooseByKey);
document.addEventListener("submit", forgetDraft);
