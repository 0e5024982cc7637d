"use strict";
const run = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);

// Each quantity: its value for a token, the value without colour, and an explanation.
const QUANTITIES = {
  advantage: { of: (row, i) => row.advantage[i], zero: 0, text: "how much better than expected the token was: orange tokens become likelier, blue ones less likely" },
  ratio: { of: (row, i) => Math.log(row.ratio[i]), shown: (x) => Math.exp(x), zero: 0, text: "probability after the update divided by the probability before it; a red line marks a clipped token" },
  KL: { of: (row, i) => row.ref_logprob && row.logprob[i] - row.ref_logprob[i], zero: 0, text: "log-probability minus the reference's, in nats: orange tokens are likelier than under the reference" },
  value: { of: (row, i) => row.value && row.value[i], zero: 0, text: "the return that the critic expected from this token on" },
  return: { of: (row, i) => row.return && row.return[i], zero: 0, text: "the return that the critic learns" },
  surprise: { of: (row, i) => -row.logprob[i], zero: 0, text: "negative log-probability of the token when it was sampled, in nats" },
};
const NUMBERS = ["logprob", "new_logprob", "ref_logprob", "ratio", "advantage", "value", "return"];
const steps = [...new Set(run.rows.map((row) => row.step))].sort((a, b) => a - b);
const byStep = new Map(steps.map((step) => [step, run.rows.filter((row) => row.step === step)]));
let current = steps.length - 1;

function node(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function show(number) {
  if (number === null || number === undefined) return "–";
  if (Number.isInteger(number)) return String(number);
  const size = Math.abs(number);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? number.toExponential(2) : String(Number(number.toPrecision(4)));
}

function numbersOf(quantity, rows) {
  return rows.flatMap((row) => row.tokens.map((_, i) => quantity.of(row, i))).filter(Number.isFinite);
}

// One scale for the whole run, so that steps compare: the 95th percentile of the absolute values.
function scaleOf(quantity) {
  const sizes = numbersOf(quantity, run.rows).map((x) => Math.abs(x - quantity.zero)).sort((a, b) => a - b);
  return sizes[Math.floor(0.95 * (sizes.length - 1))] || sizes.at(-1) || 1;
}

function colour(share) {
  const strength = Math.min(Math.abs(share), 1) * 0.75;
  return `rgba(var(${share < 0 ? "--negative" : "--positive"}), ${strength.toFixed(3)})`;
}

const available = Object.entries(QUANTITIES).filter(([, quantity]) => numbersOf(quantity, run.rows).length);
const scales = new Map(available.map(([name, quantity]) => [name, scaleOf(quantity)]));

function tokenNode(row, i, quantity, scale) {
  const piece = row.pieces ? row.pieces[i] : "";
  const made = node("span", { className: "token", tabIndex: -1 });
  if (piece) made.append(visible(piece));
  else made.append(node("span", { className: "id", textContent: `⟨${row.tokens[i]}⟩` }));
  const number = quantity.of(row, i);
  if (row.in_loss[i] && Number.isFinite(number)) made.style.backgroundColor = colour((number - quantity.zero) / scale);
  made.classList.toggle("clipped", Boolean(row.clipped[i]));
  made.classList.toggle("out", !row.in_loss[i]);
  made.addEventListener("mouseenter", () => describe(made, row, i));
  made.addEventListener("mouseleave", hide);
  made.addEventListener("focus", () => describe(made, row, i));
  made.addEventListener("blur", hide);
  return made;
}

// A line break gets a visible sign, and other control characters, which a page does not show, are named.
function visible(piece) {
  return piece.replace(/\n/g, "⏎\n").replace(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f]/g,
    (character) => `\\x${character.charCodeAt(0).toString(16).padStart(2, "0")}`);
}

function describe(token, row, i) {
  const lines = NUMBERS.filter((name) => row[name]).map((name) => [name, show(row[name][i])]);
  if (row.ref_logprob) lines.push(["KL", show(row.logprob[i] - row.ref_logprob[i])]);
  lines.push(["clipped", row.clipped[i] ? "yes" : "no"]);
  if (!row.in_loss[i]) lines.push(["in the loss", "no"]);
  const title = row.pieces && row.pieces[i] ? `${JSON.stringify(row.pieces[i])}, id ${row.tokens[i]}` : `id ${row.tokens[i]}`;
  const table = node("table", {}, ...lines.map(([name, text]) =>
    node("tr", {}, node("th", { textContent: name }), node("td", { textContent: text }))));
  const box = element("numbers");
  box.replaceChildren(node("strong", { textContent: title }), table);
  box.hidden = false;
  const place = token.getBoundingClientRect();
  const left = Math.min(place.left, document.documentElement.clientWidth - box.offsetWidth - 8);
  const below = place.bottom + 6 + box.offsetHeight <= window.innerHeight;
  const top = below ? place.bottom + 6 : Math.max(place.top - box.offsetHeight - 6, 0);
  box.style.left = `${Math.max(left, 0) + window.scrollX}px`;
  box.style.top = `${top + window.scrollY}px`;
}

function hide() { element("numbers").hidden = true; }

function drawSamples() {
  const name = element("quantity").value;
  const quantity = QUANTITIES[name];
  const articles = byStep.get(steps[current]).map((row) => {
    const words = node("div", { className: "words" }, node("span", { className: "prompt", textContent: promptOf(row) }));
    words.append(...row.tokens.map((_, i) => tokenNode(row, i, quantity, scales.get(name))));
    const clipped = row.clipped.reduce((a, b) => a + b, 0);
    const score = row.score === null ? "no score" : `score ${show(row.score)}`;
    return node("article", {}, node("h2", { textContent: `${score} · ${row.tokens.length} tokens · ${clipped} clipped` }), words);
  });
  element("samples").replaceChildren(...articles);
  const first = element("samples").querySelector(".token");
  if (first) first.tabIndex = 0; // the arrow keys lead to the others
}

function promptOf(row) {
  return typeof row.prompt === "string" ? row.prompt : row.prompt.map((id) => `⟨${id}⟩`).join("") + " ";
}

function drawLegend() {
  const name = element("quantity").value;
  const { shown = (x) => x, zero, text } = QUANTITIES[name];
  const scale = scales.get(name);
  element("least").textContent = show(shown(zero - scale));
  element("most").textContent = show(shown(zero + scale));
  const stops = [-1, -0.5, 0, 0.5, 1].map(colour).join(", ");
  element("bar").style.background = `linear-gradient(to right, ${stops})`;
  element("meaning").textContent = `${name}: ${text}. Hover over a token, or press Tab and the arrow keys, for its numbers.`;
}

function curve(name) {
  const points = run.metrics.filter((line) => Number.isFinite(line[name])).map((line) => [line.step, line[name]]);
  const [first, last] = [run.metrics[0].step, run.metrics.at(-1).step];
  const values = points.map(([, y]) => y);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const across = (x) => (last > first ? (100 * (x - first)) / (last - first) : 50);
  const up = (y) => (high > low ? 38 - (36 * (y - low)) / (high - low) : 20);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 40");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${name} over the steps, from ${show(low)} to ${show(high)}`);
  const line = document.createElementNS(svg.namespaceURI, "polyline");
  line.setAttribute("points", points.map(([x, y]) => `${across(x).toFixed(2)},${up(y).toFixed(2)}`).join(" "));
  const marker = document.createElementNS(svg.namespaceURI, "line");
  svg.append(line, marker);
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    const step = first + ((event.clientX - box.left) / box.width) * (last - first);
    goTo(steps.reduce((best, at, index) => (Math.abs(at - step) < Math.abs(steps[best] - step) ? index : best), 0));
  });
  const value = node("span", { className: "value" });
  const mark = (step) => {
    for (const [key, number] of [["x1", across(step)], ["x2", across(step)], ["y1", 0], ["y2", 40]]) marker.setAttribute(key, number);
    const there = points.filter(([x]) => x <= step).at(-1);
    value.textContent = there ? show(there[1]) : "–";
  };
  const caption = node("figcaption", {}, node("span", { className: "name", textContent: name }), value);
  return { figure: node("figure", {}, caption, svg), mark };
}

const names = [...new Set(run.metrics.flatMap((line) => Object.keys(line)))].filter((name) => name !== "step");
const first = run.curves.filter((name) => names.includes(name));
const curves = [...first, ...names.filter((name) => !first.includes(name))]
  .filter((name) => run.metrics.some((line) => Number.isFinite(line[name]))).map(curve);
element("curves").append(...curves.map(({ figure }) => figure));

function goTo(index) {
  current = Math.max(0, Math.min(steps.length - 1, index));
  element("step").value = current;
  element("at").textContent = `step ${steps[current]}`;
  hide();
  drawSamples();
  curves.forEach(({ mark }) => mark(steps[current]));
}

element("quantity").append(...available.map(([name]) => node("option", { value: name, textContent: name })));
element("quantity").addEventListener("change", () => { drawLegend(); drawSamples(); });
element("step").max = steps.length - 1;
element("step").addEventListener("input", (event) => goTo(Number(event.target.value)));
element("earlier").addEventListener("click", () => goTo(current - 1));
element("later").addEventListener("click", () => goTo(current + 1));
element("samples").addEventListener("keydown", (event) => {
  const tokens = [...element("samples").querySelectorAll(".token")];
  const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const to = tokens[tokens.indexOf(document.activeElement) + move];
  if (!move || !to) return;
  event.preventDefault();
  document.activeElement.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
});
drawLegend();
goTo(current);
