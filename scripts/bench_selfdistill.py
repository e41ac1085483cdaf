"""Every published method of self-distillation on the tiny base, with the same attempts.

python scripts/bench_selfdistill.py --pilot     # every arm's learning rate, on validation problems
python scripts/bench_selfdistill.py --run       # every arm, three seeds; goes on where it stopped
python scripts/bench_selfdistill.py --run --arms 'grpo;step-critique' --seeds 0
python scripts/bench_selfdistill.py --table     # docs/bench_selfdistill.md, from the rows alone;
                                                # prints docs/benchmarks.md's part of it

An arm is a command: `mlx-fd self-distill --model tiny-base --method ...`. All arms of a seed make
the same number of attempts at problems of the train split, in as many batches, with the same LoRA;
where the self-teacher wants something written, it is the generator's truth, unless the arm says
otherwise. Each arm learns at the rate that a pilot found best for it, of the same few, with another
seed and on problems of the validation split (docs/bench_selfdistill_pilot.jsonl). Then the student,
after its last update, is measured on held-out problems, others for each seed. Rows go to
docs/bench_selfdistill.jsonl, one for each arm and seed with every problem's results; tables and
intervals come from nothing else. The arm `base` is the model before any of this.
"""

# ruff: noqa: E402
import argparse
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from mlx_fd.models.backend import backend

backend()

import mlx.core as mx
import numpy as np
from several_runs import of_problems, over_runs

from mlx_fd import runs
from mlx_fd.config import Config, to_toml
from mlx_fd.evaluation.sampling import maj_at_k, pass_at_k
from mlx_fd.evaluation.statistics import Estimate, holm
from mlx_fd.feedback.criticism import feedback_request, parsed
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt, generate
from mlx_fd.models.loading import Loaded, load
from mlx_fd.models.resolve import resolve
from mlx_fd.models.view import View
from mlx_fd.models.writing import GenerateOptions, Sampling, Turn
from mlx_fd.problems import Problem, arithmetic
from mlx_fd.problems.kinds import is_right, read_final
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.training.job import Job
from mlx_fd.training.selfdistill import plan as session
from mlx_fd.training.selfdistill import training
from mlx_fd.training.selfdistill.learning import Text, read
from mlx_fd.training.selfdistill.methods import configured
from mlx_fd.training.selfdistill.noise import noisy

# One of the file of rows: an arm and a seed with their measurements.
Row = dict[str, Any]
Rows = dict[str, dict[int, Row]]

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE = (DOCS / f"bench_selfdistill.{kind}" for kind in ("jsonl", "md"))
PILOT = DOCS / "bench_selfdistill_pilot.jsonl"
RATES, PILOT_SEED = (1e-4, 3e-4, 1e-3, 3e-3), 100
BASE = "base"
# What all arms share. Attempts are made in batches of 16: 16 problems, or 2 with 8 attempts each.
# One update a batch (Resd publishes four), so that all learn from as many tokens.
ATTEMPTS, BATCH = 640, 16
SHARED: dict[str, Any] = {
    "student": "tiny-base",
    "critic": "truth",
    "reference_style": "prose",
    "lora_rank": 16,
    "lora_scale": 4.0,
    "kd_steps": 1,
    "warmup_steps": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "probe_size": 8,
    "probe_every": 1000,
    "checkpoint_every": 1000,
}
ARMS: dict[str, dict[str, Any]] = {
    "grpo": {"method": "grpo"},
    "step-critique": {"method": "step-critique"},
    "step-critique, tiny as critic": {"method": "step-critique", "critic": "tiny"},
    "forward KL, reference": {"method": "step-critique", "context": "reference"},
    "forward KL, feedback": {"method": "step-critique", "context": "feedback"},
    "forward KL, rubric": {"method": "step-critique", "context": "rubric"},
    "opsd-reference": {"method": "opsd-reference"},
    "sdpo": {"method": "sdpo"},
    "sdft": {"method": "sdft"},
    "rcsd": {"method": "rcsd"},
    "resd": {"method": "resd"},
    "rlcsd": {"method": "rlcsd"},
    "echodistill": {"method": "echodistill", "noise_level": 0.15},
}
PROBLEMS, SAMPLES, LIMIT = 60, 12, 64
Finals = list[list[str | None]]
Values = Callable[[Row], Sequence[float]]
NOISES = (("typed", 0.15), ("transcribed", 0.15))
RARE = 0.25


# ---- measuring ----


def problems_of(seed: int) -> tuple[Sequence[arithmetic.Exercise], Sequence[Problem]]:
    """The held-out problems of a seed: exercises and problems, no two seeds share one."""
    place = slice(seed * PROBLEMS, (seed + 1) * PROBLEMS)
    return arithmetic.problems_of("test")[place], arithmetic.load("test").problems[place]


def written(
    loaded: Loaded,
    prompts: Sequence[tuple[int, ...]],
    limit: int,
    temperature: float = 0.0,
    seed: int = 0,
    size: int = 240,
) -> list[Turn]:
    turns: list[Turn] = []
    for begin in range(0, len(prompts), size):
        chunk = prompts[begin : begin + size]
        sampling = Sampling(limit, temperature, seed=seed + begin)
        turns += generate(
            loaded, [Conversation()] * len(chunk), chunk, sampling, GenerateOptions(keep=False)
        )
    return turns


def sampled(loaded: Loaded, problems: Sequence[Problem], seed: int) -> Finals:
    """For each problem the finals of its samples."""
    prompts = [
        first_prompt(loaded, answer_prompt(problem.question))
        for problem in problems
        for _ in range(SAMPLES)
    ]
    asked = [problem for problem in problems for _ in range(SAMPLES)]
    turns = written(loaded, prompts, LIMIT, 1.0, seed)
    finals = [read_final(turn.text, p) for turn, p in zip(turns, asked, strict=True)]
    return [finals[k * SAMPLES : (k + 1) * SAMPLES] for k in range(len(problems))]


def right_of(finals: Finals, problems: Sequence[Problem]) -> list[int]:
    return [
        sum(bool(is_right(final, problem)) for final in group)
        for group, problem in zip(finals, problems, strict=True)
    ]


def solved(
    loaded: Loaded, problems: Sequence[Problem], noise: tuple[str, float] | None = None
) -> str:
    """Which problems are solved greedily, with noise on their questions or without: 0 and 1."""
    questions = [noisy(p.question, *noise, 0) if noise else p.question for p in problems]
    prompts = [first_prompt(loaded, answer_prompt(question)) for question in questions]
    return "".join(
        str(int(bool(is_right(read_final(turn.text, problem), problem))))
        for turn, problem in zip(written(loaded, prompts, LIMIT), problems, strict=True)
    )


def judged(loaded: Loaded, exercises: Sequence[arithmetic.Exercise]) -> str:
    """On which answers the first wrong step is found (or none where all is right): 0 and 1."""
    rng = random.Random("bench/judging")
    request = feedback_request(loaded)
    answers = [
        arithmetic.wrong_answer(rng, e) if place % 2 else e.solution
        for place, e in enumerate(exercises)
    ]
    prompts = [
        (
            *first_prompt(loaded, answer_prompt(exercise.question)),
            *loaded.tokenizer.encode(answer, add_special_tokens=False),
            *request,
        )
        for exercise, answer in zip(exercises, answers, strict=True)
    ]
    return "".join(
        str(
            int(
                arithmetic.first_error(parsed(turn).text)
                == arithmetic.judge(exercise.solution, answer).first_error
            )
        )
        for turn, exercise, answer in zip(
            written(loaded, prompts, 112), exercises, answers, strict=True
        )
    )


def is_reasoning(piece: str) -> bool:
    """Whether a token is a number or an operator: what is calculated, and not how it is put."""
    return bool(re.fullmatch(r"[\d+*=-]+", piece.strip()))


def drift(loaded: Loaded, base: Loaded, exercises: Sequence[arithmetic.Exercise]) -> list[float]:
    """KL(base || student) on right solutions: mean over style tokens, and over reasoning tokens."""
    tokenizer = base.tokenizer
    texts = [
        Text(
            first_prompt(base, answer_prompt(exercise.question)),
            (
                *tokenizer.encode(exercise.solution, add_special_tokens=False),
                tokenizer.eos_token_id,
            ),
        )
        for exercise in exercises
    ]

    def logprobs(view: View) -> mx.array:
        states = mx.concatenate(read(view, texts, 32))
        logits = view.logits(states)[:, : base.vocab].astype(mx.float32)
        normalised: mx.array = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return normalised

    ours, theirs = logprobs(loaded.view), logprobs(base.view)
    kl = np.array((mx.exp(theirs) * (theirs - ours)).sum(-1))
    pieces = [tokenizer.decode([token]) for text in texts for token in text.target]
    reasoning = np.array([is_reasoning(piece) for piece in pieces])
    return [float(kl[~reasoning].mean()), float(kl[reasoning].mean())]


def measured(loaded: Loaded, base: Loaded, seed: int) -> Row:
    """What a model can do, on a seed's problems."""
    exercises, problems = problems_of(seed)
    finals = sampled(loaded, problems, seed=1)
    return {
        "right": right_of(finals, problems),
        "majority": [
            round(maj_at_k(group, problem.answer.__eq__), 3)
            for group, problem in zip(finals, problems, strict=True)
        ],
        "judged": judged(loaded, exercises),
        "solved": solved(loaded, problems),
        "noisy": {
            f"{kind} {level}": solved(loaded, problems, (kind, level)) for kind, level in NOISES
        },
        "drift": [round(value, 5) for value in drift(loaded, base, exercises)],
    }


# ---- running ----


def options_of(arm: str, seed: int, rate: float) -> Config:
    """An arm's whole configuration."""
    options = {**SHARED, **ARMS[arm], "lora_rate": rate}
    method = options.pop("method")
    rollouts = configured(method).selfdistill.num_generations
    size = {"batch_size": BATCH // rollouts, "episodes": ATTEMPTS // rollouts, "seed": seed}
    return configured(method, {**options, **size}, preset="tiny")


def trained(arm: str, seed: int, rate: float) -> tuple[Loaded, Row]:
    """The model of an arm after its last update, and the totals of its run."""
    plan = session.make_plan(options_of(arm, seed, rate))
    models = session.open_models(plan)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        runs.create(folder, to_toml(plan.config), plan.manifest)
        job = Job(folder, plan.config, plan.probe, plan.problems, lambda event: None)
        summary = training.run(job, models)
        attempts = runs.read_lines(folder / runs.ATTEMPTS)
        metrics = runs.read_lines(folder / runs.METRICS)
    assert summary is not None
    updates = [update for row in metrics for update in row["updates"]]
    totals = {
        "attempts": len(attempts),
        "taught": sum(row["teaches"] for row in attempts),
        "written": sum(len(row["tokens"]) for row in attempts),
        "updates": len(updates),
        "tokens": sum(update["tokens"] for update in updates),
        "headroom": json.loads(json.dumps(summary.get("headroom"))),
    }
    return models.student_lm, totals


def append(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def pilot(arms: Sequence[str], path: Path) -> None:
    """Rows {arm, rate, right} for every arm and rate that the file has none of.

    An arm whose best rate is the lowest gets a third of that, too.
    """
    problems = arithmetic.load("validation").problems[:PROBLEMS]
    for arm in (arm for arm in arms if "critic" not in ARMS[arm]):
        rates = list(RATES)
        for rate in rates:
            if rate not in piloted(path).get(arm, {}):
                loaded, _ = trained(arm, PILOT_SEED, rate)
                right = right_of(sampled(loaded, problems, seed=1), problems)
                append(path, {"arm": arm, "rate": rate, "right": right})
                print(arm, rate, f"{np.mean(right) / SAMPLES:.1%}", flush=True)
            if rate == rates[-1] and rate_of(arm, path) == min(rates):
                rates.append(float(f"{min(rates) / 3:.0e}"))


def piloted(path: Path) -> dict[str, dict[float, float]]:
    """{arm: {rate: Avg@12 on the validation problems}}."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        found.setdefault(row["arm"], {})[row["rate"]] = float(np.mean(row["right"])) / SAMPLES
    return found


def rate_of(arm: str, path: Path = PILOT) -> float:
    """The rate that the pilot found best for an arm; with another critic, for the same method."""
    method = arm if "critic" not in ARMS[arm] else ARMS[arm]["method"]
    rates = piloted(path)[method]
    return max(rates, key=lambda rate: rates[rate])


def row_of(arm: str, seed: int) -> Row:
    begin = time.perf_counter()
    base = load(resolve(SHARED["student"]))
    loaded, totals = base, Row()
    if arm != BASE:
        rate = rate_of(arm)
        loaded, totals = trained(arm, seed, rate)
        totals = {"rate": rate, **totals}
    learned = time.perf_counter()
    row = {
        "arm": arm,
        "seed": seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "mlx": version("mlx"),
        **totals,
        **measured(loaded, base, seed),
        "seconds": [round(learned - begin), round(time.perf_counter() - learned)],
    }
    if arm == BASE:
        # Rare problems are chosen by other samples than those that the gain is measured from.
        _, problems = problems_of(seed)
        row["chosen_by"] = right_of(sampled(base, problems, seed=1001), problems)
    return row


# ---- what the rows say ----


def read_rows(path: Path) -> Rows:
    """{arm: {seed: the last row of both}}, in the order of the table; empty without a file."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows: Rows = {}
    for row in map(json.loads, lines):
        rows.setdefault(row["arm"], {})[row["seed"]] = row
    return {arm: rows[arm] for arm in (BASE, *ARMS) if arm in rows}


def average(row: Row) -> list[float]:
    return [right / SAMPLES for right in row["right"]]


def passed(row: Row) -> list[float]:
    return [pass_at_k(right, SAMPLES, SAMPLES) for right in row["right"]]


def bits(name: str, inner: str | None = None) -> Values:
    return lambda row: [float(bit) for bit in (row[name][inner] if inner else row[name])]


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


def shown(estimate: Estimate, form: str = "+.1f", times: float = 100) -> str:
    text = (
        f"{estimate.value * times:{form}} ({estimate.low * times:{form}} to "
        f"{estimate.high * times:{form}})"
    )
    significant = form.startswith("+") and (estimate.low > 0 or estimate.high < 0)
    return f"**{text}**" if significant else text


# The published orderings that are looked for, better one first, and where they were published.
ORDERINGS = (
    ("step-critique", "forward KL, reference", "2606.11173"),
    ("forward KL, reference", "grpo", "2606.11173"),
    ("step-critique", "grpo", "2606.11173"),
    ("sdpo", "grpo", "2601.20802"),
    ("rcsd", "opsd-reference", "2606.19327"),
    ("rlcsd", "grpo", "2606.11709"),
    ("resd", "sdpo", "2605.12741"),
)


def orderings(rows: Rows) -> list[tuple[str, str, str, Estimate, float]]:
    """[(better, worse, source, estimate of the difference of Avg@12, adjusted p)]."""
    known = [names for names in ORDERINGS if names[0] in rows and names[1] in rows]
    found = [change(rows[better], rows[worse], average) for better, worse, _ in known]
    adjusted = holm([p for _, p in found])
    return [
        (*names, estimate, p)
        for names, (estimate, _), p in zip(known, found, adjusted, strict=True)
    ]


def table(path: Path) -> str:
    rows = read_rows(path)
    base = rows[BASE]

    def rare(seed: int) -> list[bool]:
        return [right / SAMPLES <= RARE for right in base[seed]["chosen_by"]]

    some = next(iter(rows[arm] for arm in rows if arm != BASE))
    sizes = [len(seeds) for seeds in rows.values()]
    counts = min(sizes), max(sizes)
    lines = [
        f"Tiny base, {' to '.join(map(str, dict.fromkeys(counts)))} seeds, "
        f"{PROBLEMS} held-out problems a seed, {SAMPLES} samples of each at temperature 1. "
        f"{next(iter(some.values()))['attempts']} attempts a run. Changes are against the base on "
        "the same problems, in points; in brackets 95 % t intervals over runs, each with problems "
        "of its own, paired where it is a change, bold where they leave 0 out.",
        "",
        "| | seeds | Avg@12 (%) | change | Maj@12, change | Pass@12, change | rare problems, "
        "Avg@12, change | greedy, typed noise, change | greedy, transcribed noise, change | "
        "judging, change | KL of style / reasoning tokens (millinats) | attempts that teach | "
        "updates | 1,000 tokens read |",
        "|---|--:|---|---|---|---|---|---|---|---|---|--:|--:|--:|",
    ]
    for arm, seeds in rows.items():
        own = level(seeds, average)
        cells = [arm, str(len(seeds)), shown(own, ".1f")]
        if arm == BASE:
            cells += [""] * 11
        else:

            def against_base(
                values: Values,
                kept: Callable[[int], list[bool]] | None = None,
                seeds: dict[int, Row] = seeds,
            ) -> str:
                return shown(change(seeds, base, values, kept)[0])

            style, reasoning = np.mean([row["drift"] for row in seeds.values()], axis=0) * 1000

            def total(key: str, seeds: dict[int, Row] = seeds) -> float:
                return float(np.mean([row[key] for row in seeds.values()]))

            cells += [
                against_base(average),
                against_base(lambda row: row["majority"]),
                against_base(passed),
                against_base(average, rare),
                *(against_base(bits("noisy", f"{kind} {level}")) for kind, level in NOISES),
                against_base(bits("judged")),
                f"{style:.1f} / {reasoning:.1f}",
                f"{total('taught') / total('attempts'):.0%}",
                f"{total('updates'):.0f}",
                f"{total('tokens') / 1000:.0f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Published orderings, as differences of Avg@12 in points; p by the t test over runs, "
        "corrected by Holm.",
        "",
        "| published | difference here | p |",
        "|---|---|---|",
    ]
    for better, worse, source, estimate, p in orderings(rows):
        lines.append(f"| {better} over {worse} ({source}) | {shown(estimate)} | {p:.3f} |")
    return "\n".join(lines) + "\n"


def short(path: Path) -> list[str]:
    """The tables of docs/benchmarks.md: Avg@12, judging, and the orderings looked for."""
    rows = read_rows(path)
    lines = [
        "| | seeds | Avg@12 (%) | change (points) | judging, change |",
        "|---|--:|---|---|---|",
    ]
    for arm, seeds in rows.items():
        own = shown(level(seeds, average), ".1f")
        changes = ["", ""]
        if arm != BASE:
            both = (average, bits("judged"))
            changes = [shown(change(seeds, rows[BASE], v)[0]) for v in both]
        lines.append(f"| {' | '.join([arm, str(len(seeds)), own, *changes])} |")
    lines += ["", "| published | difference here (points) | p |", "|---|---|---|"]
    for better, worse, _, estimate, p in orderings(rows):
        lines.append(f"| {better} over {worse} | {shown(estimate)} | {p:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pilot", action="store_true", help="find each arm's learning rate")
    parser.add_argument("--run", action="store_true", help="make the rows that are not there")
    parser.add_argument("--arms", default=";".join((BASE, *ARMS)), help="separated by ;")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file with the rows")
    parser.add_argument("--table", action="store_true", help="write the table")
    args = parser.parse_args()
    arms = [name.strip() for name in args.arms.split(";")]
    if unknown := [name for name in arms if name not in (BASE, *ARMS)]:
        parser.error(f"there is no arm {unknown[0]!r}; there are: {', '.join((BASE, *ARMS))}")
    if not (args.pilot or args.run or args.table):
        parser.error("say what to do: --pilot, --run or --table")
    if args.pilot:
        pilot([arm for arm in arms if arm != BASE], PILOT)
    if args.run:
        done = read_rows(args.rows)
        # Seed by seed, so that a part of the work is a whole comparison.
        for seed in map(int, args.seeds.split(",")):
            for arm in arms:
                if seed not in done.get(arm, {}):
                    row = row_of(arm, seed)
                    print(
                        arm, seed, f"Avg@12 {np.mean(average(row)):.1%}", row["seconds"], flush=True
                    )
                    append(args.rows, row)
    if args.table:
        TABLE.write_text(table(args.rows))
        print(*short(args.rows), sep="\n")


if __name__ == "__main__":
    main()
