"""A cascade of several runs of the tiny pair: are promises kept, and what does a score save?

    python scripts/bench_cascade.py --runs DIR             # trains what is not there, adds rows
    python scripts/bench_cascade.py --runs DIR --seeds 1   # DIR/s1 alone
    python scripts/bench_cascade.py --table                # docs/bench_cascade.md, from the rows

Each run is calibrated on the validation split, as `mlx-fd cascade calibrate` does it (`--score
answer`), and held against the test split, whose problems all runs share. So intervals resample runs
and problems (500 times, both at once). A run that was stopped counts as it is. Rows go to
docs/bench_cascade.jsonl, one for each run.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fd.evaluation.calibration import roc_auc
from mlx_fd.evaluation.cascade.choice import choose, observed
from mlx_fd.evaluation.cascade.curve import above_random
from mlx_fd.evaluation.cascade.outcome import Outcome
from mlx_fd.evaluation.cascade.scores import ANSWER
from mlx_fd.evaluation.statistics import Estimate, percentile_interval

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE = (DOCS / f"bench_cascade.{kind}" for kind in ("jsonl", "md"))
EPISODES, PROBLEMS = 240, 300
PROMISES = (("accuracy", 0.85), ("accuracy", 0.9), ("risk", 0.15), ("risk", 0.1), ("cost", 0.3))
# As many as a test can wait for.
RESAMPLES = 500
Row = dict[str, Any]


def make_row(folder: Path, seed: int) -> Row:
    """A run's calibration and what came of the test split."""
    from mlx_fd import problems
    from mlx_fd.evaluation import suites
    from mlx_fd.evaluation.cache import Cache
    from mlx_fd.evaluation.cascade.outcomes import outcomes
    from mlx_fd.evaluation.target import open_target
    from mlx_fd.models.backend import backend

    backend()
    target = open_target(str(folder), None)
    cache = Cache(folder.parent / "cache")
    bench = suites.make_bench(target, suites.Options(), cache, lambda step, tokens: None)

    def answered(split: str) -> list[Outcome]:
        drawn = problems.load("arithmetic", split).problems[:PROBLEMS]
        return outcomes(bench, drawn, ANSWER, lambda step, done, count: None)

    before, held = answered("validation"), answered("test")
    return {
        "seed": seed,
        "episodes": len((folder / "episodes.jsonl").read_text().splitlines()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "mlx": version("mlx"),
        "calibrated_on": len(before),
        "student": bits(one.student for one in held),
        "expert": bits(one.expert for one in held),
        "expert_tokens": [one.expert_tokens for one in held],
        "scores": [round(one.score, 5) for one in held],
        "thresholds": {
            f"{kind} {share:g}": choose(before, ANSWER, kind, share)["threshold"]
            for kind, share in PROMISES
        },
    }


def bits(values: Any) -> str:
    """Truth values as a text."""
    return "".join(str(int(value)) for value in values)


def held_out(row: Row) -> list[Outcome]:
    """What came of a run's test problems."""
    columns = (row["scores"], row["student"], row["expert"], row["expert_tokens"])
    return [
        Outcome(str(place), score, student == "1", expert == "1", 0, tokens)
        for place, (score, student, expert, tokens) in enumerate(zip(*columns, strict=True))
    ]


def over_both(
    runs: Sequence[Sequence[np.ndarray]], statistic: Callable[..., float], seed: int = 0
) -> Estimate:
    """The mean of a statistic over runs on the same problems, resampled by runs and problems.

    Args:
        runs: the columns of each run, a row per problem; problem k is the same in all.
        statistic: of a run's columns.
        seed: of the resampling.
    """
    rng, n = np.random.default_rng(seed), len(runs[0][0])

    def of(chosen: Any, rows: Any) -> float:
        found = {k: statistic(*(column[rows] for column in runs[k])) for k in set(chosen)}
        return float(np.mean([found[k] for k in chosen]))

    draws = np.array(
        [
            of(rng.integers(0, len(runs), len(runs)).tolist(), rng.integers(0, n, n))
            for _ in range(RESAMPLES)
        ]
    )
    every = list(range(len(runs)))
    return percentile_interval(of(every, np.arange(n)), draws, len(runs))


def columns(row: Row) -> list[np.ndarray]:
    """Scores, and whether student and expert are right, of a run."""
    right = [np.array([float(bit) for bit in row[who]]) for who in ("student", "expert")]
    return [np.array(row["scores"]), *right]


def shown(value: Estimate, form: str, scale: float = 1) -> str:
    """A number with its interval."""
    numbers = [format(scale * one, form) for one in (value.value, value.low, value.high)]
    return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


def table(rows: Sequence[Row]) -> str:
    """The tables of docs/bench_cascade.md."""
    rows = sorted(rows, key=lambda row: row["seed"])
    n = len(rows[0]["student"])
    seeds, episodes = (", ".join(str(row[key]) for row in rows) for key in ("seed", "episodes"))
    student, expert = (
        over_both([[columns(row)[place]] for row in rows], lambda c: float(c.mean()))
        for place in (1, 2)
    )
    runs = [columns(row) for row in rows]
    auc = over_both(runs, lambda score, student, expert: roc_auc(score, student))
    area = over_both(runs, above_random)
    each = ", ".join(f"{100 * above_random(*run):+.1f}" for run in runs)
    lines = [
        f"Tiny pair, seeds {seeds} after {episodes} episodes; calibrated on "
        f"{rows[0]['calibrated_on']} problems of the validation split, held against {n} of the "
        f"test split. The student alone has {shown(student, '.1f', 100)} % right, the expert alone "
        f"{shown(expert, '.1f', 100)} %. In brackets 95 % intervals that resample runs and "
        "problems.",
        "",
        f"ROC-AUC of right answers {shown(auc, '.3f')}; area above a lottery, over all shares "
        f"passed on, {shown(area, '+.2f', 100)} points, of each run {each}. *As by lot*: the share "
        "that a lottery passes on for the same accuracy.",
        "",
        "| promise | kept | right (%) | passed on (%) | as by lot (%) | expert tokens saved (%) |",
        "|---|---|---|---|---|---|",
        *(_promise(rows, kind, share) for kind, share in PROMISES),
    ]
    return "\n".join(lines) + "\n"


def _promise(rows: Sequence[Row], kind: str, target: float) -> str:
    kept, figures = 0, []
    for row in rows:
        threshold, found = row["thresholds"][f"{kind} {target:g}"], held_out(row)
        against, of = observed(found, kind, threshold)
        share = against / of if of else 0.0
        kept += 1 - share >= target if kind == "accuracy" else share <= target
        passed = np.array([threshold is None or one.score < threshold for one in found])
        _, student, expert = columns(row)
        tokens = np.array(row["expert_tokens"], dtype=np.float64)
        figures.append([passed.astype(np.float64), student, expert, tokens])

    def right(passed: Any, student: Any, expert: Any, tokens: Any) -> float:
        return float(np.where(passed == 1, expert, student).mean())

    def lottery(passed: Any, student: Any, expert: Any, tokens: Any) -> float:
        gain = expert.mean() - student.mean()
        return float((right(passed, student, expert, tokens) - student.mean()) / gain)

    def saved(passed: Any, student: Any, expert: Any, tokens: Any) -> float:
        return float(1 - (passed * tokens).sum() / tokens.sum())

    measures = (right, lambda passed, *_: float(passed.mean()), lottery, saved)
    cells = [shown(over_both(figures, one), ".1f", 100) for one in measures]
    unable = sum(row["thresholds"][f"{kind} {target:g}"] is None for row in rows)
    note = f", {unable} pass everything on" if unable else ""
    return f"| `--{kind} {target:g}` | {kept} of {len(rows)}{note} | " + " | ".join(cells) + " |"


def read_rows() -> list[Row]:
    """The rows that are there."""
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    return [json.loads(line) for line in lines]


def main() -> None:
    """Train, calibrate and hold against, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    for seed in args.seeds if args.runs else []:
        if any(row["seed"] == seed for row in read_rows()):
            continue
        folder = args.runs / f"s{seed}"
        if not folder.exists():
            options = ["--seed", str(seed), "--episodes", str(EPISODES), "--exam-size", "0"]
            command = [sys.executable, "-m", "mlx_fd", "loop", "--preset", "tiny", "--quiet"]
            subprocess.run([*command, *options, "--out", str(folder)], check=True)
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(make_row(folder, seed)) + "\n")
    if args.table:
        TABLE.write_text(table(read_rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
