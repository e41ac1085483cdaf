"""Published methods of self-distillation on a model whose likeliest answer is often wrong.

python scripts/train_selfdistill_base.py --out DIR --misread 0.85 --steps 768   # its base
python scripts/bench_selfdistill.py --base DIR/base --pilot    # temperature and learning rates
python scripts/bench_selfdistill.py --base DIR/base --run      # five seeds; goes on
python scripts/bench_selfdistill.py --base DIR/base --run --arms 'grpo;step-critique' --seeds 0
python scripts/bench_selfdistill.py --table     # docs/bench_selfdistill.md, from the rows alone;
                                                # prints docs/benchmarks.md's part of it

The base takes products for sums, so that it is wrong in about half of the problems, and most surely
where it is wrong: sampling less wildly does not help it. An arm is a command: `mlx-fd self-distill
--model DIR/base --method ...`. All arms of a seed make as many attempts, at problems of the train
split, with the same LoRA; what a self-teacher wants written is the generator's truth. The pilot
chooses, with a seed of its own and on validation problems, each arm's learning rate and the
temperature at which the untrained base answers best. Then the student, after its last update,
answers held-out problems, the same for every arm of a seed and others for each seed: greedily, and
sampled at the temperature of its training, which is the base's best. Rows go to
docs/bench_selfdistill.jsonl, one for each arm and seed; tables come from nothing else.
"""

# ruff: noqa: E402
import argparse
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from mlx_fd.models.backend import backend

backend()

import numpy as np
from rows import Row, add, bold, latest, made, of_arms, shown
from several_runs import of_problems, over_runs

from mlx_fd import runs
from mlx_fd.config import Config, to_toml
from mlx_fd.evaluation.statistics import Estimate, holm
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt, generate
from mlx_fd.models.loading import Loaded, load
from mlx_fd.models.writing import GenerateOptions, Sampling
from mlx_fd.problems import Problem, arithmetic
from mlx_fd.problems.kinds import is_right, read_final
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.training.job import Job
from mlx_fd.training.selfdistill import plan as session
from mlx_fd.training.selfdistill import training
from mlx_fd.training.selfdistill.methods import configured

# {arm: {seed: its row}}
Rows = dict[str, dict[int, Row]]
Values = Callable[[Row], Sequence[float]]

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE = (DOCS / f"bench_selfdistill.{kind}" for kind in ("jsonl", "md"))
PILOT = DOCS / "bench_selfdistill_pilot.jsonl"
BASE = "base"
RATES, LOWEST = (3e-4, 1e-3, 3e-3), 1e-5
TEMPERATURES, PILOT_SEED = (0.3, 0.6, 1.0, 1.3), 100
SEEDS = "0,1,2,3,4"
# What all arms share. Of the pilot's temperatures the base answers best at that of the attempts, so
# that one serves for both. Attempts are made in batches of 16: 16 problems, or 2 with 8 attempts
# each. One update a batch (Resd publishes four), so that all learn from as many tokens.
ATTEMPTS, BATCH, TEMPERATURE = 320, 16, 1.0
SHARED: Row = {
    "critic": "truth",
    "reference_style": "solution",
    "lora_rank": 16,
    "lora_scale": 4.0,
    "kd_steps": 1,
    "warmup_steps": 0,
    "temperature": TEMPERATURE,
    "top_p": 1.0,
    "top_k": 0,
    "probe_size": 8,
    "probe_every": 1000,
    "checkpoint_every": 1000,
}
# Of most weight first. A reference has the attempt's own format, unless the arm says prose.
ARMS: dict[str, Row] = {
    "step-critique": {"method": "step-critique"},
    "reference": {"method": "step-critique", "context": "reference"},
    "reference, prose": {
        "method": "step-critique",
        "context": "reference",
        "reference_style": "prose",
    },
    "wrong attempts at -1": {"method": "grpo", "reward_baseline": "right"},
    "grpo": {"method": "grpo"},
    "opsd-reference": {"method": "opsd-reference"},
    "sdft": {"method": "sdft"},
    "resd": {"method": "resd"},
    "rcsd": {"method": "rcsd"},
    "rlcsd": {"method": "rlcsd"},
    "sdpo": {"method": "sdpo"},
    "opsd-reference, not cut": {"method": "opsd-reference", "token_clip": 0.0},
}
PROBLEMS, SAMPLES, LIMIT = 60, 8, 64


# ---- measuring ----


def problems_of(seed: int) -> Sequence[Problem]:
    """The held-out problems of a seed, no two seeds share one."""
    return arithmetic.load("test").problems[seed * PROBLEMS : (seed + 1) * PROBLEMS]


def right_of(
    loaded: Loaded, problems: Sequence[Problem], temperature: float = 0.0, samples: int = 1
) -> list[int]:
    """Of each problem how many answers are right; at temperature 0 one says all."""
    asked = [problem for problem in problems for _ in range(samples)]
    right: list[bool] = []
    for begin in range(0, len(asked), 240):
        chunk = asked[begin : begin + 240]
        prompts = [first_prompt(loaded, answer_prompt(problem.question)) for problem in chunk]
        turns = generate(
            loaded,
            [Conversation()] * len(chunk),
            prompts,
            Sampling(LIMIT, temperature, seed=begin + 1),
            GenerateOptions(keep=False),
        )
        right += [
            bool(is_right(read_final(turn.text, problem), problem))
            for turn, problem in zip(turns, chunk, strict=True)
        ]
    return [sum(right[k : k + samples]) for k in range(0, len(right), samples)]


# ---- running ----


def options_of(arm: str, seed: int, rate: float, base: str) -> Config:
    """An arm's whole configuration."""
    options = {**SHARED, **ARMS[arm], "lora_rate": rate, "student": base}
    method = options.pop("method")
    rollouts = configured(method).selfdistill.num_generations
    size = {"batch_size": BATCH // rollouts, "episodes": ATTEMPTS // rollouts, "seed": seed}
    return configured(method, {**options, **size}, preset="tiny")


def trained(arm: str, seed: int, rate: float, base: str) -> tuple[Loaded, Row]:
    """The model of an arm after its last update, and the totals of its run."""
    plan = session.make_plan(options_of(arm, seed, rate, base))
    models = session.open_models(plan)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        runs.create(folder, to_toml(plan.config), plan.manifest)
        training.run(
            Job(folder, plan.config, plan.probe, plan.problems, lambda event: None), models
        )
        attempts = runs.read_lines(folder / runs.ATTEMPTS)
        updates = [u for row in runs.read_lines(folder / runs.METRICS) for u in row["updates"]]
    return models.student_lm, {
        "rate": rate,
        "attempts": len(attempts),
        "taught": sum(row["teaches"] for row in attempts),
        "updates": len(updates),
        "tokens": sum(update["tokens"] for update in updates),
    }


def pilot(arms: Sequence[str], base: str, path: Path) -> None:
    """Rows of the base at each temperature, and of each arm at each rate, that are not there.

    An arm whose best rate is the lowest gets a third of that, too, down to `LOWEST`.
    """
    problems = arithmetic.load("validation").problems[:PROBLEMS]
    for arm in arms:
        values = list(TEMPERATURES if arm == BASE else RATES)
        for value in values:
            if value not in piloted(path).get(arm, {}):
                loaded = (
                    load(Path(base)) if arm == BASE else trained(arm, PILOT_SEED, value, base)[0]
                )
                temperature = value if arm == BASE else TEMPERATURE
                right = right_of(loaded, problems, temperature, SAMPLES)
                add(path, {"arm": arm, "of": value, "right": right})
                print(arm, value, f"{np.mean(right) / SAMPLES:.1%}", flush=True)
            lowest = min(values)
            if arm != BASE and value == values[-1] and best(arm, path) == lowest > LOWEST:
                values.append(float(f"{lowest / 3:.0e}"))


def piloted(path: Path) -> dict[str, dict[float, float]]:
    """{arm: {rate: Avg@8 on the validation problems}}; of the base {temperature: the same}."""
    found: dict[str, dict[float, float]] = {}
    for (arm, value), row in latest(path, "arm", "of").items():
        found.setdefault(arm, {})[value] = float(np.mean(row["right"])) / SAMPLES
    return found


def best(arm: str, path: Path = PILOT) -> float:
    """The learning rate that the pilot found best for an arm; for the base, the temperature."""
    tried = piloted(path)[arm]
    return max(tried, key=lambda value: tried[value])


def row_of(arm: str, seed: int, base: str) -> Row:
    begin = time.perf_counter()
    if arm == BASE:
        loaded, totals = load(Path(base)), Row()
    else:
        loaded, totals = trained(arm, seed, best(arm), base)
    learned = time.perf_counter()
    problems = problems_of(seed)
    weights = (Path(base) / "model.safetensors").read_bytes()
    return {
        "arm": arm,
        "seed": seed,
        "base": hashlib.sha256(weights).hexdigest()[:12],
        **made(),
        **totals,
        "greedy": right_of(loaded, problems),
        "sampled": right_of(loaded, problems, TEMPERATURE, SAMPLES),
        "seconds": [round(learned - begin), round(time.perf_counter() - learned)],
    }


# ---- what the rows say ----


def read_rows(path: Path) -> Rows:
    """{arm: {seed: its last row}}, in the order of the table; empty without a file."""
    return {
        arm: {row["seed"]: row for row in found}
        for arm, found in of_arms(path, (BASE, *ARMS)).items()
    }


def greedy(row: Row) -> list[float]:
    return [float(right) for right in row["greedy"]]


def average(row: Row) -> list[float]:
    return [right / SAMPLES for right in row["sampled"]]


def level(rows: dict[int, Row], values: Values) -> Estimate:
    """An arm's mean over its runs."""
    return over_runs([of_problems([values(row)]) for row in rows.values()])[0]


def change(
    rows: dict[int, Row],
    others: dict[int, Row],
    values: Values,
    kept: Callable[[int], list[bool]] | None = None,
) -> tuple[Estimate, float]:
    """One arm against another over the seeds that both have, on the same problems; and its p."""
    differences = []
    for seed in sorted(rows.keys() & others.keys()):
        gain = np.array(values(rows[seed])) - values(others[seed])
        differences.append(of_problems([gain if kept is None else gain[np.array(kept(seed))]]))
    return over_runs(differences)


# Beside each arm against the base: what is compared, and corrected for by Holm, all together.
PAIRS = (
    ("step-critique", "reference"),
    ("reference", "reference, prose"),
    ("step-critique", "grpo"),
    ("step-critique", "wrong attempts at -1"),
    ("grpo", "wrong attempts at -1"),
    ("rlcsd", "grpo"),
    ("sdpo", "grpo"),
    ("rcsd", "opsd-reference"),
    ("resd", "sdpo"),
    ("opsd-reference, not cut", "opsd-reference"),
)


def comparisons(rows: Rows) -> dict[tuple[str, str], tuple[Estimate, float]]:
    """{(arm, other): change of the greedy answers, p adjusted for all that are looked at}.

    Where not one problem's answer differs there is no spread to test by, and p is 1.
    """
    pairs = [*((arm, BASE) for arm in ARMS), *PAIRS]
    known = [pair for pair in pairs if pair[0] in rows and pair[1] in rows]
    found = [change(rows[arm], rows[other], greedy) for arm, other in known]
    adjusted = holm([1.0 if math.isnan(p) else p for _, p in found])
    return {
        pair: (estimate, p) for pair, (estimate, _), p in zip(known, found, adjusted, strict=True)
    }


def table(path: Path) -> str:
    rows = read_rows(path)
    base, compared = rows[BASE], comparisons(rows)
    attempts = {row["attempts"] for arm in rows if arm != BASE for row in rows[arm].values()}
    lines = [
        f"{PROBLEMS} held-out problems a seed, answered greedily and {SAMPLES} times at "
        f"temperature {TEMPERATURE:g}; {' or '.join(map(str, sorted(attempts)))} attempts a run. "
        "Changes are against the base on the same problems, in points; in brackets 95 % t "
        "intervals over runs, each with problems of its own, bold where they leave 0 out. p is of "
        "the greedy change, by Holm for all comparisons of both tables.",
        "",
        "| | seeds | greedy (%) | change | p | where the base is wrong, change | "
        f"where it is right, change | Avg@{SAMPLES} (%) | change | rate | "
        "attempts that teach | updates | 1,000 tokens read |",
        "|---|--:|---|---|--:|---|---|---|---|--:|--:|--:|--:|",
    ]
    for arm, seeds in rows.items():
        one, two = (shown(level(seeds, values), ".1f") for values in (greedy, average))
        cells = [one, "", "", "", "", two, *[""] * 5]
        if arm != BASE:
            gain, p = compared[arm, BASE]
            mended, kept = (change(seeds, base, greedy, where(base, bit))[0] for bit in (0, 1))
            sums = {
                key: float(np.mean([row[key] for row in seeds.values()]))
                for key in ("attempts", "taught", "updates", "tokens")
            }
            cells = [
                *(one, bold(gain), f"{p:.3f}", bold(mended), bold(kept)),
                *(two, bold(change(seeds, base, average)[0])),
                f"{next(iter(seeds.values()))['rate']:g}",
                f"{sums['taught'] / sums['attempts']:.0%}",
                f"{sums['updates']:.0f}",
                f"{sums['tokens'] / 1000:.0f}",
            ]
        lines.append(f"| {' | '.join([arm, str(len(seeds)), *cells])} |")
    return "\n".join([*lines, "", *pair_lines(rows)]) + "\n"


def where(base: dict[int, Row], bit: int) -> Callable[[int], list[bool]]:
    """Of a seed the problems that the base answers right, or wrong, greedily."""
    return lambda seed: [right == bit for right in base[seed]["greedy"]]


def pair_lines(rows: Rows) -> list[str]:
    """The table of arms against arms."""
    lines = [
        f"| | greedy, difference (points) | p | Avg@{SAMPLES}, difference |",
        "|---|---|--:|---|",
    ]
    for (arm, other), (estimate, p) in comparisons(rows).items():
        if other != BASE:
            sampled = bold(change(rows[arm], rows[other], average)[0])
            lines.append(f"| {arm} over {other} | {bold(estimate)} | {p:.3f} | {sampled} |")
    return lines


def short(path: Path) -> list[str]:
    """The tables of docs/benchmarks.md."""
    rows = read_rows(path)
    compared = comparisons(rows)
    lines = [
        f"| | seeds | greedy (%) | change (points) | p | Avg@{SAMPLES}, change |",
        "|---|--:|---|---|--:|---|",
    ]
    for arm, seeds in rows.items():
        cells = [""] * 3
        if arm != BASE:
            gain, p = compared[arm, BASE]
            cells = [bold(gain), f"{p:.3f}", bold(change(seeds, rows[BASE], average)[0])]
        own = shown(level(seeds, greedy), ".1f")
        lines.append(f"| {' | '.join([arm, str(len(seeds)), own, *cells])} |")
    return [*lines, "", *pair_lines(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base", type=Path, help="the model to begin with")
    parser.add_argument("--pilot", action="store_true", help="find temperature and learning rates")
    parser.add_argument("--run", action="store_true", help="make the rows that are not there")
    parser.add_argument("--arms", default=";".join((BASE, *ARMS)), help="separated by ;")
    parser.add_argument("--seeds", default=SEEDS, help="comma-separated")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file with the rows")
    parser.add_argument("--table", action="store_true", help="write the table")
    args = parser.parse_args()
    arms = [name.strip() for name in args.arms.split(";")]
    if unknown := [name for name in arms if name not in (BASE, *ARMS)]:
        parser.error(f"there is no arm {unknown[0]!r}; there are: {', '.join((BASE, *ARMS))}")
    if not (args.pilot or args.run or args.table):
        parser.error("say what to do: --pilot, --run or --table")
    if (args.pilot or args.run) and not args.base:
        parser.error("say with --base which model to begin with")
    if args.pilot:
        pilot(arms, str(args.base), PILOT)
    if args.run:
        done = read_rows(args.rows)
        # Seed by seed, so that a part of the work is a whole comparison.
        for seed in map(int, args.seeds.split(",")):
            for arm in arms:
                if seed not in done.get(arm, {}):
                    row = row_of(arm, seed, str(args.base))
                    add(args.rows, row)
                    print(
                        arm,
                        seed,
                        f"greedy {np.mean(row['greedy']):.1%}",
                        row["seconds"],
                        flush=True,
                    )
    if args.table:
        TABLE.write_text(table(args.rows))
        print(*short(args.rows), sep="\n")


if __name__ == "__main__":
    main()
