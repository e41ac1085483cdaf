"""The student as the expert's draft, before its run and after it: the same texts, in fewer steps.

    python scripts/bench_speculative.py --runs RUN ...  # of the tiny pair; adds a row for each
    python scripts/bench_speculative.py --table         # docs/bench_speculative.md, from the rows

Each run has 50 held-out problems of its own. The expert answers them, and criticises the answers
that the untrained student gives at temperature 0.7, greedily and one text at a time: alone, with
the untrained student as its draft, and with the one of the run's best checkpoint. A row has each
problem's tokens, so that differences are paired.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rows import Row, add, latest, made
from several_runs import of_problems, over_runs

from mlx_fd.evaluation.statistics import Estimate, Rows

if TYPE_CHECKING:
    from mlx_fd.feedback.pair import Pair
    from mlx_fd.models.writing import Sampling, Turn
    from mlx_fd.problems import Problem

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE = (DOCS / f"bench_speculative.{kind}" for kind in ("jsonl", "md"))
PROBLEMS, TOKENS = 50, 4
KINDS = ("answer", "feedback")
PLAIN, UNTRAINED, TRAINED = "plain", "untrained", "trained"
Prompt = tuple[int, ...]
_KEPT = ("accepted", "proposed")


def make_row(folder: Path) -> Row:
    """What a run's student proposes, before it and after it."""
    from mlx_fd import problems, runs
    from mlx_fd.evaluation.target import Models, open_target
    from mlx_fd.models.backend import backend
    from mlx_fd.models.writing import sampling_for

    backend()
    target = open_target(str(folder), None)
    models, options = Models(target), target.config.generation
    seed = target.config.episode.seed
    begin = seed * PROBLEMS
    held_out = problems.load("arithmetic", "test").problems[begin : begin + PROBLEMS]
    assert len(held_out) == PROBLEMS, "a seed so high that there are no problems for it"
    with models.amateur(trained=False) as pair:
        prompts = prompts_of(pair, held_out, options)
    limits = {
        "answer": sampling_for(dataclasses.replace(options, answer_temperature=0.0), "answer", 0),
        "feedback": sampling_for(options, "expert_feedback", 0),
    }
    assert target.checkpoint is not None
    # A checkpoint is named after the batches that it has learned from.
    done = int(target.checkpoint.resolve().name) * options.batch_size
    learned = min(done, sum(1 for _ in (folder / runs.EPISODES).open()))
    row: Row = {
        "seed": seed,
        "episodes": learned,
        **made(),
        "device": backend().device,
        "tokens": TOKENS,
    }
    for kind in KINDS:
        found = {PLAIN: Written(models.pair, prompts[kind], limits[kind], 0)}
        for name in (UNTRAINED, TRAINED):
            with models.amateur(trained=name == TRAINED) as pair:
                found[name] = Written(pair, prompts[kind], limits[kind], TOKENS)
        texts = {name: [turn.tokens for turn in one.turns] for name, one in found.items()}
        row[kind] = {
            "written": [turn.written for turn in found[PLAIN].turns],
            "seconds": {name: round(one.seconds, 2) for name, one in found.items()},
            **{
                name: {
                    "same": sum(map(tuple.__eq__, texts[PLAIN], texts[name])),
                    "accepted": [turn.accepted for turn in found[name].turns],
                    "proposed": found[name].proposed,
                    "steps": found[name].steps,
                }
                for name in (UNTRAINED, TRAINED)
            },
        }
    return row


def prompts_of(
    pair: "Pair", held_out: "Sequence[Problem]", options: Any
) -> dict[str, list[Prompt]]:
    """What the expert reads before its answers, and before its feedback on the student's."""
    from mlx_fd.feedback.turns import first_answers
    from mlx_fd.models.generation import first_prompt
    from mlx_fd.problems.kinds import form_of
    from mlx_fd.problems.prompts import answer_prompt

    drawn = dataclasses.replace(options, answers_by="student", answer_temperature=0.7)
    answered = first_answers(pair, held_out, drawn, 0, lambda step, tokens: None)
    asked = [answer_prompt(one.question, form_of(one)) for one in held_out]
    return {
        "answer": [first_prompt(pair.expert, text) for text in asked],
        "feedback": [one.prompt for one in answered],
    }


class Written:
    """Texts of an expert, one at a time.

    Attributes:
        turns: the texts.
        steps: of the expert, for each.
        proposed: tokens that it tried in them, likewise.
        seconds: of all processors of this process.
    """

    def __init__(self, pair: "Pair", prompts: Sequence[Prompt], sampling: "Sampling", tokens: int):
        from mlx_fd.feedback.pair import with_draft
        from mlx_fd.models.conversation import Conversation
        from mlx_fd.models.generation import generate
        from mlx_fd.models.metering import WRITING, metered
        from mlx_fd.models.writing import GenerateOptions

        expert = with_draft(pair, tokens).expert
        alone, key = GenerateOptions(reuse=False), (WRITING, "expert")
        self.turns: list[Turn] = []
        self.steps: list[int] = []
        self.proposed: list[int] = []
        begin = time.process_time()
        for prompt in prompts:
            with metered({"expert": expert.view}) as meter:
                self.turns += generate(expert, [Conversation()], [prompt], sampling, alone)
            self.steps.append(meter.steps[key])
            # A step has a place more than it tries.
            self.proposed.append(meter.written[key] - meter.steps[key])
        self.seconds = time.process_time() - begin


# ---- what a row says ----


def _ratio(part: Rows, whole: Rows) -> float:
    return float(part.sum() / whole.sum())


def share(kind: str, name: str, what: str) -> Callable[[Sequence[Row]], list[Any]]:
    """Tokens accepted, or steps of the expert, for each token that was written."""
    return lambda rows: [
        of_problems([row[kind][name][what], row[kind]["written"]], _ratio) for row in rows
    ]


def kept(kind: str, name: str) -> Callable[[Sequence[Row]], list[Any]]:
    """Tokens accepted of those that were proposed."""
    return lambda rows: [
        of_problems([row[kind][name]["accepted"], row[kind][name]["proposed"]], _ratio)
        for row in rows
    ]


def kept_more(kind: str) -> Callable[[Sequence[Row]], list[Any]]:
    """The same with the trained student less with the untrained one."""

    def difference(after: Rows, of: Rows, before: Rows, of_before: Rows) -> float:
        return _ratio(after, of) - _ratio(before, of_before)

    return lambda rows: [
        of_problems(
            [row[kind][name][what] for name in (TRAINED, UNTRAINED) for what in _KEPT], difference
        )
        for row in rows
    ]


def change(kind: str, what: str) -> Callable[[Sequence[Row]], list[Any]]:
    """The same with the trained student less with the untrained one, on the same problems."""

    def difference(after: Rows, before: Rows, written: Rows) -> float:
        return float((after.sum() - before.sum()) / written.sum())

    return lambda rows: [
        of_problems(
            [row[kind][TRAINED][what], row[kind][UNTRAINED][what], row[kind]["written"]], difference
        )
        for row in rows
    ]


MEASURES = {
    f"{kind}s: {label}": (found, sign)
    for kind in KINDS
    for label, found, sign in (
        ("accepted of the text, untrained (%)", share(kind, UNTRAINED, "accepted"), ""),
        ("accepted of the text, after (%)", share(kind, TRAINED, "accepted"), ""),
        ("the difference (points)", change(kind, "accepted"), "+"),
        ("accepted of what was proposed, untrained (%)", kept(kind, UNTRAINED), ""),
        ("accepted of what was proposed, after (%)", kept(kind, TRAINED), ""),
        ("the difference in that (points)", kept_more(kind), "+"),
        ("expert's steps per 100 tokens, untrained", share(kind, UNTRAINED, "steps"), ""),
        ("expert's steps per 100 tokens, after", share(kind, TRAINED, "steps"), ""),
        ("the difference in steps", change(kind, "steps"), "+"),
    )
}


def shown(value: Estimate, sign: str) -> str:
    """A hundred times a number, with its interval."""
    middle, low, high = (
        format(100 * one, f"{sign}.1f") for one in (value.value, value.low, value.high)
    )
    return middle if np.isnan(value.low) else f"{middle} ({low} to {high})"


def table(path: Path) -> str:
    """The rows as a table in Markdown."""
    rows = [*latest(path, "seed").values()]
    same = [
        sum(row[kind][name]["same"] for row in rows for kind in KINDS)
        for name in (UNTRAINED, TRAINED)
    ]
    total = len(rows) * len(KINDS) * PROBLEMS
    heads = [f"seed {row['seed']}, {row['episodes']:,} episodes" for row in rows]
    lines = [
        f"The same texts, token for token: {same[0]} of {total} with the untrained student as the "
        f"draft, {same[1]} of {total} with the student after its run. {TOKENS} tokens are proposed "
        f"at a time, so at most {100 * TOKENS // (TOKENS + 1)} % of a long text can be accepted.",
        "",
        f"| n {PROBLEMS} problems a run | {len(rows)} runs | {' | '.join(heads)} |",
        f"|---|--:{'|--:' * len(rows)}|",
    ]
    for label, (found, sign) in MEASURES.items():
        values = found(rows)
        each = [format(100 * one.value, f"{sign}.1f") for one in values]
        lines.append(f"| {label} | {shown(over_runs(values)[0], sign)} | {' | '.join(each)} |")
    for kind in KINDS:
        for name, label in ((UNTRAINED, "untrained"), (TRAINED, "after")):
            ratios = [row[kind]["seconds"][name] / row[kind]["seconds"][PLAIN] for row in rows]
            cells = " | ".join(f"{one:.2f}" for one in ratios)
            lines.append(
                f"| {kind}s: processor seconds beside those without, {label} | "
                f"{np.mean(ratios):.2f} | {cells} |"
            )
    first = rows[0]
    return "\n".join(
        [
            "# The student as the expert's draft",
            "",
            "Made by `python scripts/bench_speculative.py --table`. The tiny pair, greedy, one "
            f"text at a time, {first['date']}, MLX {first['mlx']}, {first['device'].upper()}, one "
            "BLAS thread. The first column is the mean over runs, with its 95 % interval.",
            "",
            *lines,
            "",
        ]
    )


def main() -> None:
    """Add rows, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    for folder in args.runs:
        row = make_row(folder)
        add(ROWS, row)
        print(row["seed"], {kind: row[kind][TRAINED]["same"] for kind in KINDS}, flush=True)
    if args.table:
        TABLE.write_text(table(ROWS))


if __name__ == "__main__":
    main()
