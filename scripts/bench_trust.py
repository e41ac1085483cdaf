"""What trust saves, and what comes of it: whole runs of the loop in its default gate.

python scripts/bench_trust.py --runs DIR --seeds 0,1,2      # each once; goes on where it stopped
python scripts/bench_trust.py --arms long,taught --runs DIR # the runs of forty minutes
python scripts/bench_trust.py --table --plot                # docs/bench_trust.*, of the rows alone

What not asking costs is known twice. Of the problems that need no expert a tenth, drawn by hash, is
audited all the same: their final answers and those where the student stood alone are two random
samples of one run. And after a run the expert, which no run changes, is asked of every answer that
it was not asked of (:func:`if_asked`): the same problems, the same first answers and the same
student's feedback. Rows, one for each run, go to docs/bench_trust.jsonl.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_method import AFTER, HEIGHT, LEFT, TOP, WIDTH, column, quality, run_arm
from numpy.typing import NDArray
from rows import Row, add, latest, made, of_arms, shown
from several_runs import RunValue, of_problems, over_runs

from mlx_fd.evaluation.statistics import Estimate

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE, PLOT = (DOCS / f"bench_trust.{kind}" for kind in ("jsonl", "md", "svg"))
# {arm: options beside those of the preset tiny}
ARMS: dict[str, tuple[str, ...]] = {
    "main": (),
    # What the student alone calls right stays as it is.
    "kept": ("--no-check-alone",),
    "long": ("--episodes", "3200"),
    "taught": ("--episodes", "2816", "--kd-steps", "48"),
}
# Feedbacks of the expert that are compared with those of the run.
CHECKED = 64
# Of these there is a curve.
PLOTTED = ("main", "long")
# Of an episode, where a row has no number for it.
NOTHING = "-"


def row_of(arm: str, seed: int, folder: Path) -> Row:
    """A finished run as one row."""
    from mlx_fd import runs
    from mlx_fd.config import read
    from mlx_fd.runs.summary import agreed

    summary = json.loads((folder / "summary.json").read_text())
    episodes = runs.read_episodes(folder)
    exam = json.loads((folder / "exam_after.json").read_text())["results"]

    def bits(values: Sequence[bool | None]) -> str:
        return "".join(NOTHING if value is None else str(int(value)) for value in values)

    return {
        "arm": arm,
        "seed": seed,
        "options": list(ARMS[arm]),
        **made(),
        "lora_rank": read(folder / "config.toml").models.lora_rank,
        "seconds": summary["seconds"]["total"],
        "written": [_by_expert(row["tokens"]) for row in episodes],
        "tokens": [row["tokens"].get("expert_feedback", 0) for row in episodes],
        "asked": bits([row["expert_feedback"] is not None for row in episodes]),
        "trusted": bits([row["gate"]["trusted"] for row in episodes]),
        "agreed": bits([agreed(row) for row in episodes]),
        "right": bits([row["correct_after"] for row in episodes]),
        "if_asked": bits(if_asked(folder)),
        "wrong": bits([one["wrong"] for one in exam]),
        "found": ["", bits([one["found"] for one in exam])],
        "solved": ["", bits([one["solved"] for one in exam])],
    }


def _by_expert(tokens: Mapping[str, int]) -> int:
    """What the expert wrote in an episode; the first answer is the student's."""
    own = [n for step, n in tokens.items() if step == "answer" or step.startswith("student_")]
    return sum(tokens.values()) - sum(own)


def if_asked(folder: Path) -> list[bool | None]:
    """Final answers of a run had the expert been asked everywhere; whether they are right.

    Args:
        folder: the run's, of one whose expert decodes greedily, so that nothing is drawn.

    Returns:
        For each episode; where the expert was asked, what came of it in the run.
    """
    from mlx_fd import runs

    rows = runs.read_episodes(folder)
    found = [row["correct_after"] for row in rows]
    asked = [place for place, row in enumerate(rows) if row["expert_feedback"]]
    alone = [place for place, row in enumerate(rows) if not row["expert_feedback"]]
    # Some where it is known what it says, for a check.
    known = asked[-CHECKED:] if alone else []
    again = asked_of(folder, [rows[place] for place in (*known, *alone)])
    for place, one in zip(known, again, strict=False):
        said = rows[place]["expert_feedback"]
        if said is None or one.judged.expert.feedback.text != said["text"]:
            raise SystemExit(f"{folder}: asked again of episode {place} its expert says otherwise")
    for place, one in zip(alone, again[len(known) :], strict=True):
        found[place] = one.is_correct
    return found


def asked_of(folder: Path, rows: Sequence[Any]) -> list[Any]:
    """Episodes of a run with the expert asked of the same first answers, finished.

    Args:
        folder: the run's.
        rows: of its ``episodes.jsonl``, for the first answers and the student's feedback.
    """
    from mlx_fd import problems
    from mlx_fd.evaluation.target import Models, open_target
    from mlx_fd.feedback import turns
    from mlx_fd.feedback.stages import Answered, StudentFeedback
    from mlx_fd.models.backend import backend
    from mlx_fd.models.conversation import Conversation
    from mlx_fd.problems.parsing import parse_feedback
    from mlx_fd.problems.prompts import Answer

    backend()
    target = open_target(str(folder), None)
    options = target.config.generation
    if options.expert_temperature:
        raise SystemExit(f"{folder}: its expert draws its tokens, which nothing can repeat")
    pair = Models(target).pair
    source = target.config.problems
    by_id = {one.id: one for one in problems.load(source.problems, source.split).problems}
    end = pair.expert.tokenizer.eos_token_id

    def answered(row: Any) -> Answered:
        text, final = row["answer"]["text"], row["answer"]["final"]
        tokens = pair.expert.tokenizer.encode(text, add_special_tokens=False)
        ended = () if "answer" in row["capped"] else (end,)
        answer = Answer(text, final, (*tokens, *ended))
        return Answered(by_id[row["id"]], answer, Conversation(), ())

    def student(row: Any) -> StudentFeedback:
        said = row["student_feedback"]
        return StudentFeedback(parse_feedback(said["text"], ()), said["head_score"])

    finished: list[Any] = []
    for begin in range(0, len(rows), options.batch_size):
        some = rows[begin : begin + options.batch_size]
        given = turns.said_by_expert(pair, [answered(row) for row in some])
        experts = turns.expert_feedback(pair, given, options, 0, _quiet)
        judged = turns.judge(given, [student(row) for row in some], dict(enumerate(experts)))
        finished += turns.merge_and_revise(
            pair, judged, options, target.config.episode, lambda step: 0, _quiet
        )
    return finished


def _quiet(step: str, tokens: int) -> None:
    """Nobody watches."""


# ---- what a row says ----


def marks(row: Row, name: str) -> NDArray[np.float64]:
    """A number for each episode, NaN where there is none."""
    return np.array([math.nan if value == NOTHING else float(value) for value in row[name]])


def saved(row: Row, begin: int = 0, end: int | None = None) -> float:
    """The share of the expert's feedback tokens that some episodes did not take.

    A feedback that was not written counts as the mean of the run's.
    """
    tokens, asked = np.array(row["tokens"], dtype=float), marks(row, "asked")
    alone = (1 - asked[begin:end]).sum() * tokens.sum() / asked.sum()
    whole = alone + tokens[begin:end].sum()
    return float(alone / whole) if whole else 0.0


def audits(row: Row) -> NDArray[np.float64]:
    """For each audited verdict where the student is trusted, whether it differs."""
    same = marks(row, "agreed")[marks(row, "trusted") == 1]
    return np.asarray(1 - same[~np.isnan(same)])


def cost(row: Row) -> RunValue:
    """Final answers right where the student stood alone, less those of audited problems."""
    trusted, asked, right = (marks(row, name) for name in ("trusted", "asked", "right"))
    alone, audited = (_share(right[(trusted == 1) & (asked == value)]) for value in (0, 1))
    return RunValue(alone.value - audited.value, math.hypot(alone.error, audited.error))


def asking(row: Row) -> RunValue:
    """Final answers right as they are, less those had the expert been asked everywhere.

    NaN of a row that was made before that was looked at.
    """
    return of_problems([_less_asked(row)])


def asking_alone(row: Row) -> RunValue:
    """The same of the problems that the student alone judged: of others nothing can differ."""
    return of_problems([_less_asked(row)[marks(row, "asked") == 0]])


def _less_asked(row: Row) -> NDArray[np.float64]:
    right = marks(row, "right")
    return right - marks(row, "if_asked") if "if_asked" in row else np.full(len(right), math.nan)


def _share(right: NDArray[np.float64]) -> RunValue:
    """A share near 1: where every answer is right the error is not 0 (Agresti and Coull, 1998)."""
    n = len(right)
    middle = (right.sum() + 1) / (n + 2)
    error = math.sqrt(middle * (1 - middle) / (n + 2))
    return RunValue(float(right.mean()) if n else math.nan, error)


MEASURES: dict[str, Callable[[Sequence[Row]], Estimate]] = {
    "expert's feedback tokens saved (%)": lambda rows: _over(rows, saved),
    "of them in the second half (%)": lambda rows: _over(
        rows, lambda row: saved(row, len(row["asked"]) // 2)
    ),
    "audited verdicts that differ (%)": lambda rows: over_runs(
        [of_problems([audits(row)]) for row in rows]
    )[0],
    "final answers right (%)": lambda rows: over_runs(
        [of_problems([marks(row, "right")]) for row in rows]
    )[0],
    "the same, less had the expert been asked everywhere (points)": lambda rows: over_runs(
        list(map(asking, rows))
    )[0],
    "the same, of problems that the student alone judged (points)": lambda rows: over_runs(
        list(map(asking_alone, rows))
    )[0],
    "the same, alone less audited (points)": lambda rows: over_runs(list(map(cost, rows)))[0],
    "F1 of first errors (%)": quality,
    "problems solved (%)": lambda rows: over_runs(
        [of_problems([column(row, "solved", AFTER)]) for row in rows]
    )[0],
}


def _written(row: Row) -> str:
    written = np.array(row.get("written", []))
    halves = np.array_split(written, 2)
    return ", ".join(f"{half.mean():.0f}" for half in halves) if len(written) else "-"


def _over(rows: Sequence[Row], value: Callable[[Row], float]) -> Estimate:
    return over_runs([RunValue(value(row), 0.0) for row in rows])[0]


def table(path: Path) -> str:
    """The rows as tables in Markdown, one for each arm."""
    lines: list[str] = []
    for arm, rows in of_arms(path, ARMS).items():
        options = " ".join(["--preset tiny", *ARMS[arm]])
        # Older rows do not say it.
        rank = rows[0].get("lora_rank", 16)
        lines += [
            f"**`mlx-fd loop {options}`**, {rows[0]['date']}, LoRA of rank {rank}: "
            f"{len(rows[0]['asked'])} episodes, "
            f"{len(rows[0]['wrong'])} questions at the end, the default gate. The mean over runs "
            "with its 95 % t interval over runs; then each run.",
            "",
            "| | all | " + " | ".join(f"seed {row['seed']}" for row in rows) + " |",
            f"|---|---|{'--:|' * len(rows)}",
        ]
        for name, measure in MEASURES.items():
            form = "+.1f" if "points" in name else ".1f"
            cells = [f"{measure([row]).value * 100:{form}}" for row in rows]
            cells.insert(0, shown(measure(rows), form))
            # What no run, or just one, says anything of.
            cells = ["-" if "nan" in cell else cell for cell in cells]
            if set(cells) == {"-"}:
                continue
            lines.append(f"| {name} | {' | '.join(cells)} |")
        counts: dict[str, Callable[[Row], str]] = {
            "expert's tokens a problem, all steps: first half, second": _written,
            "audited verdicts, of which differ": lambda row: (
                f"{len(audits(row))}, {audits(row).sum():.0f}"
            ),
            "episodes before trust": lambda row: str(
                row["trusted"].index("1") if "1" in row["trusted"] else len(row["trusted"])
            ),
            "minutes": lambda row: f"{row['seconds'] / 60:.1f}",
        }
        lines += [
            f"| {name} | | {' | '.join(count(row) for row in rows)} |"
            for name, count in counts.items()
        ]
        lines.append("")
    return "\n".join(lines)


# ---- the plot ----

BINS = 10
CURVES: dict[str, tuple[str, Callable[[Row, slice], list[float]]]] = {
    "final answers right": ("#0a7d4b", lambda row, of: list(marks(row, "right")[of])),
    "expert not asked": ("#6d4fc4", lambda row, of: list(1 - marks(row, "asked")[of])),
    "expert's feedback tokens": ("#0369a1", lambda row, of: [1 - saved(row, of.start, of.stop)]),
    "trusted verdicts that differ": (
        "#c2410c",
        lambda row, of: list(1 - marks(row, "agreed")[of][marks(row, "trusted")[of] == 1]),
    ),
}


def plot(path: Path) -> str:
    """Coverage, risk, accuracy and tokens along each arm's runs, all seeds together, as SVG."""
    arms = of_arms(path, PLOTTED)
    width = WIDTH - LEFT - 190

    def y(share: float) -> float:
        return TOP + (HEIGHT - 2 * TOP) * (1 - share)

    parts: list[str] = []
    for panel, (arm, rows) in enumerate(arms.items()):
        length, down = len(rows[0]["asked"]), panel * HEIGHT
        panel_parts = [
            f'<text x="{LEFT}" y="20" font-weight="bold">{arm}: shares along {len(rows)} runs of '
            f"{length} episodes (%)</text>"
        ]
        panel_parts += [
            f'<path d="M{LEFT} {y(share / 100):.1f}h{width}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y(share / 100) + 4:.1f}" text-anchor="end">{share}</text>'
            for share in range(0, 101, 20)
        ]
        panel_parts += [
            f'<text x="{LEFT + width * part / 4:.1f}" y="{HEIGHT - 18}" text-anchor="middle">'
            f"{length * part // 4}</text>"
            for part in range(5)
        ]
        for place, (name, (colour, values)) in enumerate(CURVES.items()):
            points = []
            for part in range(BINS):
                of = slice(length * part // BINS, length * (part + 1) // BINS)
                found = np.array([value for row in rows for value in values(row, of)])
                found = found[~np.isnan(found)]
                if len(found):
                    at = LEFT + width * (part + 0.5) / BINS
                    points.append(f"{at:.1f} {y(float(found.mean())):.1f}")
            panel_parts.append(
                f'<path d="M{"L".join(points)}" stroke="{colour}" stroke-width="2" fill="none"/>'
                if points
                else ""
            )
            panel_parts.append(
                f'<text x="{LEFT + width + 12}" y="{TOP + 20 + 20 * place}" fill="{colour}">'
                f"{name}</text>"
            )
        parts.append(f'<g transform="translate(0 {down})">\n' + "\n".join(panel_parts) + "\n</g>")
    height = HEIGHT * len(arms)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" '
        'fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What trust saves, and what comes of it.")
    parser.add_argument("--runs", type=Path, help="where the run directories go")
    parser.add_argument("--arms", default="main", help=f"of {', '.join(ARMS)}, comma-separated")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file with the rows")
    parser.add_argument("--table", action="store_true", help="write the table")
    parser.add_argument("--plot", action="store_true", help="write the plot")
    args = parser.parse_args()
    if args.runs:
        done = latest(args.rows, "arm", "seed")
        for seed in map(int, args.seeds.split(",")):
            for arm in args.arms.split(","):
                if (arm, seed) not in done:
                    folder = run_arm(arm, seed, args.runs, (), ARMS[arm])
                    add(args.rows, row_of(arm, seed, folder))
    for wanted, path, make in ((args.table, TABLE, table), (args.plot, PLOT, plot)):
        if wanted:
            path.write_text(make(args.rows))
            print(path)


if __name__ == "__main__":
    main()
