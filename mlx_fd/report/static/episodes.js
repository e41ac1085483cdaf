// Episodes of the loop, as page.js shows them. The numbers of the flags are packing.py's.
"use strict";

const RIGHT_BEFORE = 1, RIGHT_AFTER = 2, UNREADABLE = 4, ALONE = 8, LEARNED = 16, CAPPED = 32;
const UNGRADED = 64, GOOD = 128, POOR = 256;
const FILTERS = {
  all: ["all", () => true],
  good: ["first answer good, by the expert", (flags) => flags & GOOD],
  poor: ["first answer not good, by the expert", (flags) => flags & POOR],
  mended: ["wrong to right", (flags) => !(flags & RIGHT_BEFORE) && flags & RIGHT_AFTER],
  spoiled: ["right to wrong", (flags) => flags & RIGHT_BEFORE && !(flags & RIGHT_AFTER)],
  right: ["right, and stayed so", (flags) => flags & RIGHT_BEFORE && flags & RIGHT_AFTER],
  wrong: ["wrong, and stayed so", (flags) => !(flags & (RIGHT_BEFORE | RIGHT_AFTER | UNGRADED))],
  unreadable: ["a score could not be read", (flags) => flags & UNREADABLE],
  alone: ["student alone, expert skipped", (flags) => flags & ALONE],
  learned: ["distilled", (flags) => flags & LEARNED],
  capped: ["cut at the token limit", (flags) => flags & CAPPED],
};
const byExpert = (flags) => (flags & GOOD ? "good, by the expert" : flags & POOR ? "not good, by the expert" : "without a verdict");
const change = (flags) => (flags & UNGRADED ? byExpert(flags) : `${verdict(flags & RIGHT_BEFORE)} → ${verdict(flags & RIGHT_AFTER)}`);
const grade = (flags) => (flags & (RIGHT_AFTER | GOOD) ? "good" : flags & UNGRADED && !(flags & POOR) ? "" : "bad");
/** What is known of an answer. */
const found = (final, right) => (right === null ? null : `${finalAnswer(final)}, ${verdict(right)}`);

function parts(entry, row) {
  const steps = [
    overview(row, entry),
    ...block("Question", row.question),
    ...block("First answer", row.answer.text, found(row.answer.final, row.correct_before), cut(row, "answer")),
    feedbacks(row),
  ];
  const again = row.verdict?.again;
  if (again) steps.push(...block("Expert's feedback, told the right answer", again.text, `score ${number(again.written_score)}`, row.verdict.outcome, cut(row, "privileged_feedback")));
  const later = row.student_feedback_again;
  if (later) steps.push(...block("Student's feedback after learning", later.text, cut(row, "student_feedback_again")));
  const own = row.expert_solution;
  if (own) steps.push(...block("Expert's own solution", own.text, finalAnswer(own.final), cut(row, "expert_solution")));
  if (row.merged) steps.push(...block("Merged feedback", row.merged, cut(row, "merge")));
  if (row.revised) {
    steps.push(...block("Revision", compared(row.answer.text, row.revised, "changed") ?? row.revised, "words that the first answer does not have are marked", cut(row, "revise")));
  }
  if (row.revised || row.critique) {
    steps.push(...block("Self-critique", row.critique, cut(row, "critique")));
    steps.push(...block("Final answer", row.final.text, found(row.final.final, row.correct_after), cut(row, "final")));
  } else {
    steps.push(element("p", {}, own
      ? "The student alone found the first answer right, and the expert came to the same: it stayed as it was."
      : "The combined score reached the target: the first answer stayed as it was."));
  }
  steps.push(costs(row));
  return steps;
}

const cut = (row, step) => (row.capped.includes(step) ? "cut at the token limit" : null);

function overview(row, entry) {
  return definitions({
    problem: row.id,
    ...(row.correct_before === null
      ? { "right answer": UNKNOWN, "first answer": change(entry.flags) }
      : { "reference answer": row.reference, "right before → after": change(entry.flags) }),
    "combined score": number(row.score),
    "expert's score against gold": row.verdict?.outcome ?? "–",
    gate: `${row.gate.distilled ? "distilled" : "not distilled"}: ${row.gate.reason}`,
  });
}

function feedbacks(row) {
  const expert = row.expert_feedback;
  const student = row.student_feedback;
  const sides = expert ? bothCompared(expert.text, student.text) : null;
  const written = student.written_score === null ? "not readable" : student.written_score.toFixed(2);
  const left = expert
    ? block("Expert's feedback", sides?.[0] ?? expert.text, `score ${number(expert.written_score)}`, cut(row, "expert_feedback"))
    : [element("h4", {}, "Expert's feedback"), element("p", {}, "The expert was skipped.")];
  const right = block("Student's feedback", sides?.[1] ?? student.text, `score ${number(student.head_score)}, written ${written}`, cut(row, "student_feedback"));
  const pair = element("div", { class: "pair" }, element("div", { class: "expert" }, ...left), element("div", { class: "student" }, ...right));
  const group = element("div", {}, pair);
  if (sides) {
    const box = element("input", { type: "checkbox", checked: true, onchange: () => find("record").firstChild.classList.toggle("marked", box.checked) });
    group.append(element("label", { class: "check" }, box, "mark the words that only one side has"));
  } else if (expert) {
    group.append(element("p", {}, "These are too long to be compared word by word."));
  }
  return group;
}

function costs(row) {
  const body = element("tbody");
  const steps = new Set([...Object.keys(facts.steps), ...Object.keys(row.tokens), ...Object.keys(row.seconds)]);
  for (const step of steps) {
    if (!(step in row.tokens) && !(step in row.seconds)) continue;
    const label = facts.steps[step] ?? step.replaceAll("_", " ");
    const cells = [row.tokens[step], row.prefilled[step], row.seconds[step]];
    body.append(element("tr", {}, element("th", { scope: "row" }, label), ...cells.map((value) => element("td", {}, value === undefined ? "–" : value.toLocaleString("en")))));
  }
  const losses = Object.entries(row.gate.losses_before).map(([name, before]) =>
    element("tr", {}, element("th", { scope: "row" }, `${name} loss`), ...[before, row.gate.losses_after[name]].map((value) => element("td", {}, value === undefined ? "–" : value.toPrecision(3)))));
  const heads = (...names) => element("thead", {}, element("tr", {}, element("td"), ...names.map((name) => element("th", { scope: "col" }, name))));
  const tables = [element("table", {}, element("caption", {}, element("span", {}, "Tokens and seconds")), heads("written", "read first", "seconds"), body)];
  if (losses.length) {
    tables.push(element("table", {}, element("caption", {}, element("span", {}, "The student's losses on the expert's feedback")), heads("before", "after"), element("tbody", {}, ...losses)));
  }
  return element("details", {}, element("summary", {}, "Tokens, time and losses"), ...tables.map((table) => element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": table.caption.textContent }, table)));
}

const KIND = {
  one: "episode",
  filters: FILTERS,
  grade,
  verdict: change,
  texts: (row) => [
    row.answer.text, row.expert_feedback?.text, row.student_feedback.text, row.gate.reason,
    row.merged, row.revised, row.critique, row.final.text,
  ],
  parts,
};
