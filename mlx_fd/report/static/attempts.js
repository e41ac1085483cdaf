// Attempts of self-distillation, as page.js shows them. The numbers of the flags are packing.py's.
"use strict";

const RIGHT = 1, TEACHES = 2, CUT = 4, UNREAD = 8, TOLD = 16, UNGRADED = 64;
const FILTERS = {
  all: ["all", () => true],
  right: ["right", (flags) => flags & RIGHT],
  wrong: ["wrong", (flags) => !(flags & (RIGHT | UNGRADED))],
  teaches: ["moved the student", (flags) => flags & TEACHES],
  silent: ["did not move the student", (flags) => !(flags & TEACHES)],
  told: ["the self-teacher read more", (flags) => flags & TOLD],
  cut: ["cut at the token limit", (flags) => flags & CUT],
  unread: ["no answer could be read", (flags) => flags & UNREAD],
};
const verdictOf = (flags) => (flags & UNGRADED ? "" : verdict(flags & RIGHT));
const grade = (flags) => (flags & UNGRADED ? "" : flags & RIGHT ? "good" : "bad");
const nats = (value) => (value === null ? "not known" : `${value.toPrecision(3)} nats`);
const percent = (value) => (value === null ? "not known" : `${(100 * value).toFixed(1)} %`);
// More buttons than this are no help.
const SIBLINGS = 16;

function parts(entry, row) {
  const { context } = facts.runs[entry.run];
  const items = {
    problem: row.id,
    ...(row.correct === null
      ? { "right answer": UNKNOWN }
      : { "reference answer": row.reference, result: `${verdict(row.correct)}; ${finalAnswer(row.final)}` }),
    "moved the student": row.teaches ? "yes" : "no",
    reward: row.reward === null ? "none: no right answer is known" : row.group_advantage === null
      ? number(row.reward)
      : `${number(row.reward)}, against its group ${row.group_advantage.toFixed(2)}`,
    length: `${row.length} tokens${row.finished ? "" : ", cut at the token limit"}`,
    "entropy of a token": nats(row.entropy),
    "log-probability of a token": nats(row.logprob),
  };
  if (row.mean_abs_advantage !== null) {
    items["advantage of a token"] = `${nats(row.mean_abs_advantage)}, whatever its sign; negative on ${percent(row.negative_advantage)} of the tokens`;
  }
  const found = [
    siblings(entry),
    definitions(items),
    ...block("Question", row.question),
    ...block("Attempt", row.text, row.correct === null ? null : verdict(row.correct)),
  ];
  if (row.note) {
    const mended = context === "step-critique" ? compared(row.text, row.note) : null;
    found.push(...block("What was written on it", mended ?? row.note, mended && "words that the attempt does not have are marked"));
  }
  found.push(...row.teacher === null
    ? [element("h4", {}, "What the self-teacher read"), element("p", {}, "Nothing more than the student.")]
    : block("What the self-teacher read", row.teacher));
  return found;
}

/** Other attempts at the same problem in the same run. */
function siblings(entry) {
  const others = entries.filter((other) => other.run === entry.run && other.id === entry.id && other !== entry);
  if (!others.length) return null;
  const buttons = others.slice(0, SIBLINGS).map((other) =>
    element("button", { type: "button", class: grade(other.flags), onclick: () => go(other) }, `#${other.number} ${verdictOf(other.flags)}`));
  const more = others.length > SIBLINGS ? ` ${others.length - SIBLINGS} more` : "";
  return element("p", { class: "moves" }, "The same problem:", ...buttons, more);
}

const KIND = {
  one: "attempt",
  filters: FILTERS,
  grade,
  verdict: verdictOf,
  texts: (row) => [row.text, row.note, row.teacher],
  parts,
};
