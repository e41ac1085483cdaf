"""Experts made worse in steps: where does the student stop gaining, and does it carry over?

python scripts/bench_transfer.py --runs DIR     # 3 experts, five seeds; goes on where it stopped
python scripts/bench_transfer.py --table        # docs/bench_transfer.md, from the rows alone

The experts are the tiny one with fewer and fewer of its MLPs' neurons, those that weigh least gone
first and nothing trained after it, so that they answer about 100, 80 and 60 % of the problems: the
worse they answer, the worse they judge. The student is the same untrained one for all. A run is the
loop, as `mlx-fd loop` makes it, on problems of one and two steps. Then student, untrained student
and expert judge answers to held-out problems and solve these: problems of the same kind; those that
are longer, three and four steps in the same words; and those of the split `transfer`, one and two
steps in sentences and with numbers that neither model ever saw. All runs of a seed have the same
problems, and no two seeds share any. Rows go to docs/bench_transfer.jsonl, one for each run.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rows import Row, add, bits, bold, latest, made
from scipy import stats
from several_runs import RunValue, of_problems, over_runs
from train_tiny import TINY_RECIPES, cut, make_model, make_tokenizer, write_tokenizer

from mlx_fd.evaluation.processbench import f1
from mlx_fd.evaluation.statistics import Estimate, holm, mean, paired_bootstrap

Column = NDArray[np.float64]

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE = (DOCS / f"bench_transfer.{kind}" for kind in ("jsonl", "md"))
# Neurons that each of the expert's MLPs keeps, of 384.
EXPERTS = (384, 240, 208)
STUDENT = "tiny-student"
SHORT, LONG = (1, 2), (3, 4)
# {set: (split, steps of its problems)}
SETS = {"same": ("test", SHORT), "longer": ("test", LONG), "other words": ("transfer", SHORT)}
EPISODES, PROBE = 64, 32
# Beside the preset tiny: short runs, in which the expert is always asked.
OPTIONS: dict[str, Any] = {
    "student": STUDENT,
    "max_disagreement": 0.0,
    "exam_size": 0,
    "probe_size": PROBE,
    "batch_size": 32,
    "kd_steps": 10,
    "replay_size": 512,
}
TEST = 60
UNREADABLE = "-"
# {(seed, size): what the untrained student makes of the questions}; alike beside each expert.
_BEFORE: dict[tuple[int, int], Row] = {}


# ---- running ----


def pruned(neurons: int, folder: Path) -> Path:
    """The tiny expert with so many neurons in each MLP, in float32; made where it is not there."""
    from mlx_lm.utils import save_config, save_model

    from mlx_fd.models.resolve import resolve

    if not (folder / "config.json").exists():
        tokenizer = make_tokenizer()
        write_tokenizer(tokenizer, folder)
        recipe = dataclasses.replace(TINY_RECIPES["expert"], intermediate=neurons)
        model, config = make_model(recipe, tokenizer)
        model.load_weights(cut(resolve("tiny"), neurons))
        save_model(folder, model)
        save_config(dict(config), folder / "config.json")
    return folder


def different(split: str, steps: tuple[int, ...]) -> Iterator[Any]:
    """Generated problems of a split, no two alike."""
    from mlx_fd.problems import arithmetic

    seen = set()
    for drawn in arithmetic.exercises(split, 0, steps=steps):
        if drawn.question not in seen:
            seen.add(drawn.question)
            yield drawn


def drawn_for(seed: int, size: int, split: str, steps: tuple[int, ...]) -> list[Any]:
    """A seed's share of them."""
    return list(itertools.islice(different(split, steps), seed * size, (seed + 1) * size))


def learned_from(seed: int, episodes: int, file: Path) -> Path:
    """A seed's problems to learn from and to watch, as a file."""
    problems = drawn_for(seed, episodes + PROBE, "train", SHORT)
    lines = [json.dumps({"question": one.question, "answer": one.solution}) for one in problems]
    file.write_text("\n".join(lines) + "\n")
    return file


@functools.cache
def questions(seed: int, size: int, name: str) -> tuple[Any, ...]:
    """A seed's questions of a set, every second answer wrong."""
    from mlx_fd.problems import Problem, arithmetic
    from mlx_fd.problems.sources import Question

    rng = random.Random(f"bench_transfer/{name}/{seed}")
    found = []
    for place, one in enumerate(drawn_for(seed, size, *SETS[name])):
        text = arithmetic.wrong_answer(rng, one) if place % 2 else one.solution
        verdict = arithmetic.judge(one.solution, text)
        result = str(one.steps[-1].result)
        problem = Problem(f"{name}-{seed}-{place}", one.question, one.solution, result)
        found.append(Question(problem, text, verdict.first_error, verdict.score))
    return tuple(found)


def examined(loaded: Any, asked: Sequence[Any], options: Any) -> Row:
    """What a model makes of questions, greedily: the first error it names, what it solves."""
    from mlx_fd.feedback.criticism import criticisms, feedback_request, parsed
    from mlx_fd.feedback.turns import answer
    from mlx_fd.models.generation import said
    from mlx_fd.models.writing import GenerateOptions, Sampling
    from mlx_fd.problems import arithmetic
    from mlx_fd.problems.kinds import form_of
    from mlx_fd.problems.prompts import answer_prompt

    def prompt(one: Any) -> tuple[int, ...]:
        tokens = loaded.tokenizer.encode(one.answer, add_special_tokens=False)
        first = answer_prompt(one.problem.question, form_of(one.problem))
        return (*said(loaded, first, tokens), *feedback_request(loaded))

    written = criticisms(
        loaded,
        [prompt(one) for one in asked],
        Sampling(options.max_feedback_tokens),
        GenerateOptions(),
    )
    named = [arithmetic.first_error(parsed(one.turn).text) for one in written]
    problems = [one.problem for one in asked]
    solutions = answer(
        loaded, problems, options, 0, lambda step, tokens: None, temperature=0.0, keep=False
    )
    return {
        "named": "".join(UNREADABLE if one is None else str(one) for one in named),
        "solved": bits([one.is_correct for one in solutions]),
    }


def configured(expert: Path, problems: Path, seed: int, episodes: int) -> Any:
    """The configuration of a run."""
    from mlx_fd.config import override, preset

    given = {"expert": str(expert), "problems": str(problems), "seed": seed, "episodes": episodes}
    return override(preset("tiny"), {**OPTIONS, **given}, "bench_transfer")


def row_of(neurons: int, seed: int, folder: Path, size: int, episodes: int) -> Row:
    """A run, and what comes of it. A run is short: one that was stopped begins anew."""
    from mlx_fd import runs
    from mlx_fd.config import to_toml
    from mlx_fd.feedback.pair import open_pair
    from mlx_fd.runs.plan import make_plan
    from mlx_fd.training.job import Job
    from mlx_fd.training.loop import run
    from mlx_fd.training.probe import load_probe

    begun = time.process_time()
    expert = pruned(neurons, folder / f"expert-{neurons}")
    file = learned_from(seed, episodes, folder / f"problems-{seed}.jsonl")
    plan = make_plan(configured(expert, file, seed, episodes))
    pair, generation = open_pair(plan), plan.config.generation
    asked = [one for name in SETS for one in questions(seed, size, name)]
    results = {"expert": examined(pair.expert, asked, generation)}
    if (seed, size) not in _BEFORE:
        _BEFORE[seed, size] = examined(pair.student_lm, asked, generation)
    results["before"] = _BEFORE[seed, size]
    here = folder / f"run-{neurons}-seed{seed}"
    shutil.rmtree(here, ignore_errors=True)
    with runs.locked(here):
        runs.create(here, to_toml(plan.config), plan.manifest)
        summary = run(Job(here, plan.config, plan.probe, plan.problems, lambda event: None), pair)
    assert summary is not None
    results["after"] = examined(pair.student_lm, asked, generation)
    probed = load_probe(here)
    assert probed is not None
    done = runs.read_episodes(here)
    experts = [one["expert_feedback"] for one in done]
    return {
        "neurons": neurons,
        "seed": seed,
        **made(),
        "cpu_seconds": round(time.process_time() - begun, 1),
        "headroom": probed[0].headroom.to_json(),
        "updates": summary["updates"]["steps"],
        "expert_verdicts": summary["expert_verdicts"],
        "episodes": {
            "first": bits([one["correct_before"] for one in done]),
            "final": bits([one["correct_after"] for one in done]),
            "distilled": bits([one["gate"]["distilled"] for one in done]),
            "expert": signs([one["written_score"] if one else None for one in experts]),
            "student": signs([one["student_feedback"]["written_score"] for one in done]),
        },
        "truth": "".join(str(one.first_error) for one in asked),
        **results,
    }


def signs(scores: Sequence[float | None]) -> str:
    """Of each score whether it finds an answer good (1) or not (0)."""
    return "".join(UNREADABLE if one is None else str(int(one > 0)) for one in scores)


# ---- what the rows say ----

MEASURES = {
    "solved": "problems solved (%)",
    "f1": "F1 of first errors (%)",
    "named": "first errors named rightly, or none (%)",
    "agreed": "the same first error as the expert (%)",
}


def marks(row: Row, name: str, who: str, what: str) -> Column:
    """Of each question of a set, 1 where it is so.

    Args:
        row: a run's.
        name: of the set.
        who: ``expert``, or the student ``before`` or ``after``.
        what: ``solved``; ``named``: the first error as it is; ``agreed``: as the expert names it;
            ``wrong``: the answer had an error.
    """
    size = len(row["truth"]) // len(SETS)
    begin = list(SETS).index(name) * size
    part = slice(begin, begin + size)
    if what == "solved":
        return np.array([float(bit) for bit in row[who]["solved"][part]])
    truth, said = row["truth"][part], row[who]["named"][part]
    if what == "wrong":
        return np.array([float(error != "0") for error in truth])
    other = row["expert"]["named"][part] if what == "agreed" else truth
    pairs = zip(said, other, strict=True)
    return np.array([float(one == two != UNREADABLE) for one, two in pairs])


def columns(rows: Sequence[Row], name: str, who: str, measure: str) -> list[Column]:
    """What :func:`statistic` of a measure takes: the marks of some runs' questions."""
    kinds = ("named", "wrong") if measure == "f1" else (measure,)
    return [np.concatenate([marks(row, name, who, kind) for row in rows]) for kind in kinds]


def statistic(measure: str) -> Callable[..., float]:
    return f1 if measure == "f1" else mean


def value(rows: Sequence[Row], name: str, who: str, measure: str) -> float:
    """A measure over all questions of some runs."""
    return statistic(measure)(*columns(rows, name, who, measure))


def change_of(row: Row, name: str, measure: str) -> RunValue:
    """What a run changed in a measure, paired by question."""
    after, *shared = columns([row], name, "after", measure)
    before = columns([row], name, "before", measure)[0]
    of = statistic(measure)
    return of_problems(
        [after, before, *shared], lambda new, old, *rest: of(new, *rest) - of(old, *rest)
    )


def over_problems(rows: Sequence[Row], name: str, measure: str) -> Estimate:
    """The change over the questions of all runs, which takes these runs as they are."""
    after, *shared = columns(rows, name, "after", measure)
    before = columns(rows, name, "before", measure)[0]
    return paired_bootstrap(after, before, statistic(measure), shared)[0]


def by_expert(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """The rows of each expert, the whole one first."""
    experts = sorted({row["neurons"] for row in rows}, reverse=True)
    return {neurons: [row for row in rows if row["neurons"] == neurons] for neurons in experts}


# ---- what the headroom check said ----

PREDICTORS = {
    "answers": "expert's right answers less the student's",
    "judged": "expert's right verdicts less the student's",
    "balanced": "the same, of right and of wrong answers by halves",
    "right": "expert's right answers",
}


# {predictor: what it warns at}; "judged" as until the verdicts were taken by halves.
WARNS = {"answers": 0.0, "judged": 0.0, "balanced": 0.1}


def foretold(row: Row, predictor: str) -> float:
    """What the check, or another look at the same kind of problems, said; the more the better."""
    probed = row["headroom"]
    if predictor == "answers":
        return float((probed["expert_right"] - probed["student_right"]) / probed["problems"])
    if predictor == "judged":
        shares = [
            probed[f"{who}_judged_right"] / max(probed[f"{who}_judged"], 1)
            for who in ("expert", "student")
        ]
        return float(shares[0] - shares[1])
    if predictor == "balanced":
        return balanced(row, "expert") - balanced(row, "student")
    return float(probed["expert_right"] / probed["problems"])


def balanced(row: Row, who: str) -> float:
    """Verdicts on the first batch's answers, before anything was learned: of right and wrong ones.

    The mean of the shares that are right about right and about wrong answers.
    """
    done = row["episodes"]
    first, said = (text[:PROBE] for text in (done["first"], done[who]))
    shares = []
    for kind in "01":
        verdicts = [v for v, right in zip(said, first, strict=True) if right == kind]
        shares.append(sum(v == kind for v in verdicts) / len(verdicts) if verdicts else 0.5)
    return sum(shares) / 2


def rank_correlation(rows: Sequence[Row], predictor: str, name: str, measure: str) -> Estimate:
    """Spearman's, over all runs; the interval is Student's t on a jackknife over seeds.

    The runs of a seed share their problems, so seeds are what there is several of.
    """
    seeds = sorted({row["seed"] for row in rows})
    gains = {id(row): change_of(row, name, measure).value for row in rows}

    def without(left_out: int | None) -> float:
        kept = [row for row in rows if row["seed"] != left_out]
        said = [foretold(row, predictor) for row in kept]
        if len(set(said)) < 2:
            return math.nan
        return float(stats.spearmanr(said, [gains[id(row)] for row in kept]).statistic)

    n, whole = len(seeds), without(None)
    if n < 2:
        return Estimate(whole, math.nan, math.nan, n)
    parts = np.array([without(seed) for seed in seeds])
    error = math.sqrt((n - 1) * float(parts.var()))
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return Estimate(whole, max(whole - half, -1.0), min(whole + half, 1.0), n)


# ---- the tables ----


def table(path: Path) -> str:
    """The rows as tables in Markdown."""
    rows = [*latest(path, "neurons", "seed").values()]
    experts = by_expert(rows)
    size = len(rows[0]["truth"]) // len(SETS)
    seeds = sorted({row["seed"] for row in rows})
    episodes = len(rows[0]["episodes"]["first"])
    compared = {
        (name, neurons, measure): over_runs([change_of(row, name, measure) for row in of])
        for name in SETS
        for neurons, of in experts.items()
        for measure in MEASURES
    }
    adjusted = dict(zip(compared, holm([p for _, p in compared.values()]), strict=True))
    lines = [
        f"The tiny expert with fewer of its MLPs' 384 neurons, `{STUDENT}`, `mlx-fd loop` on "
        f"{episodes} problems of one and two steps, seeds {', '.join(map(str, seeds))}; then "
        f"{size} questions of each set for each seed, half of the answers wrong. In brackets 95 % "
        "intervals, paired by question, bold where they leave 0 out: Student's t over runs and "
        "their questions, and the bootstrap over all questions, which takes these runs as they "
        "are. p is that of t, with Holm's correction for all differences of the three tables.",
    ]
    for name in SETS:
        lines += [
            "",
            f"**{name}** ({HEADS[name]})",
            "",
            "| expert's neurons | | expert | student before | after | change (points), over runs | "
            "over questions | p |",
            "|--:|---|--:|--:|--:|---|---|--:|",
        ]
        for neurons, of in experts.items():
            for measure, label in MEASURES.items():
                estimate, _ = compared[name, neurons, measure]
                p = adjusted[name, neurons, measure]
                expert = value(of, name, "expert", measure)
                cells = [
                    str(neurons),
                    label,
                    "" if measure == "agreed" else f"{100 * expert:.1f}",
                    *(f"{100 * value(of, name, who, measure):.1f}" for who in ("before", "after")),
                    bold(estimate),
                    bold(over_problems(of, name, measure)),
                    "" if np.isnan(p) else f"{p:.3f}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *headroom_tables(rows)]) + "\n"


HEADS = {
    "same": "one and two steps, as in the loop",
    "longer": "three and four steps",
    "other words": "one and two steps, sentences and numbers that neither model saw",
}


def headroom_tables(rows: Sequence[Row]) -> list[str]:
    """What the check said before the first update, what came, and whether they go together."""
    probe = rows[0]["headroom"]["problems"]
    lines = [
        "",
        f"**What the headroom check said** ({probe} held-out problems a run; means over runs; "
        "final answers are those of the run's own problems)",
        "",
        "| expert's neurons | right answers: expert | student | right verdicts: expert | student | "
        "by halves: expert (%) | student (%) | runs warned of answers | of verdicts, all "
        "together | of verdicts, by halves | first answers right (%) | final answers right (%) | "
        "verdicts contradicted (%) |",
        "|--:|" + "--:|" * 12,
    ]
    for neurons, of in by_expert(rows).items():
        heads = [row["headroom"] for row in of]
        names = ("expert_right", "student_right", "expert_judged_right", "student_judged_right")
        cells = [str(neurons)]
        cells += [f"{np.mean([head[name] for head in heads]):.1f}" for name in names]
        cells += [
            f"{100 * np.mean([balanced(row, who) for row in of]):.0f}"
            for who in ("expert", "student")
        ]
        cells += [
            f"{sum(foretold(row, predictor) <= bound for row in of)} of {len(of)}"
            for predictor, bound in WARNS.items()
        ]
        cells += [
            f"{100 * np.mean([float(bit) for row in of for bit in row['episodes'][name]]):.1f}"
            for name in ("first", "final")
        ]
        told = [row["expert_verdicts"] for row in of]
        share = sum(one["contradicted"] for one in told) / sum(one["known"] for one in told)
        cells.append(f"{100 * share:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Rank correlation (Spearman) with the change, over {len(rows)} runs; in brackets 95 % "
        "intervals, Student's t on a jackknife over seeds. *By halves* is not of the probe "
        f"problems but of the run's first {PROBE} episodes, before anything was learned; the "
        "last row does not look at the student.",
        "",
        "| what is known before | solved, same | F1, same | named rightly, same | solved, longer | "
        "F1, longer |",
        "|---|---|---|---|---|---|",
    ]
    for predictor, label in PREDICTORS.items():
        cells = [label]
        for measure, name in (
            *(("solved", "same"), ("f1", "same"), ("named", "same")),
            *(("solved", "longer"), ("f1", "longer")),
        ):
            cells.append(bold(rank_correlation(rows, predictor, name, measure), "+.2f", 1))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Experts made worse in steps.")
    parser.add_argument("--runs", type=Path, help="where experts and run directories go")
    parser.add_argument("--experts", default=",".join(map(str, EXPERTS)), help="neurons kept")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of each run")
    parser.add_argument("--size", type=int, default=TEST, help="questions of each set and seed")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file with the rows")
    parser.add_argument("--table", action="store_true", help="write the table")
    args = parser.parse_args()
    if args.runs:
        from mlx_fd.models.backend import backend

        backend()
        args.runs.mkdir(parents=True, exist_ok=True)
        done = latest(args.rows, "neurons", "seed")
        for seed in map(int, args.seeds.split(",")):
            for neurons in map(int, args.experts.split(",")):
                if (neurons, seed) in done:
                    continue
                row = row_of(neurons, seed, args.runs, args.size, args.episodes)
                add(args.rows, row)
                print(neurons, seed, row["cpu_seconds"], "s", flush=True)
    if args.table:
        TABLE.write_text(table(args.rows))
        print(TABLE)


if __name__ == "__main__":
    main()
