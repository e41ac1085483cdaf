"""A cascade of several runs of a pair: are promises kept, and what does a score save?

    python scripts/bench_cascade.py --runs DIR             # trains what is not there, adds rows
    python scripts/bench_cascade.py --runs DIR --pair tiny-hard --seeds 0 1 2 3 4
    python scripts/bench_cascade.py --table                # docs/bench_cascade.md, from the rows
    python scripts/bench_cascade.py --procedures           # two ways to promise a risk, on them

A run is DIR/s1, DIR/s2, ..; one that was stopped counts as it is. Each is calibrated on the
validation split, as `mlx-fd cascade calibrate` does it (`--score answer`), and held against the
test split, whose problems all runs of a pair share; intervals are over both. Rows go to
docs/bench_cascade.jsonl, one for each run, with what came of both splits. Runs of another length
than most of the pair are in the rows and not in the table.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from finished_run import finished_run
from rows import Row, add, bits, latest, made, shown
from several_runs import over_runs_and_problems

from mlx_fd.evaluation.calibration import roc_auc
from mlx_fd.evaluation.cascade.choice import choose, observed
from mlx_fd.evaluation.cascade.curve import above_random
from mlx_fd.evaluation.cascade.keeping import keep
from mlx_fd.evaluation.cascade.outcome import Outcome
from mlx_fd.evaluation.cascade.scores import ANSWER
from mlx_fd.evaluation.statistics import Estimate
from mlx_fd.feedback.risk import set_threshold

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE = (DOCS / f"bench_cascade.{kind}" for kind in ("jsonl", "md"))
PROBLEMS = 300
# Of each pair: its problems, and what its expert makes it sensible to promise.
PAIRS = {
    "tiny": (
        "arithmetic",
        (("accuracy", 0.85), ("accuracy", 0.9), ("risk", 0.15), ("risk", 0.1), ("cost", 0.3)),
    ),
    "tiny-hard": (
        "arithmetic-hard",
        (("accuracy", 0.6), ("accuracy", 0.65), ("risk", 0.4), ("risk", 0.3), ("cost", 0.5)),
    ),
}
# Of short runs, where none is given; the rest is the preset's.
OPTIONS = (
    *("--episodes", "64", "--exam-size", "0", "--probe-size", "8", "--batch-size", "32"),
    *("--kd-steps", "20", "--lora-rate", "1.5e-3", "--replay-size", "1024"),
    *("--own-solutions", "0"),
)


def answered(folder: Path, pair: str, split: str) -> Row:
    """What came of some problems, answered by a run's student and its expert."""
    from mlx_fd import problems
    from mlx_fd.evaluation import running, suites
    from mlx_fd.evaluation.cache import Cache
    from mlx_fd.evaluation.cascade.outcomes import outcomes
    from mlx_fd.evaluation.target import open_target
    from mlx_fd.models.backend import backend

    backend()
    target = open_target(str(folder), pair)
    cache = Cache(folder.parent / "cache")
    bench = running.make_bench(target, suites.Options(), cache, lambda step, tokens: None)
    drawn = problems.load(PAIRS[pair][0], split).problems[:PROBLEMS]
    return as_columns(outcomes(bench, drawn, ANSWER, lambda step, done, count: None))


def make_row(folder: Path, pair: str, seed: int) -> Row:
    """What came of a run's calibration problems, and of others."""
    return {
        "pair": pair,
        "seed": seed,
        "episodes": len((folder / "episodes.jsonl").read_text().splitlines()),
        **made(),
        "calibration": answered(folder, pair, "validation"),
        "held_out": answered(folder, pair, "test"),
    }


def as_columns(found: Sequence[Outcome]) -> Row:
    """Outcomes as a row has them."""
    return {
        "student": bits(one.student for one in found),
        "expert": bits(one.expert for one in found),
        "expert_tokens": [one.expert_tokens for one in found],
        "scores": [round(one.score, 5) for one in found],
    }


def outcomes_of(row: Row, what: str) -> list[Outcome]:
    """What came of a run's problems: ``"calibration"`` or ``"held_out"``."""
    names = ("scores", "student", "expert", "expert_tokens")
    return [
        Outcome(str(place), score, student == "1", expert == "1", 0, tokens)
        for place, (score, student, expert, tokens) in enumerate(
            zip(*(row[what][name] for name in names), strict=True)
        )
    ]


def over(runs: Sequence[Sequence[np.ndarray]], statistic: Callable[..., float]) -> Estimate:
    """The mean of a statistic of runs on the same problems, with its interval over both."""
    return over_runs_and_problems(runs, statistic)[0]


def of_one_length(rows: Sequence[Row]) -> list[Row]:
    """The runs that are as long as most: the mean over others is of nothing that one could draw."""
    [(usual, _)] = Counter(row["episodes"] for row in rows).most_common(1)
    return sorted((row for row in rows if row["episodes"] == usual), key=lambda row: row["seed"])


def columns(row: Row) -> list[np.ndarray]:
    """Of a run's held-out problems: scores, and whether student and expert are right."""
    found = row["held_out"]
    right = [np.array([float(bit) for bit in found[who]]) for who in ("student", "expert")]
    return [np.array(found["scores"]), *right]


def table(rows: Sequence[Row]) -> str:
    """docs/bench_cascade.md."""
    parts = [(pair, [row for row in rows if row["pair"] == pair]) for pair in PAIRS]
    return "\n".join(table_of(pair, found) for pair, found in parts if found)


def table_of(pair: str, rows: Sequence[Row]) -> str:
    """A pair's part of it."""
    rows = of_one_length(rows)
    n, calibrated_on = (len(rows[0][what]["scores"]) for what in ("held_out", "calibration"))
    seeds, episodes = ", ".join(str(row["seed"]) for row in rows), rows[0]["episodes"]
    student, expert = (
        over([[columns(row)[place]] for row in rows], lambda c: float(c.mean())) for place in (1, 2)
    )
    runs = [columns(row) for row in rows]
    auc = over(runs, lambda score, student, expert: roc_auc(score, student))
    area = over(runs, above_random)
    each = ", ".join(f"{100 * above_random(*run):+.1f}" for run in runs)
    lines = [
        f"Pair `{pair}`, seeds {seeds} after {episodes} episodes each; calibrated on "
        f"{calibrated_on} problems of the validation split, held against {n} of the "
        f"test split. The student alone has {shown(student, '.1f')} % right, the expert alone "
        f"{shown(expert, '.1f')} %. In brackets 95 % intervals over runs and problems (Student's "
        "t).",
        "",
        f"ROC-AUC of right answers {shown(auc, '.3f', 1)}; area above a lottery, over all shares "
        f"passed on, {shown(area, '+.2f')} points, of each run {each}. *As by lot*: the share "
        "that a lottery passes on for the same accuracy.",
        "",
        "| promise | kept | right (%) | passed on (%) | as by lot (%) | expert tokens saved (%) |",
        "|---|---|---|---|---|---|",
        *(_promise(rows, kind, share) for kind, share in PAIRS[pair][1]),
    ]
    return "\n".join(lines) + "\n"


def _promise(rows: Sequence[Row], kind: str, target: float) -> str:
    kept, unable, figures = 0, 0, []
    for row in rows:
        found = outcomes_of(row, "held_out")
        chosen = choose(outcomes_of(row, "calibration"), ANSWER, kind, target)
        threshold = chosen["threshold"]
        unable += threshold is None
        against, of = observed(found, kind, threshold)
        share = against / of if of else 0.0
        kept += 1 - share >= target if kind == "accuracy" else share <= target
        passed = np.array([threshold is None or one.score < threshold for one in found])
        _, student, expert = columns(row)
        tokens = np.array(row["held_out"]["expert_tokens"], dtype=np.float64)
        figures.append([passed.astype(np.float64), student, expert, tokens])

    def right(passed: Any, student: Any, expert: Any, tokens: Any) -> float:
        return float(np.where(passed == 1, expert, student).mean())

    def lottery(passed: Any, student: Any, expert: Any, tokens: Any) -> float:
        gain = expert.mean() - student.mean()
        return float((right(passed, student, expert, tokens) - student.mean()) / gain)

    def saved(passed: Any, student: Any, expert: Any, tokens: Any) -> float:
        return float(1 - (passed * tokens).sum() / tokens.sum())

    measures = (right, lambda passed, *_: float(passed.mean()), lottery, saved)
    cells = [shown(over(figures, one), ".1f") for one in measures]
    note = f", {unable} pass everything on" if unable else ""
    return f"| `--{kind} {target:g}` | {kept} of {len(rows)}{note} | " + " | ".join(cells) + " |"


def read_rows() -> list[Row]:
    """The rows that are there."""
    return [*latest(ROWS, "pair", "seed").values()]


def procedures(rows: Sequence[Row], splits: int = 100, seed: int = 0) -> str:
    """A risk promised by all shares at once, and by a fixed sequence of thresholds.

    Of each run's problems, calibration and held-out ones together, half are drawn again and again
    to calibrate on; the others say what is kept, and how often more of it is wrong than promised,
    which by chance is more often than in the population.
    """
    lines = ["| pair | n | risk | | nothing kept | share kept | more wrong on the rest |"]
    lines.append("|---|--:|--:|---|--:|--:|--:|")
    for pair, (_, promises) in PAIRS.items():
        found = [
            outcomes_of(row, "calibration") + outcomes_of(row, "held_out")
            for row in rows
            if row["pair"] == pair
        ]
        for kind, risk in promises if found else ():
            if kind == "risk":
                lines += _compared(pair, found, risk, np.random.default_rng(seed), splits)
    return "\n".join(lines) + "\n"


def at_once(part: Sequence[Outcome], risk: float) -> float | None:
    """The threshold of `mlx-fd cascade calibrate --risk`."""
    kept = keep([one.score for one in part], [one.student for one in part], risk)
    return None if kept is None else kept.threshold


def _compared(
    pair: str, runs: Sequence[Sequence[Outcome]], risk: float, rng: Any, splits: int
) -> list[str]:
    ways: dict[str, Callable[[Sequence[Outcome]], float | None]] = {
        "all shares at once": lambda part: at_once(part, risk),
        "a sequence of thresholds": lambda part: (
            set_threshold(
                [one.score for one in part], [one.student for one in part], risk
            ).threshold
        ),
    }
    figures: dict[str, list[tuple[bool, float, bool]]] = {name: [] for name in ways}
    for outcomes in runs:
        for _ in range(splits):
            order = rng.permutation(len(outcomes))
            half = len(order) // 2
            first, rest = ([outcomes[k] for k in part] for part in (order[:half], order[half:]))
            for name, threshold_of in ways.items():
                threshold = threshold_of(first)
                wrong, of = observed(rest, "risk", threshold)
                figures[name].append((threshold is None, of / len(rest), wrong > risk * of))
    rows = []
    for name, found in figures.items():
        cells = (f"{100 * share:.1f} %" for share in np.mean(found, axis=0))
        rows.append(f"| `{pair}` | {len(found)} | {risk:g} | {name} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Train, calibrate and hold against, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--pair", choices=list(PAIRS), default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--procedures", action="store_true")
    args = parser.parse_args()
    for seed in args.seeds if args.runs else []:
        if (args.pair, seed) in latest(ROWS, "pair", "seed"):
            continue
        folder = args.runs / f"s{seed}"
        if not (folder / "episodes.jsonl").exists():
            finished_run(folder, ["--preset", args.pair, "--seed", str(seed), *OPTIONS])
        add(ROWS, make_row(folder, args.pair, seed))
    if args.table:
        TABLE.write_text(table(read_rows()), encoding="utf-8")
    if args.procedures:
        print(procedures(read_rows()))


if __name__ == "__main__":
    main()
