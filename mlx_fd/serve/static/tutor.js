"use strict";

// Whatever a model or a learner wrote goes into the page as text, never as HTML.
const part = (id) => document.getElementById(id);
const STORE = "mlx-fd-tutor";
const KEY = "mlx-fd-key";
const MOST_KEPT = 50;
const STATES = {
  right: "This looks right",
  wrong: "Not right yet",
  unsure: "The student is not sure",
};
const MARKS = { right: "✓ right", wrong: "✗ the first wrong step", open: "– not judged" };
const FINAL_MARKS = {
  right: "✓ Your answer fits.",
  wrong: "✗ Your answer does not fit.",
  open: "– Your answer was not checked.",
};

let current = null; // the attempt on show: its problem, scores and hints
let asking = null; // the request that runs

function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE));
    return Array.isArray(found) ? found.filter((one) => one && typeof one.problem === "string") : [];
  } catch {
    return [];
  }
}

function keep(list) {
  try {
    if (list.length) localStorage.setItem(STORE, JSON.stringify(list.slice(0, MOST_KEPT)));
    else localStorage.removeItem(STORE);
  } catch {
    // A browser that keeps nothing has no list: the rest goes on.
  }
  showPast();
}

function remember(key) {
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // Then it is asked for again.
  }
}

function remembered() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

function element(name, text, kind) {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function showPast() {
  const list = kept();
  part("past").replaceChildren(
    ...list.map((one) => {
      const button = element("button", "");
      button.type = "button";
      const tries = one.tries === 1 ? "1 try" : `${Number(one.tries) || 0} tries`;
      const state = Object.hasOwn(STATES, one.state) ? one.state : "unsure";
      button.append(
        element("span", one.problem.slice(0, 160)),
        element("span", `${STATES[state]}, ${tries}`, state === "unsure" ? "open" : state),
      );
      button.addEventListener("click", () => open(one));
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
  part("past-none").hidden = list.length > 0;
  part("forget").hidden = list.length === 0;
}

function open(one) {
  clear();
  part("problem").value = one.problem;
  part("steps").value = typeof one.steps === "string" ? one.steps : "";
  part("final").value = typeof one.final === "string" ? one.final : "";
  part("steps").focus();
}

function clear() {
  asking?.abort();
  current = null;
  for (const id of ["problem", "steps", "final"]) part(id).value = "";
  part("result").hidden = true;
  say("");
}

function say(error) {
  part("error").hidden = !error;
  part("error").textContent = error;
}

// What was asked about: the learner may have written on meanwhile.
function note(asked, found) {
  const list = kept();
  const before = list.find((one) => one.problem === asked.problem);
  const one = {
    ...asked,
    tries: (before?.tries ?? 0) + 1,
    state: found.state,
  };
  keep([one, ...list.filter((other) => other.problem !== asked.problem)]);
}

function moved(score) {
  const last = current.scores.at(-1);
  current.scores.push(score);
  const shown = (value) => (value > 0 ? "+" : "") + value.toFixed(2);
  part("score").parentElement.hidden = score === null;
  if (score === null) return;
  part("score").value = score;
  part("score").textContent = shown(score);
  const before = typeof last === "number" ? `${shown(last)} → ` : "";
  part("moved").textContent = before + shown(score);
}

function because(found) {
  const said = [];
  if (found.first_wrong_step === 0) said.push("it finds every step right");
  else if (found.first_wrong_step) said.push("it names a wrong step");
  if (found.score) said.push(found.score > 0 ? "its score is good" : "its score is low");
  if (found.checked_by) {
    const who = found.checked_by === "expert" ? "the expert" : "the student";
    const same = found.final.mark === "right" ? "the same answer" : "another answer";
    said.push(`${who}, asked the problem, arrives at ${same}`);
  }
  return said.length ? `Why: ${said.join("; ")}.` : "Its feedback could not be read.";
}

function show(problem, found) {
  if (current === null || current.problem !== problem) current = { problem, scores: [] };
  Object.assign(current, { hints: found.hints, given: 0 });
  part("state").textContent = STATES[found.state];
  part("state").className = found.state === "unsure" ? "open" : found.state;
  part("because").textContent = because(found);
  moved(found.score);
  part("marks").replaceChildren(
    ...found.steps.map((step) => {
      const item = element("li", step.text);
      item.dataset.mark = step.mark;
      item.append(element("span", MARKS[step.mark], `mark ${step.mark}`));
      return item;
    }),
  );
  part("answer-mark").textContent = found.final.text ? FINAL_MARKS[found.final.mark] : "";
  part("answer-mark").className = found.final.mark;
  part("hints").replaceChildren();
  part("help").hidden = found.hints.length === 0;
  part("hint").disabled = false;
  part("hint").textContent = "Give me a hint";
  part("whole").open = false;
  part("feedback").textContent = found.feedback;
  part("result").hidden = false;
  part("state").focus();
}

function hint() {
  if (current === null || current.given >= current.hints.length) return;
  part("hints").append(element("li", current.hints[current.given]));
  current.given += 1;
  const left = current.hints.length - current.given;
  part("hint").textContent = left ? "A stronger hint" : "No more hints";
  part("hint").disabled = left === 0;
}

async function ask(problem, attempt) {
  asking?.abort();
  asking = new AbortController();
  const headers = { "Content-Type": "application/json" };
  const key = part("key").value || remembered();
  if (key) headers.Authorization = `Bearer ${key}`;
  const reply = await fetch("v1/tutor", {
    method: "POST",
    headers,
    body: JSON.stringify({ problem, attempt }),
    signal: asking.signal,
  });
  const found = await reply.json();
  if (reply.ok) {
    if (key) remember(key);
    return found;
  }
  if (reply.status === 401) {
    remember(null);
    part("key-line").hidden = false;
    part("key").focus();
  }
  throw new Error(found?.error?.message ?? `The server answered ${reply.status}.`);
}

async function check() {
  const problem = part("problem").value.trim();
  const steps = part("steps").value;
  const final = part("final").value.trim();
  const attempt = steps + (final ? `\n#### ${final}` : "");
  if (!problem || !attempt.trim()) {
    say("Write the problem, and at least one step or your answer.");
    return;
  }
  say("");
  part("check").disabled = true;
  part("check").textContent = "Checking …";
  try {
    const found = await ask(problem, attempt);
    show(problem, found);
    note({ problem, steps, final }, found);
  } catch (error) {
    if (error.name !== "AbortError") {
      say(error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message);
    }
  } finally {
    part("check").disabled = false;
    part("check").textContent = "Check";
  }
}

part("attempt").addEventListener("submit", (event) => {
  event.preventDefault();
  check();
});
part("attempt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !part("check").disabled) check();
});
part("hint").addEventListener("click", hint);
part("new").addEventListener("click", () => {
  clear();
  part("problem").focus();
});
part("forget").addEventListener("click", () => keep([]));
showPast();
