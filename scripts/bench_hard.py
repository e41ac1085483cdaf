"""An expert that is often wrong: does the loop's final answer beat its own first answer?

python scripts/bench_hard.py --run DIR     # five seeds; goes on where it stopped
python scripts/bench_hard.py --table       # docs/bench_hard.md, from the rows alone

On the pair tiny-hard. A seed is a run of `mlx-fd loop --preset tiny-hard`, and then held-out
problems of the test split that no other seed has. All systems that revise begin with the expert's
greedy answers, so that each is held against the bare expert on the same answers. With escalation
the student answers, and where its answer was improbable to itself the expert does: the threshold
passes on half of the problems of the validation split at most. Seconds are those of one core, as
the process used them, first answers among them. Rows go to docs/bench_hard.jsonl, one for each
seed; the table comes from nothing else.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from finished_run import finished_run
from numpy.typing import NDArray
from rows import Row, add, bits, bold, latest, made
from several_runs import of_problems, over_runs

from mlx_fd.evaluation.baselines import BASE, LOOP, STUDENT
from mlx_fd.evaluation.statistics import Estimate, holm, paired_bootstrap

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE = (DOCS / f"bench_hard.{kind}" for kind in ("jsonl", "md"))
PAIR, EXPERT, ESCALATES = "tiny-hard", "expert", "student with escalation"
# As the table shows them.
SYSTEMS = ("expert", "cot", "cod", "clear", "self-refine", LOOP, STUDENT, ESCALATES, BASE)
NAMES = {
    "expert": "bare expert",
    "cot": "chain-of-thought critic",
    "cod": "chain-of-drafts critic",
    "clear": "CLEAR",
    "self-refine": "Self-Refine",
    LOOP: "loop, final answers",
    STUDENT: "distilled student alone",
    ESCALATES: "distilled student, escalates",
    BASE: "student before, alone",
}
# What else one would compare.
BESIDE = ((LOOP, "clear"), (LOOP, "self-refine"), (STUDENT, BASE))
EPISODES = 64
# Short runs; what else the preset says may change.
OPTIONS = (
    *("--exam-size", "0", "--probe-size", "8", "--batch-size", "32", "--kd-steps", "20"),
    *("--lora-rate", "1.5e-3", "--replay-size", "1024", "--own-solutions", "0"),
)
# Of the test split, for each seed; and of the validation split, for the threshold.
TEST, CALIBRATION = 60, 60
PASSED_ON = 0.5


# ---- running ----


def trained(seed: int, runs: Path, episodes: int) -> Path:
    """The run directory of a seed, its run finished."""
    folder = runs / f"seed{seed}"
    options = ["--preset", PAIR, "--seed", str(seed), "--episodes", str(episodes)]
    return finished_run(folder, [*options, *OPTIONS])


def row_of(seed: int, run: Path, size: int) -> Row:
    """What every system makes of a seed's problems."""
    from mlx_fd import problems
    from mlx_fd.evaluation import running, suites
    from mlx_fd.evaluation.cache import Cache
    from mlx_fd.evaluation.target import open_target

    changes = {"answers_by": EXPERT, "answer_temperature": 0.0}
    target = open_target(str(run), None, changes=changes)
    cache = Cache(run / "answers")
    # Of a row that was not finished: what is read out of it takes no time.
    shutil.rmtree(cache.folder, ignore_errors=True)
    bench = running.make_bench(target, suites.Options(), cache, lambda step, tokens: None)
    source = target.config.problems.problems
    held = problems.load(source, "test").problems[seed * size : (seed + 1) * size]
    found = {name: answered(bench, name, held) for name in SYSTEMS if name != ESCALATES}
    # Whoever goes on from the expert's answers needs them first.
    for name, one in found.items():
        if name not in (EXPERT, STUDENT, BASE):
            one["seconds"] += found[EXPERT]["seconds"]
    found[ESCALATES] = escalated(bench, held, problems.load(source, "validation").problems)
    # The expert answered all of them there, for the comparison.
    kept = 1 - found[ESCALATES]["passed_on"]
    found[ESCALATES]["seconds"] -= kept * found[EXPERT]["seconds"]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "seed": seed,
        **made(),
        "episodes": summary["episodes"],
        "expert_feedback_tokens": summary["expert_feedback"]["tokens_written"],
        "systems": found,
    }


def answered(bench: Any, name: str, held: Sequence[Any]) -> Row:
    """A system's answers: which are right, the tokens of both models, and its own seconds."""
    from mlx_fd.evaluation.readers import load_readers
    from mlx_fd.evaluation.solving import Solving

    solving = Solving("hard", held, (name,), 1, load_readers(None, None))
    with bench.models.amateur(trained=name != BASE):
        pass  # models are loaded before the time is taken
    begun = time.process_time()
    trials = [
        (problem, trial)
        for number, chunk in bench.batches(held)
        for problem, trial in zip(
            chunk, solving.attempt(bench, name, number, 0, chunk), strict=True
        )
    ]
    rows = [solving.row(problem, trial, "auto") for problem, trial in trials]
    return {
        "right": bits(row["correct"] for row in rows),
        "first": bits(row["first_correct"] for row in rows),
        "expert_tokens": written_by("expert", trials),
        "student_tokens": written_by("student", trials),
        "seconds": round(time.process_time() - begun, 2),
    }


def written_by(who: str, trials: Sequence[tuple[Any, Any]]) -> int:
    return sum(
        count
        for _, trial in trials
        for step, count in trial.tokens.items()
        if trial.by[step] == who
    )


def escalated(bench: Any, held: Sequence[Any], others: Sequence[Any]) -> Row:
    """The student's answers, and the expert's where the student's were improbable to itself."""
    from mlx_fd.evaluation.cascade import choice
    from mlx_fd.evaluation.cascade.outcomes import outcomes
    from mlx_fd.evaluation.cascade.scores import ANSWER

    tuned = outcomes(bench, others[:CALIBRATION], ANSWER, lambda *_: None)
    threshold = choice.choose(tuned, ANSWER, choice.COST, PASSED_ON)["threshold"]
    begun = time.process_time()
    made = outcomes(bench, held, ANSWER, lambda *_: None)
    spent = time.process_time() - begun
    passed = [threshold is None or one.score < threshold for one in made]
    right = [one.expert if asked else one.student for one, asked in zip(made, passed, strict=True)]
    return {
        "right": bits(right),
        "first": bits(one.student for one in made),
        "threshold": threshold,
        "passed_on": float(np.mean(passed)),
        "expert_tokens": sum(
            one.expert_tokens for one, asked in zip(made, passed, strict=True) if asked
        ),
        "student_tokens": sum(one.student_tokens for one in made),
        "seconds": spent,
    }


# ---- what the rows say ----


def column(row: Row, system: str, what: str = "right") -> NDArray[np.float64]:
    """Of each problem whether it is right (1) in the end, or at first."""
    return np.array([float(bit) for bit in row["systems"][system][what]])


def pooled(rows: Sequence[Row], system: str) -> NDArray[np.float64]:
    """A system's column over the problems of all seeds."""
    return np.concatenate([column(row, system) for row in rows])


def against(rows: Sequence[Row], system: str, other: str) -> tuple[Estimate, float]:
    """How much more a system has right than another one, paired by problem, and the p of none."""
    return over_runs([of_problems([column(row, system) - column(row, other)]) for row in rows])


def changed(rows: Sequence[Row], system: str) -> str:
    """How many wrong first answers it made right, and how many right ones wrong."""
    pairs = [(column(row, system, "first"), column(row, system)) for row in rows]
    mended = sum(int(((first == 0) & (last == 1)).sum()) for first, last in pairs)
    spoiled = sum(int(((first == 1) & (last == 0)).sum()) for first, last in pairs)
    wrong = sum(int((first == 0).sum()) for first, _ in pairs)
    right = sum(int((first == 1).sum()) for first, _ in pairs)
    return f"{mended} of {wrong} | {spoiled} of {right}"


def table(path: Path) -> str:
    """The rows as a table in Markdown."""
    rows = [*latest(path, "seed").values()]
    size = len(column(rows[0], "expert"))
    learned = np.mean([row["expert_feedback_tokens"] for row in rows])
    others = [name for name in SYSTEMS if name != "expert"]
    compared = {name: against(rows, name, "expert") for name in others}
    adjusted = dict(zip(others, holm([p for _, p in compared.values()]), strict=True))
    lines = [
        f"Pair `{PAIR}`, seeds {', '.join(str(row['seed']) for row in rows)}, "
        f"{rows[0]['episodes']} episodes each, in which the expert wrote {learned:,.0f} tokens of "
        f"feedback; then {size} problems of the test split for each seed, no two alike. In "
        "brackets 95 % intervals, paired by problem, bold where they leave 0 out: Student's t over "
        "runs and their problems, which takes more runs than two or three, and the bootstrap over "
        "all problems, which takes these runs as they are. p is that of t, with Holm's correction "
        "for all of these differences. "
        "Tokens and seconds (of one core) are those of a problem. Who revises begins with the bare "
        "expert's answers.",
        "",
        "| | right (%) | against the bare expert (points), over runs | over problems | p | wrong "
        "answers mended | right answers spoiled | expert tokens | student tokens | seconds |",
        "|---|--:|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in SYSTEMS:
        cells = [NAMES[name], f"{100 * pooled(rows, name).mean():.1f}"]
        if name == "expert":
            cells += ["", "", ""]
        else:
            p = adjusted[name]
            over_problems, _ = paired_bootstrap(pooled(rows, name), pooled(rows, "expert"))
            cells += [bold(compared[name][0]), bold(over_problems)]
            cells += ["" if np.isnan(p) else f"{p:.3f}"]
        revises = name not in ("expert", STUDENT, BASE)
        cells.append(changed(rows, name) if revises else " | ")
        for what, form in (("expert_tokens", ".0f"), ("student_tokens", ".0f"), ("seconds", ".2f")):
            per_problem = [row["systems"][name][what] / size for row in rows]
            cells.append(format(float(np.mean(per_problem)), form))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Others side by side, over runs, p without correction:", ""]
    for name, other in BESIDE:
        apart, p = against(rows, name, other)
        lines.append(f"- {NAMES[name]} less {NAMES[other]}: {bold(apart)} points, p {p:.2f}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="where the run directories go")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of each run")
    parser.add_argument("--size", type=int, default=TEST, help="test problems of each seed")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file with the rows")
    parser.add_argument("--table", action="store_true", help="write the table")
    args = parser.parse_args()
    if args.run:
        from mlx_fd.models.backend import backend

        backend()
        args.run.mkdir(parents=True, exist_ok=True)
        done = latest(args.rows, "seed")
        for seed in map(int, args.seeds.split(",")):
            if (seed,) in done:
                continue
            row = row_of(seed, trained(seed, args.run, args.episodes), args.size)
            add(args.rows, row)
            right = {name: one["right"].count("1") for name, one in row["systems"].items()}
            print(seed, right, flush=True)
    if args.table:
        TABLE.write_text(table(args.rows))
        print(TABLE)


if __name__ == "__main__":
    main()
