// The page's behaviour: theme, charts, records (episodes or attempts, by KIND, which stands before
// this). What a model wrote enters as text nodes only.
"use strict";

const find = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// Theme

const theme = find("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
const nameTheme = () => {
  theme.textContent = isDark() ? "Light theme" : "Dark theme";
};
theme.hidden = false;
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
dark.addEventListener("change", nameTheme);
nameTheme();

// Charts, one after the other, so that the page answers in between

async function drawCharts() {
  for (const chart of document.querySelectorAll(".chart")) {
    await new Promise((resume) => setTimeout(resume));
    const specification = JSON.parse(chart.nextElementSibling.textContent);
    // Vega names the element that it draws into; ours around it has the chart's own text.
    const canvas = chart.appendChild(element("div"));
    try {
      await window.vegaEmbed(canvas, specification, {
        renderer: "svg",
        actions: false,
        ast: true, // Vega's interpreter: expressions without eval, which the page's policy forbids
        defaultStyle: false,
        tooltip: { disableDefaultStyle: true },
      });
    } catch (error) {
      console.error(error);
      chart.after(element("p", {}, "This chart could not be drawn."));
    }
  }
  document.documentElement.dataset.charts = "drawn";
  performance.mark("charts");
}

// Records

const PAGE = 50;
const FOLDED = 4000; // characters from which a text is folded
const PREVIEW = 1500;
const COMPARED = 4e6; // pairs of words at most

const facts = JSON.parse(find("facts").textContent);
const unpacked = new Map();
let entries = [];
let shown = [];
let page = 0;
let current = null;
let request = 0;

function unpack(id) {
  if (!unpacked.has(id)) {
    const bytes = Uint8Array.from(atob(find(id).textContent.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(id, new Response(stream).json());
  }
  return unpacked.get(id);
}

async function whole(entry) {
  const part = await unpack(`part-${entry.run}-${Math.floor(entry.place / facts.part)}`);
  return part[entry.place % facts.part];
}

/** Control characters as pictures of themselves. */
const visible = (text) =>
  text.replace(/[\u0000-\u0008\u000b-\u001f]/g, (letter) => String.fromCharCode(0x2400 + letter.charCodeAt(0)))
    .replaceAll("\u007f", "\u2421");

const number = (value) => (value === null || value === undefined ? "not readable" : value.toFixed(2));
const UNKNOWN = "no right answer is known";
const verdict = (right) => (right === null ? UNKNOWN : right ? "right" : "wrong");

async function openBrowser() {
  const linked = /^#e-(\d+)-(\d+)$/.exec(location.hash);
  for (let run = 0; run < facts.runs.length; run += 1) {
    const lines = await unpack(`index-${run}`);
    entries = entries.concat(
      lines.map(([number, id, question, flags], place) => ({ run, place, number, id, question, flags })),
    );
  }
  for (const [value, [label, test]] of Object.entries(KIND.filters)) {
    const n = entries.filter((entry) => test(entry.flags)).length;
    find("filter").append(element("option", { value }, `${label} (${n})`));
  }
  let waiting;
  find("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(select, 150);
  });
  find("filter").addEventListener("change", select);
  find("of")?.addEventListener("change", select);
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  find("earlier").addEventListener("click", () => turn(page - 1));
  find("later").addEventListener("click", () => turn(page + 1));
  find("list").addEventListener("keydown", onKey);
  find("browser").hidden = false;
  await select();
  performance.mark("records");
  const target = linked && entries.find((e) => e.run === +linked[1] && e.number === +linked[2]);
  if (target) {
    await go(target);
    find("record").scrollIntoView();
  }
}

async function haystack(entry) {
  if (entry.haystack === undefined) {
    const row = await whole(entry);
    entry.haystack = [row.id, row.question, row.reference, ...KIND.texts(row)].filter(Boolean).join("\n").toLowerCase();
  }
  return entry.haystack;
}

async function select() {
  const mine = (request += 1);
  const [, test] = KIND.filters[find("filter").value];
  const run = find("of")?.value ?? "";
  const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = entries.filter((entry) => test(entry.flags) && (run === "" || entry.run === +run));
  if (words.length) {
    const all = found;
    found = [];
    for (const entry of all) {
      const text = await haystack(entry);
      if (words.every((word) => text.includes(word))) found.push(entry);
      if (mine !== request) return; // the question has changed meanwhile
    }
  }
  shown = found;
  find("count").textContent = `${shown.length} of ${entries.length} ${KIND.one}s`;
  turn(0);
  if (!shown.includes(current)) await show(shown[0] ?? null);
}

function turn(to) {
  const pages = Math.max(1, Math.ceil(shown.length / PAGE));
  page = Math.min(Math.max(to, 0), pages - 1);
  find("list").replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map(line));
  find("list").scrollTop = 0;
  find("page").textContent = `page ${page + 1} of ${pages}`;
  find("earlier").disabled = page === 0;
  find("later").disabled = page === pages - 1;
  point();
}

function line(entry) {
  const top = element(
    "span", { class: "top" },
    element("span", {}, facts.runs.length > 1 ? `${facts.runs[entry.run].name} #${entry.number}` : `#${entry.number}`),
    element("span", { class: KIND.grade(entry.flags) }, KIND.verdict(entry.flags)),
  );
  const begin = element("span", { class: "begin", dir: "auto" }, visible(entry.question));
  const made = element("button", { type: "button", onclick: () => show(entry) }, top, begin);
  made.entry = entry;
  return element("li", {}, made);
}

/** Mark the open record in the list; it, or else the first, is what Tab comes to. */
function point() {
  const buttons = [...find("list").querySelectorAll("button")];
  for (const button of buttons) {
    button.setAttribute("aria-current", button.entry === current);
    button.tabIndex = -1;
  }
  const reached = buttons.find((button) => button.entry === current) ?? buttons[0];
  if (reached) reached.tabIndex = 0;
}

function onKey(event) {
  const at = shown.indexOf(event.target.entry);
  const to = {
    ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1, PageDown: at + PAGE, PageUp: at - PAGE,
  }[event.key];
  if (at < 0 || to === undefined) return;
  event.preventDefault();
  go(shown[Math.min(Math.max(to, 0), shown.length - 1)]).then(focusLine);
}

const focusLine = () => find("list").querySelector('[aria-current="true"]')?.focus();

/** Open a record, and the page of the list it is on. */
async function go(entry) {
  if (!shown.includes(entry)) {
    find("filter").value = "all";
    find("search").value = "";
    if (find("of")) find("of").value = "";
    await select();
  }
  const there = Math.floor(shown.indexOf(entry) / PAGE);
  if (there !== page) turn(there);
  await show(entry);
}

async function show(entry) {
  current = entry;
  point();
  if (!entry) {
    find("record").replaceChildren(element("p", {}, `No ${KIND.one} is like this.`));
    return;
  }
  const row = await whole(entry);
  if (current !== entry) return;
  find("record").replaceChildren(record(entry, row));
  if (location.hash !== "" || document.activeElement?.entry) {
    history.replaceState(null, "", `#e-${entry.run}-${entry.number}`);
  }
}

function record(entry, row) {
  const at = shown.indexOf(entry);
  const step = (label, to) =>
    element("button", { type: "button", disabled: !shown[to], onclick: () => go(shown[to]).then(() => find("record").focus()) }, label);
  const twins = facts.runs
    .map((_, run) => entries.find((other) => other.id === entry.id && other.run === run && run !== entry.run))
    .filter(Boolean);
  const title = facts.runs.length > 1
    ? `${facts.runs[entry.run].name}, ${KIND.one} ${entry.number}`
    : `${KIND.one[0].toUpperCase()}${KIND.one.slice(1)} ${entry.number}`;
  return element("div", { class: "marked" },
    element("div", { class: "moves" }, step("Previous", at - 1), step("Next", at + 1),
      ...twins.map((twin) => element("button", { type: "button", onclick: () => go(twin) }, `The same problem in ${facts.runs[twin.run].name}`))),
    element("h3", {}, title),
    ...KIND.parts(entry, row));
}

/** Names and values, as a list of definitions. */
function definitions(items) {
  const list = element("dl");
  for (const [name, value] of Object.entries(items)) {
    list.append(element("dt", {}, name), element("dd", { dir: "auto" }, visible(value)));
  }
  return list;
}

const finalAnswer = (final) => (final === null ? "no answer could be read" : `answer read: ${visible(final)}`);

/** A titled text; `text` is a string, or a list of nodes. A long one is folded, and says how long it is. */
function block(title, text, ...notes) {
  const head = element("h4", {}, title, element("small", {}, notes.filter(Boolean).join("; ")));
  if (typeof text !== "string") return [head, element("pre", { dir: "auto", class: "changed" }, ...text)];
  if (text === "") return [head, element("p", {}, "(empty)")];
  if (text.length <= FOLDED) return [head, element("pre", { dir: "auto" }, visible(text))];
  const pre = element("pre", { dir: "auto" }, `${visible(text.slice(0, PREVIEW))} …`);
  const button = element("button", { type: "button", "aria-expanded": "false", onclick: () => {
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", !open);
    pre.textContent = open ? `${visible(text.slice(0, PREVIEW))} …` : visible(text);
    button.textContent = open ? label : "Fold";
  } });
  const label = `Show all ${text.length.toLocaleString("en")} characters`;
  button.textContent = label;
  return [head, pre, button];
}

// Words

const wordsOf = (text) => text.match(/\s+|[\p{L}\p{M}\p{N}_]+|[^]/gu) ?? [];

/** Which words of each of two texts belong to a longest common subsequence; null for too many. */
function common(left, right) {
  let begin = 0;
  while (begin < left.length && begin < right.length && left[begin] === right[begin]) begin += 1;
  let end = 0;
  while (end < left.length - begin && end < right.length - begin && left.at(-1 - end) === right.at(-1 - end)) end += 1;
  const n = left.length - begin - end;
  const m = right.length - begin - end;
  if (n * m > COMPARED) return null;
  const width = m + 1;
  const longest = new Uint32Array((n + 1) * width);
  for (let i = n - 1; i >= 0; i -= 1) {
    for (let j = m - 1; j >= 0; j -= 1) {
      longest[i * width + j] = left[begin + i] === right[begin + j]
        ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  const kept = [left.map(() => true), right.map(() => true)];
  let i = 0, j = 0;
  while (i < n || j < m) {
    if (i < n && j < m && left[begin + i] === right[begin + j]) { i += 1; j += 1; }
    else if (j === m || (i < n && longest[(i + 1) * width + j] >= longest[i * width + j + 1])) kept[0][begin + i++] = false;
    else kept[1][begin + j++] = false;
  }
  return kept;
}

/** Words as text nodes and marks. */
function marked(words, kept) {
  const nodes = [];
  for (let begin = 0; begin < words.length;) {
    let end = begin;
    while (end < words.length && kept[end] === kept[begin]) end += 1;
    const text = visible(words.slice(begin, end).join(""));
    nodes.push(kept[begin] ? text : element("mark", {}, text));
    begin = end;
  }
  return nodes;
}

function bothCompared(left, right) {
  if (left.length > FOLDED || right.length > FOLDED) return null;
  const words = [wordsOf(left), wordsOf(right)];
  const kept = common(...words);
  return kept && [marked(words[0], kept[0]), marked(words[1], kept[1])];
}

const compared = (before, after) => bothCompared(before, after)?.[1] ?? null;

let browsing = Promise.resolve();
if (facts.runs.some((run) => run.parts)) {
  if (typeof DecompressionStream === "undefined") {
    find("browser").before(element("p", { class: "note" }, `This browser is too old to unpack the ${KIND.one}s; use one from 2023 or later.`));
  } else {
    browsing = openBrowser();
  }
}
// The library comes after this script, so that the records need not wait for it.
addEventListener("load", () => browsing.finally(drawCharts));
