/**
 * Markdown as elements: headings, paragraphs, lists, quotes, tables, rules, blocks of code and of math, as models write
 * them. As in other chats, the end of a line in a paragraph is a line break. HTML is shown as text, and so is anything
 * that nests too deep.
 *
 * Lists, quotes and tables have the direction of their own text (dir="auto"), and so has each line of text (CSS).
 */

import { inline, make } from "./inline.js";

const MAX_DEPTH = 8;
const FENCE = /^( {0,3})(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?=\S)| |$)/;
const DELIMITER = /^ {0,3}\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const MATH = /^ {0,3}(\\\[|\$\$)/;
const MATH_ENDS = { "\\[": "\\]", $$: "$$" };
const MAX_MATH_LINES = 100;
const AUTO = { dir: "auto" };
const shown = new WeakMap(); // the sources of the blocks of an element

/** Shows Markdown in an element. Unchanged blocks stay: a reply can grow while some of it is selected. */
export function show(element, text) {
    const blocks = parse(text.split(/\r\n?|\n/), 0);
    const before = shown.get(element) ?? [];
    let same = 0;
    while (same < blocks.length && blocks[same].source === before[same]) same++;
    while (element.childNodes.length > same) element.lastChild.remove();
    element.append(...blocks.slice(same).map((block) => block.build()));
    shown.set(element, blocks.map((block) => block.source));
}

/** Returns the blocks of lines: the source of each, and a function that makes its element. */
function parse(lines, depth) {
    const blocks = [];
    for (let at = 0; at < lines.length; ) {
        if (!lines[at].trim()) {
            at++;
            continue;
        }
        const { end, build } = readBlock(lines, at, depth) ?? readParagraph(lines, at, depth);
        blocks.push({ source: lines.slice(at, end).join("\n"), build });
        at = end;
    }
    return blocks;
}

/** Returns the block that begins at a line, or null where the line is ordinary text. */
function readBlock(lines, at, depth) {
    const line = lines[at];
    let match;
    if ((match = FENCE.exec(line))) return readFence(lines, at, match);
    if ((match = HEADING.exec(line))) {
        const text = line.slice(match[0].length).trim().replace(/(^|\s)#+$/, "");
        return { end: at + 1, build: () => make(`h${match[1].length}`, {}, inline(text.trim())) };
    }
    if ((match = MATH.exec(line))) return readMath(lines, at, match[1]);
    if (RULE.test(line)) return { end: at + 1, build: () => make("hr") };
    if (depth < MAX_DEPTH && QUOTE.test(line)) return readQuote(lines, at, depth);
    if (depth < MAX_DEPTH && (match = MARKER.exec(line))) return readList(lines, at, depth, match);
    return readTable(lines, at);
}

function readParagraph(lines, at, depth) {
    let end = at + 1;
    while (end < lines.length && lines[end].trim() && !interrupts(lines, end, depth)) end++;
    const text = lines.slice(at, end).map((line) => line.trim());
    return { end, build: () => make("p", {}, inline(text.join("\n"))) };
}

/** Whether a line ends the paragraph before it; a numbered item only if it is number 1: no year starts a list. */
function interrupts(lines, at, depth) {
    const marker = MARKER.exec(lines[at]);
    if (!marker || RULE.test(lines[at])) return readBlock(lines, at, depth) !== null;
    const isFilled = marker[0].length < lines[at].trimEnd().length;
    return depth < MAX_DEPTH && isFilled && /^([-*+]|1[.)])$/.test(marker[2]);
}

/** Reads code up to the fence that ends it, or up to the end of a reply that is still growing. */
function readFence(lines, at, [, indent, fence, info]) {
    const closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},} *$`);
    let end = at + 1;
    while (end < lines.length && !closing.test(lines[end])) end++;
    const code = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent.length, line.search(/\S|$/))));
    const build = () =>
        make(
            "figure",
            { class: "code" },
            make(
                "figcaption",
                {},
                make("span", {}, info.trim().split(/\s/)[0].slice(0, 40) || "text"),
                make("button", { type: "button", class: "copy" }, "Copy"),
            ),
            make("pre", { tabindex: "0" }, make("code", {}, code.map((line) => `${line}\n`).join(""))),
        );
    return { end: Math.min(end + 1, lines.length), build };
}

/** Reads math on lines of its own; null where it does not end, or where text follows it. */
function readMath(lines, at, opening) {
    const closing = MATH_ENDS[opening];
    const from = lines[at].indexOf(opening) + opening.length;
    for (let end = at; end < Math.min(lines.length, at + MAX_MATH_LINES); end++) {
        const place = lines[end].indexOf(closing, end === at ? from : 0);
        if (place < 0) continue;
        if (lines[end].slice(place + closing.length).trim()) return null;
        const text = lines.slice(at, end + 1).join("\n");
        return { end: end + 1, build: () => make("div", { class: "math", dir: "ltr" }, text) };
    }
    return null;
}

function readQuote(lines, at, depth) {
    let end = at;
    while (end < lines.length && QUOTE.test(lines[end])) end++;
    const inside = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
    return { end, build: () => make("blockquote", AUTO, ...elements(inside, depth + 1)) };
}

function elements(lines, depth) {
    return parse(lines, depth).map((block) => block.build());
}

/** Reads the items of a list; lines indented by two spaces more than the first marker belong to the item before. */
function readList(lines, at, depth, first) {
    const kind = first[2].at(-1);
    const items = [];
    let isLoose = false;
    let width = 0;
    let end = at;
    for (let next = at; next < lines.length; next++) {
        if (!lines[next].trim()) continue;
        const line = lines[next].replace(/^[ \t]+/, (blanks) => blanks.replaceAll("\t", "    "));
        const indent = line.search(/\S/);
        const isInside = next > at && indent >= first[1].length + 2;
        const marker = !isInside && !RULE.test(line) && MARKER.exec(line);
        const isItem = marker && marker[2].at(-1) === kind;
        if (!isInside && !isItem) break;
        isLoose ||= next > end;
        if (isItem) {
            width = marker[1].length + marker[2].length + (marker[3] ?? " ").length;
            items.push([line.slice(width)]);
        } else {
            for (; end < next; end++) items.at(-1).push("");
            items.at(-1).push(line.slice(Math.min(width, indent)));
        }
        end = next + 1;
    }
    const isOrdered = /\d/.test(first[2]);
    const start = parseInt(first[2], 10);
    const attributes = isOrdered && start !== 1 ? { ...AUTO, start } : AUTO;
    const build = () =>
        make(isOrdered ? "ol" : "ul", attributes, ...items.map((item) => buildItem(item, depth + 1, isLoose)));
    return { end, build };
}

/** Makes an item; in a list without blank lines its text is not a paragraph. */
function buildItem(lines, depth, isLoose) {
    const children = elements(lines, depth);
    const isBare = (child) => child.tagName === "P" && !isLoose;
    return make("li", {}, ...children.flatMap((child) => (isBare(child) ? [...child.childNodes] : child)));
}

function readTable(lines, at) {
    if (!lines[at].includes("|") || !lines[at + 1]?.includes("|") || !DELIMITER.test(lines[at + 1])) return null;
    const [head, marks] = [cells(lines[at]), cells(lines[at + 1])];
    if (head.length !== marks.length) return null;
    let end = at + 2;
    while (end < lines.length && lines[end].includes("|")) end++;
    const align = marks.map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : null));
    const row = (name, texts) =>
        make("tr", {}, ...texts.map((text, i) => make(name, align[i] ? { class: align[i] } : {}, inline(text))));
    // a short row is not filled up: a few kilobytes of text could otherwise make millions of cells
    const body = () => lines.slice(at + 2, end).map((line) => row("td", cells(line).slice(0, head.length)));
    const build = () =>
        make(
            "div",
            { class: "table", ...AUTO, tabindex: "0" },
            make("table", {}, make("thead", {}, row("th", head)), make("tbody", {}, ...body())),
        );
    return { end, build };
}

/** Returns the cells of a line, which pipes without a backslash separate. */
function cells(line) {
    const inner = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
    return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}
