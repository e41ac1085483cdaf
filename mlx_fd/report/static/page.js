// The page's behaviour: theme, charts, episodes. What a model wrote enters as text nodes only.
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

// Episodes

const RIGHT_BEFORE = 1, RIGHT_AFTER = 2, UNREADABLE = 4, ALONE = 8, LEARNED = 16, CAPPED = 32;
const FILTERS = {
  all: ["all", () => true],
  mended: ["wrong to right", (flags) => !(flags & RIGHT_BEFORE) && flags & RIGHT_AFTER],
  spoiled: ["right to wrong", (flags) => flags & RIGHT_BEFORE && !(flags & RIGHT_AFTER)],
  right: ["right, and stayed so", (flags) => flags & RIGHT_BEFORE && flags & RIGHT_AFTER],
  wrong: ["wrong, and stayed so", (flags) => !(flags & (RIGHT_BEFORE | RIGHT_AFTER))],
  unreadable: ["a score could not be read", (flags) => flags & UNREADABLE],
  alone: ["student alone, expert not asked", (flags) => flags & ALONE],
  learned: ["learned from", (flags) => flags & LEARNED],
  capped: ["cut at the token limit", (flags) => flags & CAPPED],
};
const STEPS = {
  answer: "first answer",
  student_feedback: "student's feedback",
  expert_feedback: "expert's feedback",
  merge: "merged feedback",
  revise: "revision",
  critique: "self-critique",
  final: "final answer",
};
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
const verdict = (right) => (right ? "right" : "wrong");
const change = (flags) => `${verdict(flags & RIGHT_BEFORE)} → ${verdict(flags & RIGHT_AFTER)}`;
const tone = (flags) => (flags & RIGHT_AFTER ? "good" : "bad");

async function openBrowser() {
  const linked = /^#e-(\d+)-(\d+)$/.exec(location.hash);
  for (let run = 0; run < facts.runs.length; run += 1) {
    const lines = await unpack(`index-${run}`);
    entries = entries.concat(
      lines.map(([episode, id, question, flags, expert, student], place) => ({
        run, place, episode, id, question, flags, expert, student,
      })),
    );
  }
  for (const [value, [label, test]] of Object.entries(FILTERS)) {
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
  performance.mark("episodes");
  const target = linked && entries.find((e) => e.run === +linked[1] && e.episode === +linked[2]);
  if (target) {
    await go(target);
    find("episode").scrollIntoView();
  }
}

async function haystack(entry) {
  if (entry.haystack === undefined) {
    const row = await whole(entry);
    entry.haystack = [
      row.id, row.question, row.reference, row.answer.text, row.expert_feedback?.text,
      row.student_feedback.text, row.gate.reason, row.merged, row.revised, row.critique, row.final.text,
    ].filter(Boolean).join("\n").toLowerCase();
  }
  return entry.haystack;
}

async function select() {
  const mine = (request += 1);
  const [, test] = FILTERS[find("filter").value];
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
  find("count").textContent = `${shown.length} of ${entries.length} episodes`;
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
    element("span", {}, facts.runs.length > 1 ? `${facts.runs[entry.run].name} #${entry.episode}` : `#${entry.episode}`),
    element("span", { class: tone(entry.flags) }, change(entry.flags)),
  );
  const begin = element("span", { class: "begin", dir: "auto" }, visible(entry.question));
  const made = element("button", { type: "button", onclick: () => show(entry) }, top, begin);
  made.entry = entry;
  return element("li", {}, made);
}

/** Mark the open episode in the list; it, or else the first, is what Tab comes to. */
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

/** Open an episode, and the page of the list it is on. */
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
    find("episode").replaceChildren(element("p", {}, "No episode is like this."));
    return;
  }
  const row = await whole(entry);
  if (current !== entry) return;
  find("episode").replaceChildren(...episode(entry, row));
  if (location.hash !== "" || document.activeElement?.entry) {
    history.replaceState(null, "", `#e-${entry.run}-${entry.episode}`);
  }
}

function episode(entry, row) {
  const at = shown.indexOf(entry);
  const step = (label, to) =>
    element("button", { type: "button", disabled: !shown[to], onclick: () => go(shown[to]).then(() => find("episode").focus()) }, label);
  const twins = entries.filter((other) => other.id === entry.id && other.run !== entry.run);
  const title = facts.runs.length > 1 ? `${facts.runs[entry.run].name}, episode ${row.episode}` : `Episode ${row.episode}`;
  const steps = [
    element("div", { class: "moves" }, step("Previous", at - 1), step("Next", at + 1),
      ...twins.map((twin) => element("button", { type: "button", onclick: () => go(twin) }, `The same problem in ${facts.runs[twin.run].name}`))),
    element("h3", {}, title),
    overview(row, entry),
    ...block("Question", row.question),
    ...block("First answer", row.answer.text, `${final(row.answer)}, ${verdict(row.correct_before)}`, cut(row, "answer")),
    feedbacks(row),
  ];
  if (row.merged !== null) steps.push(...block("Merged feedback", row.merged, cut(row, "merge")));
  if (row.revised !== null) {
    steps.push(...block("Revision", compared(row.answer.text, row.revised, "changed") ?? row.revised, "words that the first answer does not have are marked", cut(row, "revise")));
  }
  if (row.critique !== null) steps.push(...block("Self-critique", row.critique, cut(row, "critique")));
  if (row.revised !== null) {
    steps.push(...block("Final answer", row.final.text, `${final(row.final)}, ${verdict(row.correct_after)}`, cut(row, "final")));
  } else {
    steps.push(element("p", {}, "The combined score reached the target: the first answer stayed as it was."));
  }
  steps.push(costs(row));
  const body = element("div", { class: "marked" }, ...steps);
  return [body];
}

const final = (answer) => (answer.final === null ? "no number could be read" : `number read: ${visible(answer.final)}`);
const cut = (row, step) => (row.capped.includes(step) ? "cut at the token limit" : null);

function overview(row, entry) {
  const items = {
    problem: row.id,
    "reference answer": row.reference,
    "right before → after": change(entry.flags),
    "combined score": number(row.score),
    gate: `${row.gate.distilled ? "learned from" : "not learned from"}: ${row.gate.reason}`,
  };
  const list = element("dl");
  for (const [name, value] of Object.entries(items)) {
    list.append(element("dt", {}, name), element("dd", { dir: "auto" }, visible(value)));
  }
  return list;
}

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

function feedbacks(row) {
  const expert = row.expert_feedback;
  const student = row.student_feedback;
  const sides = expert ? bothCompared(expert.text, student.text) : null;
  const written = student.written_score === null ? "not readable" : student.written_score.toFixed(2);
  const left = expert
    ? block("Expert's feedback", sides?.[0] ?? expert.text, `score ${number(expert.score)}`, cut(row, "expert_feedback"))
    : [element("h4", {}, "Expert's feedback"), element("p", {}, "The expert was not asked.")];
  const right = block("Student's feedback", sides?.[1] ?? student.text, `score ${number(student.score)}, written ${written}`, cut(row, "student_feedback"));
  const pair = element("div", { class: "pair" }, element("div", { class: "expert" }, ...left), element("div", { class: "student" }, ...right));
  const group = element("div", {}, pair);
  if (sides) {
    const box = element("input", { type: "checkbox", checked: true, onchange: () => find("episode").firstChild.classList.toggle("marked", box.checked) });
    group.append(element("label", { class: "check" }, box, "mark the words that only one side has"));
  } else if (expert) {
    group.append(element("p", {}, "These are too long to be compared word by word."));
  }
  return group;
}

function costs(row) {
  const body = element("tbody");
  for (const [step, label] of Object.entries(STEPS)) {
    if (!(step in row.tokens) && !(step in row.seconds)) continue;
    const cells = [row.tokens[step], row.prefilled[step], row.seconds[step]];
    body.append(element("tr", {}, element("th", { scope: "row" }, label), ...cells.map((value) => element("td", {}, value === undefined ? "–" : value.toLocaleString("en")))));
  }
  const losses = Object.entries(row.gate.losses_before).map(([name, before]) =>
    element("tr", {}, element("th", { scope: "row" }, `${name} loss`), ...[before, row.gate.losses_after[name]].map((value) => element("td", {}, value === undefined ? "–" : value.toPrecision(3)))));
  const heads = (...names) => element("thead", {}, element("tr", {}, element("td"), ...names.map((name) => element("th", { scope: "col" }, name))));
  const tables = [element("table", {}, element("caption", {}, "Tokens and seconds"), heads("written", "read first", "seconds"), body)];
  if (losses.length) {
    tables.push(element("table", {}, element("caption", {}, "The student's losses on the expert's feedback"), heads("before", "after"), element("tbody", {}, ...losses)));
  }
  return element("details", {}, element("summary", {}, "Tokens, time and losses"), ...tables.map((table) => element("div", { class: "scroll" }, table)));
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
    find("browser").before(element("p", { class: "note" }, "This browser is too old to unpack the episodes; use one from 2023 or later."));
  } else {
    browsing = openBrowser();
  }
}
// The library comes after this script, so that the episodes need not wait for it.
addEventListener("load", () => browsing.finally(drawCharts));
