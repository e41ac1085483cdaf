"""What wrong verdicts of the expert cost, and what leaving them out or asking again saves.

python scripts/bench_verdicts.py --runs DIR     # every arm, five seeds; goes on where it stopped
python scripts/bench_verdicts.py --arms 'as-is 40 %' --seeds 0 --runs DIR
python scripts/bench_verdicts.py --table        # docs/bench_verdicts.md, from the rows alone

The tiny expert judges nearly every answer rightly, so it is made worse on purpose: of a known
share of the problems, drawn by seed and problem, its feedback is replaced by one that says the
contrary in the same form (score and text: of a wrong answer that every step is right, of a right
one a slip that is none). All arms of a seed have the same problems, wrong verdicts, numbers of
steps and questions at the end. Only losses on the text and the score are taken: the tiny expert's
states know better than the text that it is given, as those of a model that errs would not. No
answer is revised and no feedback of the student merged, as no solution is learned from.

Told the right answer, the expert is taken at its own word. It reads no English, so the right answer
stands behind the question in the form that it knows, "#### 34". Rows go to
docs/bench_verdicts.jsonl, one for each run.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_method import AFTER, against, column, head_error, quality
from rows import Row, add, bits, bold, latest, made, of_arms, shown
from several_runs import of_problems, over_runs

from mlx_fd.evaluation.statistics import Estimate

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE = (DOCS / f"bench_verdicts.{kind}" for kind in ("jsonl", "md"))
HOW = ("as-is", "checked", "privileged")
SHARES = (20, 40)
NO_ERRORS = "as-is 0 %"
# {arm: (share of wrong verdicts, what becomes of them)}
ARMS: dict[str, tuple[float, str]] = {
    NO_ERRORS: (0.0, "as-is"),
    **{f"{how} {share} %": (share / 100, how) for share in SHARES for how in HOW},
}
# Beside the preset tiny. Nothing is revised and no solution learned from, so that all of a run goes
# into judging.
OPTIONS: dict[str, Any] = {
    "gate": "always",
    "order": "learn-last",
    "losses": ("lm", "score"),
    "solutions": False,
    "target_score": -1.0,
    "episodes": 96,
    "probe_size": 4,
    "exam_size": 80,
    # As when the rows were made: the preset learns more since, from its own feedback, too.
    "score_at": "feedback",
    "replay": 0.0,
    "step_samples": 0,
    "lr_schedule": "constant",
    "batch_size": 32,
    "kd_steps": 4,
    "lora_rate": 1e-3,
}


# ---- the worse expert ----


def is_hit(seed: int, problem_id: str, share: float) -> bool:
    """Whether the verdict on a problem is made wrong; a larger share has all of a smaller one."""
    digest = hashlib.sha256(f"verdict/{seed}/{problem_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def contrary(problem: Any, answer: str, right: bool, seed: int) -> Any:
    """The feedback that says the contrary of the truth, in the tiny expert's form."""
    from mlx_fd.problems import arithmetic, prompts

    if not right:
        steps, final = arithmetic.read(answer)
        if not steps or final is None:
            return prompts.Feedback("Every step is right.", 1.0)
        return arithmetic.feedback(arithmetic.write(steps, final), answer)
    rng = random.Random(f"{seed}/{problem.id}")
    drawn = arithmetic.problems_of("train")[int(problem.id.rpartition("-")[2])]
    return arithmetic.feedback(arithmetic.wrong_answer(rng, drawn), answer)


@contextlib.contextmanager
def made_worse(share: float, seed: int) -> Iterator[None]:
    """The expert's first feedback replaced where it is hit, and the right answer told its way.

    The student's own feedback, which nothing here depends on, is not written.
    """
    from mlx_fd.feedback import episode, turns, verdicts
    from mlx_fd.feedback.criticism import feedback_request
    from mlx_fd.feedback.stages import StudentFeedback
    from mlx_fd.models.conversation import Conversation, without_repeated_eos
    from mlx_fd.models.generation import said
    from mlx_fd.problems.kinds import form_of
    from mlx_fd.problems.prompts import Feedback, answer_prompt, format_feedback

    honest = turns.write_expert_feedback

    def worse(pair: Any, answered: Any, *rest: Any) -> Any:
        given = yield from honest(pair, answered, *rest)
        if not is_hit(seed, answered.problem.id, share):
            return given
        feedback = contrary(answered.problem, answered.answer.text, answered.is_correct, seed)
        text = format_feedback(feedback).removeprefix("Score:")
        tokenizer = pair.expert.tokenizer
        tokens = tuple(tokenizer.encode(text, add_special_tokens=False))
        tokens += given.feedback.tokens[-1:]  # the token that ends a turn
        said_so = Conversation((*answered.prompt, *tokens))
        feedback = dataclasses.replace(feedback, tokens=tokens)
        return dataclasses.replace(given, feedback=feedback, conversation=said_so)

    def told(pair: Any, asked: Any, options: Any, step: str) -> Any:
        problem, tokens = asked.problem, asked.answer.tokens
        first = f"{answer_prompt(problem.question, form_of(problem))}\n\n#### {problem.answer}"
        before = Conversation(said(pair.expert, first, tokens))
        request = without_repeated_eos(before, feedback_request(pair.expert))
        asked = dataclasses.replace(asked, conversation=before, request=request)
        given = yield from honest(pair, asked, options, step)
        return dataclasses.replace(given, prompt=asked.prompt)

    def silent(pair: Any, answered: Any, *rest: Any) -> Any:
        return StudentFeedback(Feedback("", None), None)
        yield

    changed = {
        (turns, "write_expert_feedback"): worse,  # of the probe set
        (episode, "write_expert_feedback"): worse,
        (episode, "write_student_feedback"): silent,
        (verdicts, "write_expert_feedback"): told,
    }
    before = {(module, name): getattr(module, name) for module, name in changed}
    try:
        for (module, name), function in changed.items():
            setattr(module, name, function)
        yield
    finally:
        for (module, name), function in before.items():
            setattr(module, name, function)


# ---- rows and table ----


def make_row(arm: str, seed: int, runs_folder: Path) -> Row:
    """An arm's run of a seed, as a row."""
    from mlx_fd import runs
    from mlx_fd.config import override, preset, to_toml
    from mlx_fd.evaluation.exam import exam_questions, examine
    from mlx_fd.feedback.pair import open_pair
    from mlx_fd.runs.plan import make_plan
    from mlx_fd.training.job import Job
    from mlx_fd.training.loop import run

    share, how = ARMS[arm]
    # A run is short: one that was stopped begins anew.
    folder = runs_folder / f"{arm.replace(' %', '').replace(' ', '-')}-seed{seed}"
    config = override(
        preset("tiny"), {**OPTIONS, "expert_verdicts": how, "seed": seed}, "bench_verdicts"
    )
    shutil.rmtree(folder, ignore_errors=True)
    begun = time.process_time()
    plan, questions = make_plan(config), exam_questions(config)
    pair = open_pair(plan)
    with made_worse(share, seed), runs.locked(folder):
        runs.create(folder, to_toml(plan.config), plan.manifest)
        job = Job(folder, plan.config, plan.probe, plan.problems, lambda event: None)
        summary = run(job, pair)
    assert summary is not None
    after = examine(pair, questions, config.generation, lambda step, tokens: None)
    return {
        "arm": arm,
        "seed": seed,
        **made(),
        "episodes": summary["episodes"],
        "updates": summary["updates"]["steps"],
        "cpu_seconds": round(time.process_time() - begun, 1),
        "verdicts": summary["expert_verdicts"],
        "wrong": bits(result.wrong for result in after),
        # As bench_method's rows have it: before (not asked here) and after.
        "found": ["", bits(result.found for result in after)],
        "score_error": [[], [round(result.score_error, 3) for result in after]],
    }


def found_among(rows: Sequence[Row], wrong: bool) -> Estimate:
    """The share of wrong answers whose first error is named, or of right ones that are passed."""
    return over_runs(
        [
            of_problems([column(row, "found", AFTER)[column(row, "wrong") == float(wrong)]])
            for row in rows
        ]
    )[0]


PAIRS = (
    ("as-is 40 %", NO_ERRORS),
    ("checked 40 %", "as-is 40 %"),
    ("privileged 40 %", "as-is 40 %"),
    ("as-is 20 %", NO_ERRORS),
    ("checked 20 %", "as-is 20 %"),
    ("privileged 20 %", "as-is 20 %"),
)


def difference(rows: Sequence[Row], others: Sequence[Row], name: str, wrong: float | None) -> str:
    """How far two arms are apart in a column, on wrong or right answers or all, paired."""
    reference = {row["seed"]: row for row in others}
    found = []
    for row in rows:
        if row["seed"] in reference:
            apart = column(row, name, AFTER) - column(reference[row["seed"]], name, AFTER)
            found.append(of_problems([apart[_of(row, wrong)]]))
    estimate, _ = over_runs(found)
    return bold(estimate)


def _of(row: Row, wrong: float | None) -> Any:
    marks = column(row, "wrong")
    return marks == wrong if wrong is not None else marks >= 0


def differences(arms: dict[str, list[Row]]) -> list[str]:
    """The second table: pairs of arms."""
    lines = [
        "",
        "Differences, paired by seed and question; intervals are not corrected for their number.",
        "",
        "| | against | first errors found (points) | right answers passed (points) | error of the "
        "score head (hundredths) |",
        "|---|---|---|---|---|",
    ]
    for arm, other in PAIRS:
        if arm in arms and other in arms:
            rows, others = arms[arm], arms[other]
            cells = [
                difference(rows, others, "found", 1.0),
                difference(rows, others, "found", 0.0),
                difference(rows, others, "score_error", None),
            ]
            lines.append(f"| {arm} | {other} | {' | '.join(cells)} |")
    return lines


def table(path: Path) -> str:
    """The rows as a table in Markdown."""
    arms = of_arms(path, ARMS)
    some = next(iter(arms.values()))
    lines = [
        f"Tiny pair, seeds {', '.join(str(row['seed']) for row in some)}, {some[0]['episodes']} "
        f"episodes, losses `lm` and `score`, {len(some[0]['wrong'])} questions a seed, half of the "
        "answers wrong. In brackets 95 % t intervals over runs, paired by seed and question where "
        "it is a difference; bold where they leave 0 out.",
        "",
        "| wrong verdicts | `--expert-verdicts` | F1 (%) | F1 against as-is (points) | F1 against "
        "no wrong verdicts (points) | first errors found (%) | right answers passed (%) | error of "
        "the score head | contradicted | left out | asked again | learned from |",
        "|--:|---|---|---|---|---|---|---|--:|--:|--:|--:|",
    ]
    for arm, rows in arms.items():
        share, how = ARMS[arm]
        as_is = arms.get(f"as-is {share * 100:.0f} %", [])

        def mean(name: str, rows: Sequence[Row] = rows) -> float:
            return float(np.mean([row["verdicts"][name] for row in rows]))

        known = float(np.mean([row["episodes"] for row in rows]))
        cells = [
            f"{share:.0%}",
            f"`{how}`",
            shown(quality(rows), ".1f"),
            "" if how == "as-is" else bold(against(rows, as_is)),
            "" if arm == NO_ERRORS else bold(against(rows, arms.get(NO_ERRORS, []))),
            shown(found_among(rows, True), ".1f"),
            shown(found_among(rows, False), ".1f"),
            shown(head_error(rows), ".2f", 1),
            f"{mean('contradicted') / known:.0%}",
            f"{mean('left_out'):.0f}",
            f"{mean('asked_again'):.0f}",
            f"{known - mean('left_out'):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *differences(arms)]) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Wrong verdicts, and what is done about them.")
    parser.add_argument("--runs", type=Path, help="where the run directories go")
    parser.add_argument("--arms", default=";".join(ARMS), help="separated by ;")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file with the rows")
    parser.add_argument("--table", action="store_true", help="write the table")
    options = parser.parse_args()
    if options.runs:
        from mlx_fd.models.backend import backend

        backend()
        options.runs.mkdir(parents=True, exist_ok=True)
        done = latest(options.rows, "arm", "seed")
        for seed in map(int, options.seeds.split(",")):
            for arm in options.arms.split(";"):
                if (arm, seed) in done:
                    continue
                row = make_row(arm, seed, options.runs)
                add(options.rows, row)
                print(arm, seed, row["cpu_seconds"], "s", flush=True)
    if options.table:
        TABLE.write_text(table(options.rows))


if __name__ == "__main__":
    main()
