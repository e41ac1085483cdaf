"""Who learns to answer fastest: distillation of answers, the loop, or plain cross-entropy.

python scripts/bench_distil.py --run       # every arm, five seeds; goes on where it stopped
python scripts/bench_distil.py --table     # docs/bench_distil.md, from the rows alone

On the tiny pair. Each arm is a command with its own preset, stopped after as many seconds of
processor time in its batches. On the way the student answers problems of the test split, greedily.
What it answers right at equal tokens and at equal seconds is read off these points, linearly
between two. All arms of a seed begin with the same student and answer the same problems. Seconds
are those of the process, so that other work on the machine does not count; answering the test is
left out. Rows go to docs/bench_distil.jsonl, one for each run; the table comes from nothing else.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rows import Row, add, bold, latest, made, of_arms, shown
from several_runs import of_problems, over_runs

from mlx_fd.evaluation.statistics import Estimate

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE = DOCS / "bench_distil.jsonl", DOCS / "bench_distil.md"
REFERENCE = "sft"
# As the table shows them; "loop" is mlx-fd loop, the others methods of mlx-fd distil.
ARMS = ("sft", "off-policy", "on-policy", "gkd", "loop")
# More problems than any arm comes to.
EPISODES = 3200
TEST = 200
LOOKS = 2


# ---- running ----


# What the untrained student answers right, by seed: the same for all arms.
_UNTRAINED: dict[int, str] = {}


def run_arm(arm: str, seed: int, seconds: float) -> Row:
    """An arm's run and what its student answered on the way."""
    from mlx_fd.runs.plan import configuration
    from mlx_fd.training.planning import plan_of
    from mlx_fd.training.selfdistill.methods import configured

    changes = {"seed": seed, "episodes": EPISODES, "exam_size": 0, "gate": "always"}
    if arm == "loop":
        plan = plan_of(configuration("tiny", None, changes, "bench"))
    else:
        plan = plan_of(configured(arm, {"expert": "tiny", **changes}))
    folder = Path(tempfile.mkdtemp())
    try:
        return {
            "arm": arm,
            "seed": seed,
            **made(),
            "lora_rate": plan.config.training.lora_rate,
            "points": _points(arm, plan, folder / "run", seconds),
        }
    finally:
        shutil.rmtree(folder)


def _points(arm: str, plan: Any, folder: Path, seconds: float) -> list[Row]:
    """Tokens, seconds and answers at the beginning and at equal distances of seconds."""
    from mlx_fd import runs
    from mlx_fd.config import to_toml
    from mlx_fd.runs.events import BatchDone, Started

    start, student = (_loop if arm == "loop" else _distil)(arm, plan, folder)
    seed = plan.config.episode.seed
    problems = _test_problems(seed)
    points: list[Row] = []
    spent = {"generated": 0, "expert": 0, "problems": 0, "updates": 0, "seconds": 0.0}
    since = time.process_time()

    def look() -> None:
        if points or seed not in _UNTRAINED:
            right = _right(student, problems, plan.config)
            _UNTRAINED.setdefault(seed, right)
        else:
            right = _UNTRAINED[seed]
        points.append({**spent, "seconds": round(spent["seconds"], 3), "right": right})

    def report(event: Any) -> None:
        nonlocal since
        if isinstance(event, Started):
            look()
        elif isinstance(event, BatchDone):
            spent["seconds"] += time.process_time() - since
            for name, count in _counts(event).items():
                spent[name] += count
            if spent["seconds"] >= seconds * len(points) / LOOKS:
                look()
        else:
            return
        since = time.process_time()

    with runs.locked(folder):
        runs.create(folder, to_toml(plan.config), plan.manifest)
        start(report, lambda: spent["seconds"] >= seconds)
    return points


def _distil(arm: str, plan: Any, folder: Path) -> tuple[Callable[..., Any], Any]:
    from mlx_fd.training.job import Job
    from mlx_fd.training.selfdistill import training
    from mlx_fd.training.selfdistill.plan import open_models

    models = open_models(plan)
    given = folder, plan.config, plan.probe, plan.problems
    return lambda *watching: training.run(Job(*given, *watching), models), models.student_lm


def _loop(arm: str, plan: Any, folder: Path) -> tuple[Callable[..., Any], Any]:
    from mlx_fd.feedback.pair import open_pair
    from mlx_fd.training import loop
    from mlx_fd.training.job import Job

    pair = open_pair(plan)
    given = folder, plan.config, plan.probe, plan.problems
    return lambda *watching: loop.run(Job(*given, *watching), pair), pair.student_lm


def _test_problems(seed: int) -> list[Any]:
    """Problems of the test split, others for each seed as far as there are others."""
    import random

    from mlx_fd import problems

    return random.Random(f"bench_distil/{seed}").sample(
        problems.load("arithmetic", "test").problems, TEST
    )


def _right(student: Any, problems: Sequence[Any], config: Any) -> str:
    """Of each problem whether it is answered right, as 0 and 1."""
    from mlx_fd.models.writing import Sampling
    from mlx_fd.problems.kinds import form_of, is_right, read_final
    from mlx_fd.problems.prompts import answer_prompt
    from mlx_fd.training.selfdistill.rollouts import answers_to

    messages = [answer_prompt(problem.question, form_of(problem)) for problem in problems]
    turns = answers_to(student, messages, Sampling(config.generation.max_answer_tokens), TEST)
    return "".join(
        str(int(bool(is_right(read_final(turn.text, problem), problem))))
        for turn, problem in zip(turns, problems, strict=True)
    )


def _counts(event: Any) -> dict[str, int]:
    """What a batch took: tokens that both models wrote, and the expert; problems, updates."""
    generated = expert = 0
    for row in event.rows:
        if "answer" in row:  # of the loop, whose first answers are the student's
            steps = ("answer", "student_feedback", "student_feedback_again")
            of_student = sum(row["tokens"].get(step, 0) for step in steps)
            written = sum(row["tokens"].values())
        else:
            written = len(row["tokens"])
            of_student = 0 if row.get("by_expert") else written
        generated, expert = generated + written, expert + written - of_student
    return {
        "generated": generated,
        "expert": expert,
        "problems": len({row["id"] for row in event.rows}),
        "updates": len(event.metrics["updates"]),
    }


# ---- what the rows say ----


def at(row: Row, budget: str, amount: float) -> NDArray[np.float64]:
    """Each test problem's answer (1: right) at a budget, linearly between the looks around it."""
    points = row["points"]
    table = np.array([[float(bit) for bit in point["right"]] for point in points])
    spent = [point[budget] for point in points]
    return np.array([np.interp(amount, spent, column) for column in table.T])


def least(rows: Sequence[Row], budget: str) -> float:
    """What every run came to."""
    return float(min(row["points"][-1][budget] for row in rows))


def accuracy(rows: Sequence[Row], budget: str, amount: float) -> Estimate:
    return over_runs([of_problems([at(row, budget, amount)]) for row in rows])[0]


def difference(rows: Sequence[Row], others: Sequence[Row], budget: str, amount: float) -> Estimate:
    """To other runs of the same seeds and problems, paired."""
    of_seed = {row["seed"]: row for row in others}
    return over_runs(
        [
            of_problems([at(row, budget, amount) - at(of_seed[row["seed"]], budget, amount)])
            for row in rows
            if row["seed"] in of_seed
        ]
    )[0]


def table(path: Path) -> str:
    arms = of_arms(path, ARMS)
    every = [row for rows in arms.values() for row in rows]
    budgets = {"generated": least(every, "generated"), "seconds": least(every, "seconds")}
    seeds = sorted({row["seed"] for row in every})
    before = over_runs([of_problems([at(row, "seconds", 0)]) for row in arms[REFERENCE]])[0]
    lines = [
        f"Tiny pair, seeds {', '.join(map(str, seeds))}, {TEST} test problems a seed, answered "
        f"greedily; before: {100 * before.value:.1f} % right. In brackets 95 % t intervals over "
        f"runs, paired where it is a difference (points, to *{REFERENCE}*), bold where they leave "
        f"0 out. Equal tokens: {budgets['generated']:,.0f}, written by both models together. Equal "
        f"seconds: {budgets['seconds']:.0f}, of one core, as the process used them. Problems, "
        "updates and the expert's tokens are those at equal seconds.",
        "",
        "| | right at equal tokens (%) | difference | right at equal seconds (%) | difference | "
        "problems | updates | 1,000 tokens written | by the expert |",
        "|---|---|---|---|---|--:|--:|--:|--:|",
    ]
    for arm, rows in arms.items():
        cells = [arm]
        for budget, amount in budgets.items():
            value = accuracy(rows, budget, amount)
            cells.append(shown(value, ".1f"))
            other = difference(rows, arms[REFERENCE], budget, amount)
            cells.append("" if arm == REFERENCE else bold(other))
        for name, times, form in (
            ("problems", 1, ".0f"),
            ("updates", 1, ".0f"),
            ("generated", 1e-3, ".1f"),
            ("expert", 1e-3, ".1f"),
        ):
            values = [
                np.interp(
                    budgets["seconds"],
                    [point["seconds"] for point in row["points"]],
                    [point[name] for point in row["points"]],
                )
                for row in rows
            ]
            cells.append(format(float(np.mean(values)) * times, form))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run what has no row yet")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    parser.add_argument("--seconds", type=float, default=24, help="of each run's batches")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file with the rows")
    parser.add_argument("--table", action="store_true", help="write the table")
    args = parser.parse_args()
    if args.run:
        done = latest(args.rows, "arm", "seed")
        # Seed by seed, so that a part of the work is a whole comparison.
        for seed in map(int, args.seeds.split(",")):
            for arm in args.arms.split(","):
                if (arm, seed) not in done:
                    row = run_arm(arm, seed, args.seconds)
                    add(args.rows, row)
                    last = row["points"][-1]
                    print(arm, seed, last["right"].count("1"), {**last, "right": ""}, flush=True)
    if args.table:
        TABLE.write_text(table(args.rows))
        print(TABLE)


if __name__ == "__main__":
    main()
