/**
 * The text inside a block of Markdown: emphasis, code, links, line breaks, and math, which is shown as it is written.
 *
 * Text becomes text nodes only, so that no reply can put elements of its own on the page. The time is linear in the
 * length of the text, and elements nest at most MAX_HEIGHT deep, whatever the text is.
 */

const MAX_HEIGHT = 16;
const PLAIN = /[^\\`*_~[\]!<h\n$]+/y;
const ESCAPED = /\\([!-/:-@[-`{-~])/y;
const RUN = /([`*_~])\1*/y;
const IN_ANGLES = /<(https?:\/\/[^\s<>]+)>/iy;
const BARE = /https?:\/\/[^\s<>"`\\[\]]+/iy;
const DESTINATION =
    /\(\s*(?=\S)(?:<([^<>\n]*)>|((?:[^\s()<>\\]|\\[()]|\([^\s()<>]*\))*))(?:\s+(?:"[^"\n]*"|'[^'\n]*'))?\s*\)/y;
const PUNCTUATION = /[\p{P}\p{S}]/u;
// The end of math by its beginning. As in Pandoc, a closing dollar follows a character that is not a space and precedes
// no digit, so that prices stay text.
const MATH = { "\\(": /\\\)/g, "\\[": /\\\]/g, $$: /\$\$/g, $: /(?<![\s\\$])\$(?![\d$])/g };
const EMPHASIS = { "*1": "em", _1: "em", "*2": "strong", _2: "strong", "~2": "del" };

/** Returns a new element with its children, each a node or a text. */
export function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
}

/** Returns the nodes of a text, in a fragment. */
export function inline(text) {
    return new Inline(text).parse();
}

/** Returns a link that opens in another tab, or null where the address is not a web address. */
function link(address, ...children) {
    let url;
    try {
        url = new URL(address);
    } catch {
        return null; // relative ones too: beside this page there is nothing to point to
    }
    if (url.protocol !== "http:" && url.protocol !== "https:") return null;
    return make("a", { href: url.href, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

/** The algorithm of CommonMark's appendix: a list of the runs that may become emphasis, and a stack of brackets. */
class Inline {
    constructor(text) {
        this.text = text;
        this.at = 0;
        this.out = document.createDocumentFragment();
        this.plain = ""; // text that is not in a node yet
        this.last = null; // of the list of runs
        this.brackets = []; // { node, run, links }: the last run before it, and how many bare links
        this.linksFrom = 0; // brackets below this place enclose a link, and no link may hold another
        this.bareLinks = [];
        this.heights = new WeakMap();
        this.tooHigh = -1; // the last place where an element would have nested too deep: none goes around it
        this.backticks = placesOfBackticks(text);
        this.ends = {}; // of math: the places where each kind may end, the first one last
    }

    parse() {
        while (this.at < this.text.length) {
            if (!this.step()) this.write(this.text[this.at++]);
        }
        this.append();
        this.pairUp(null);
        return this.out;
    }

    /** Reads the markup that begins here; false where it is an ordinary character. */
    step() {
        let match;
        switch (this.text[this.at]) {
            case "$":
                return this.readMath(this.text[this.at + 1] === "$" ? "$$" : "$");
            case "\\":
                if (/[([]/.test(this.text[this.at + 1]) && this.readMath(this.text.substr(this.at, 2))) return true;
                if ((match = this.take(ESCAPED))) return this.write(match[1]);
                return this.text[this.at + 1] === "\n" && ++this.at;
            case "`":
                return this.readCode();
            case "*":
            case "_":
            case "~":
                return this.readRun();
            case "!": // an image would be fetched from wherever the model says: it becomes a link to it
                return this.text[this.at + 1] === "[" && this.openBracket("![");
            case "[":
                return this.openBracket("[");
            case "]":
                return this.closeBracket();
            case "<":
                return (match = this.take(IN_ANGLES)) && this.writeLink(match[1]);
            case "h":
                return this.readBareLink();
            case "\n":
                this.at++;
                this.append(make("br"));
                return true;
            default:
                return this.write(this.take(PLAIN)[0]);
        }
    }

    /** Reads the text that a sticky expression matches here. */
    take(expression) {
        expression.lastIndex = this.at;
        const match = expression.exec(this.text);
        if (match) this.at = expression.lastIndex;
        return match;
    }

    write(text) {
        this.plain += text;
        return true;
    }

    /** Adds nodes after the text so far. */
    append(...nodes) {
        if (this.plain) this.out.append(this.plain);
        this.plain = "";
        this.out.append(...nodes);
    }

    /** Adds text that may turn out to be markup, in a node of its own. */
    writeMark(text) {
        const node = document.createTextNode(text);
        this.append(node);
        return node;
    }

    writeLink(address) {
        const element = link(address, address);
        if (!element) return this.write(address);
        this.append(element);
        this.bareLinks.push(element);
        return true;
    }

    readCode() {
        const [ticks] = this.take(RUN);
        const places = this.backticks.get(ticks.length) ?? [];
        while (places.length && places.at(-1) < this.at) places.pop();
        if (!places.length) return this.write(ticks);
        const end = places.pop();
        let code = this.text.slice(this.at, end).replaceAll("\n", " ");
        if (code.trim() && code.startsWith(" ") && code.endsWith(" ")) code = code.slice(1, -1);
        this.append(make("code", {}, code));
        this.at = end + ticks.length;
        return true;
    }

    /** Reads math, in which no character is markup; false where it does not end. */
    readMath(opening) {
        const start = this.at + opening.length;
        if (opening === "$" && /\s|^$/.test(this.text[start] ?? "")) return false;
        const places = (this.ends[opening] ??= [...this.text.matchAll(MATH[opening])].reverse());
        while (places.length && places.at(-1).index <= start) places.pop();
        if (!places.length) return false;
        const { index, 0: closing } = places.at(-1);
        this.append(make("span", { class: "math", dir: "ltr" }, this.text.slice(this.at, index + closing.length)));
        this.at = index + closing.length;
        return true;
    }

    readBareLink() {
        if (/\w/.test(this.text[this.at - 1] ?? " ")) return false;
        const start = this.at;
        const match = this.take(BARE);
        if (!match) return false;
        this.at = start + lengthOfAddress(match[0]);
        return this.writeLink(this.text.slice(start, this.at));
    }

    readRun() {
        const at = this.at;
        const before = this.text[at - 1] ?? " ";
        const [run, mark] = this.take(RUN);
        const after = this.text[this.at] ?? " ";
        if (mark === "~" && run.length !== 2) return this.write(run);
        const opens = flanks(before, after);
        const closes = flanks(after, before);
        const isWord = mark === "_"; // snake_case has no emphasis in it
        const entry = {
            at,
            mark,
            node: this.writeMark(run),
            count: run.length,
            length: run.length,
            opens: opens && (!isWord || !closes || PUNCTUATION.test(before)),
            closes: closes && (!isWord || !opens || PUNCTUATION.test(after)),
            before: this.last,
            after: null,
        };
        if (this.last) this.last.after = entry;
        this.last = entry;
        return true;
    }

    openBracket(mark) {
        this.at += mark.length;
        this.brackets.push({ at: this.at, node: this.writeMark(mark), run: this.last, links: this.bareLinks.length });
        return true;
    }

    closeBracket() {
        const bracket = this.brackets.pop();
        if (!bracket) return false;
        const isFree = this.brackets.length >= this.linksFrom;
        this.linksFrom = Math.min(this.linksFrom, this.brackets.length);
        const start = this.at++;
        const match = isFree && this.take(DESTINATION);
        const element = match && link((match[1] ?? match[2]).replace(/\\([()])/g, "$1"));
        if (element) this.append();
        if (!element || !this.wrap(element, bracket, null)) {
            this.at = start;
            return false;
        }
        for (const bare of this.bareLinks.splice(bracket.links)) bare.replaceWith(bare.textContent);
        this.pairUp(bracket.run);
        this.last = bracket.run;
        if (this.last) this.last.after = null;
        bracket.node.remove();
        if (!element.textContent) element.append(element.href);
        this.linksFrom = this.brackets.length;
        return true;
    }

    /** Turns matching runs after `bottom` into emphasis, the inner ones first. */
    pairUp(bottom) {
        const floors = new Map(); // for each kind of closing run, a place before which nothing opens for it
        let closer = bottom ? bottom.after : this.first();
        while (closer) {
            if (!closer.closes) {
                closer = closer.after;
                continue;
            }
            const kind = `${closer.mark}${closer.opens}${closer.length % 3}`;
            const floor = floors.get(kind) ?? bottom?.at ?? -1;
            let opener = closer.before;
            while (opener && opener.at > floor && !fit(opener, closer)) opener = opener.before;
            if (!opener || opener.at <= floor) {
                floors.set(kind, closer.before?.at ?? -1);
                if (!closer.opens) this.forget(closer);
                closer = closer.after;
                continue;
            }
            while (closer.before !== opener) this.forget(closer.before);
            this.emphasise(opener, closer);
            if (!opener.count) this.forget(opener);
            if (!closer.count) {
                this.forget(closer);
                closer = closer.after;
            }
        }
    }

    first() {
        let run = this.last;
        while (run?.before) run = run.before;
        return run;
    }

    /** Takes a run out of the list; the run keeps its links to its neighbours. */
    forget(run) {
        if (run.before) run.before.after = run.after;
        if (run.after) run.after.before = run.before;
        else this.last = run.before;
    }

    emphasise(opener, closer) {
        const size = Math.min(opener.count, closer.count, 2);
        const isWrapped = this.wrap(make(EMPHASIS[opener.mark + size]), opener, closer.node);
        for (const run of [opener, closer]) {
            run.count -= size;
            if (isWrapped) run.node.data = run.node.data.slice(size);
        }
    }

    /** Moves the nodes from a mark to before a node into a new element; false where it would nest too deep. */
    wrap(element, mark, end) {
        if (mark.at <= this.tooHigh) return false;
        let height = 0;
        for (let node = mark.node.nextSibling; node !== end; node = node.nextSibling) {
            height = Math.max(height, this.heights.get(node) ?? 0);
        }
        if (height >= MAX_HEIGHT) {
            this.tooHigh = mark.at;
            return false;
        }
        while (mark.node.nextSibling !== end) element.append(mark.node.nextSibling);
        mark.node.after(element);
        this.heights.set(element, height + 1);
        return true;
    }
}

/** Whether a run of marks may open emphasis, by the characters before and after it; swap them for closing. */
function flanks(before, after) {
    if (/\s/.test(after)) return false;
    return !PUNCTUATION.test(after) || /\s/.test(before) || PUNCTUATION.test(before);
}

/** Whether two runs match. Where one can both open and close, the sum of their lengths must not be a multiple of 3. */
function fit(opener, closer) {
    if (!opener.opens || opener.mark !== closer.mark) return false;
    if (!opener.closes && !closer.opens) return true;
    return (opener.length + closer.length) % 3 !== 0 || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

/** Returns the length of a bare address without the sentence around it, such as its full stop or a parenthesis. */
function lengthOfAddress(text) {
    let open = text.split("(").length - text.split(")").length;
    let length = text.length;
    for (; /[.,:;!?'"*_~)]/.test(text[length - 1]); length--) {
        if (text[length - 1] === ")" && open++ >= 0) break;
    }
    return length;
}

/** Returns where runs of backticks begin, by their length, the first one last. */
function placesOfBackticks(text) {
    const places = new Map();
    for (const match of text.matchAll(/`+/g)) {
        const length = match[0].length;
        if (!places.has(length)) places.set(length, []);
        places.get(length).push(match.index);
    }
    for (const list of places.values()) list.reverse();
    return places;
}
