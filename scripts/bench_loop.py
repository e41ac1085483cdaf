"""How far the loop is from the least work there is, and whether its memory stays flat.

python scripts/bench_loop.py --pair tiny              # one row: all ways, and bare mlx-lm
python scripts/bench_loop.py --pair tiny --episodes 128 --no-sequential
python scripts/bench_loop.py --pair smollm2 --episodes 8
python scripts/bench_loop.py --memory                 # 2,000 short episodes: resident memory
python scripts/bench_loop.py --table                  # docs/bench_loop.md, from the rows alone

*Lockstep*, *continuous* (with as many places as problems in a batch, and with half of them) and
*sequential* are `mlx-fd loop --profile` on the same problems, in processes of their own.
*Bare* is what mlx-lm and MLX need for the same lengths with nothing around them:
`mlx_lm.batch_generate`, turn by turn with the caches of the turns before, and steps of AdamW on
LoRA with the cross entropy of as many tokens, in micro-batches of the same size. Seconds are those
of the processor in the batches, so that other work on the machine counts little; examination, probe
set and loading are left out. Rows go to docs/bench_loop.jsonl; the table comes from nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rows import Row, add, made

from mlx_fd.runs.labels import WORK_NAMES

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE = DOCS / "bench_loop.jsonl", DOCS / "bench_loop.md"
PAIRS = {
    "tiny": ("--preset", "tiny", "--exam-size", "0", "--gate", "always", "--batch-size", "32"),
    "smollm2": (
        *("--expert", "smollm2-135m", "--student", "smollm2-135m:layers=15", "--preset", "quick"),
        *("--batch-size", "8", "--probe-size", "2", "--gate", "always", "--trigger", "always"),
    ),
}
# Places that are half of a batch, and what that way is called.
HALVES, HALF = {"tiny": 16, "smollm2": 4}, "continuous, half the places"
ARMS = ("lockstep", "continuous", HALF, "sequential")
SHORT = (
    *("--max-answer-tokens", "16", "--max-feedback-tokens", "16", "--max-merge-tokens", "8"),
    *("--kd-steps", "2", "--step-samples", "8", "--probe-size", "8", "--trigger", "always"),
    *("--batch-size", "32"),
    # Full before memory is looked at.
    *("--replay-size", "128"),
)


def run_loop(options: Sequence[str], folder: Path) -> None:
    """A run in a process of its own."""
    subprocess.run(
        [sys.executable, "-P", "-m", "mlx_fd", "loop", *options, "--quiet", "--out", str(folder)],
        env={"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | os.environ,
        stdout=subprocess.DEVNULL,
        check=True,
    )


def lines(file: Path) -> list[Row]:
    """The rows of a log."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def measured(folder: Path) -> Row:
    """What a profiled run did, and how long its batches took."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    metrics = lines(folder / "metrics.jsonl")
    work = summary["work"]
    return {
        "counts": work["counts"],
        "processor_seconds": work["processor_seconds"],
        "seconds": round(sum(row["seconds"] for row in metrics), 1),
    }


# ---- bare ----


def turns_of(rows: Sequence[Row], by_student: bool) -> Iterator[tuple[str, list[int], list[int]]]:
    """Each turn of a batch by its name, with the lengths of its prompts and texts.

    Args:
        rows: the batch's episodes.
        by_student: the student's turns, or the expert's.
    """
    for step in dict.fromkeys(step for row in rows for step in row["tokens"]):
        if (step == "answer" or step.startswith("student_")) != by_student:
            continue
        given = [row for row in rows if step in row["tokens"]]
        yield (
            step,
            [row["prefilled"][step] for row in given],
            [row["tokens"][step] for row in given],
        )


def bare(folder: Path) -> dict[str, float]:
    """Processor seconds of the same lengths with nothing around them."""
    from mlx_fd.config import read
    from mlx_fd.feedback.distill import make_optimizer
    from mlx_fd.feedback.pair import open_pair
    from mlx_fd.training.planning import plan_of

    plan = plan_of(read(folder / "config.toml"))
    pair, size = open_pair(plan), plan.config.generation.batch_size
    episodes, metrics = lines(folder / "episodes.jsonl"), lines(folder / "metrics.jsonl")
    samples = lines(folder / "samples.jsonl")
    optimizer = make_optimizer(pair.student, plan.config.training)
    writing = learning = 0.0
    for number, row in enumerate(metrics):
        begin = time.process_time()
        batch = episodes[number * size : (number + 1) * size]
        for model, by_student in ((pair.student_lm.model, True), (pair.expert.model, False)):
            _write(model, list(turns_of(batch, by_student)), going_on=not by_student)
        middle = time.process_time()
        for update in row["updates"]:
            _learn(pair.student, optimizer, samples, update["tokens"], plan.config)
        writing += middle - begin
        learning += time.process_time() - middle
    return {"writing": round(writing, 3), "learning": round(learning, 3)}


def _write(
    model: Any, turns: Sequence[tuple[str, list[int], list[int]]], *, going_on: bool
) -> None:
    from mlx_lm.generate import batch_generate

    nobody = SimpleNamespace(eos_token_ids=[], decode=lambda tokens: "")
    caches: Any = None
    for _, prompts, texts in turns:
        if caches is not None and len(caches) != len(prompts):
            caches = caches[: len(prompts)] if len(caches) > len(prompts) else None
        made = batch_generate(
            model,
            nobody,
            [[3] * length for length in prompts],
            prompt_caches=caches,
            max_tokens=texts,
            return_prompt_caches=going_on,
            completion_batch_size=len(prompts),
            prefill_batch_size=len(prompts),
        )
        caches = made.caches if going_on else None


def _learn(student: Any, optimizer: Any, samples: Sequence[Row], tokens: int, config: Any) -> None:
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_map

    lengths: list[int] = []
    while sum(lengths) < tokens:
        row = samples[len(lengths) % len(samples)]
        lengths.append(len(row["prompt"]) + len(row["target"]) - 1)
    lengths.sort()

    def loss(texts: mx.array, mask: mx.array) -> mx.array:
        rows: mx.array = nn.losses.cross_entropy(student.model(texts), texts)
        return (rows * mask).sum() / tokens

    step, total = nn.value_and_grad(student, loss), None
    for begin in range(0, len(lengths), config.training.micro_batch):
        chunk = lengths[begin : begin + config.training.micro_batch]
        mask = mx.arange(chunk[-1]) < mx.array(chunk)[:, None]
        _, gradients = step(mx.full(mask.shape, 3), mask)
        total = gradients if total is None else tree_map(mx.add, total, gradients)
        mx.eval(total)
    optimizer.update(student, total)
    mx.eval(student.trainable_parameters(), optimizer.state)


# ---- memory ----


def resident() -> float:
    """MiB of this process in memory."""
    told = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return int(told.stdout) / 1024


def memory(episodes: int) -> Row:
    """Memory of this process over a run of many short episodes, after each batch."""
    from mlx_fd.models.backend import backend

    backend()
    import mlx.core as mx

    from mlx_fd.cli.app import cli
    from mlx_fd.training import checkpoint

    found: list[tuple[int, float, float, float]] = []
    save = checkpoint.save

    def saved(run: Any, state: Any) -> None:
        save(run, state)
        active, cached = mx.get_active_memory() / 2**20, mx.get_cache_memory() / 2**20
        found.append((state.batch * 32, resident(), active, cached))

    checkpoint.save = saved
    with tempfile.TemporaryDirectory() as folder:
        options = [*PAIRS["tiny"], *SHORT, "--episodes", str(episodes), "--checkpoint-every", "1"]
        command = ["loop", *options, "--quiet", "--out", f"{folder}/run"]
        cli(command, standalone_mode=False)
    checkpoint.save = save
    settled = [one for one in found if one[0] >= 200]
    return {
        "episodes": episodes,
        "after": [[done, *(round(size, 2) for size in sizes)] for done, *sizes in found],
        "growth": [round(settled[-1][place] / settled[0][place] - 1, 4) for place in (1, 2)],
    }


# ---- rows and table ----


def row_of(pair: str, episodes: int, names: Sequence[str]) -> Row:
    """Arms of a pair by their names, and bare mlx-lm with the lengths of the first one."""
    ways = {
        "lockstep": ["--lockstep"],
        "continuous": ["--continuous"],
        HALF: ["--continuous", f"--places={HALVES[pair]}"],
        "sequential": ["--sequential"],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            options = [*PAIRS[pair], "--episodes", str(episodes), "--profile", *ways[name]]
            run_loop(options, Path(folder, name))
        return row_from(pair, episodes, {name: Path(folder, name) for name in names})


def row_from(pair: str, episodes: int, folders: Mapping[str, Path]) -> Row:
    """The row of runs that are done, the lockstep one first."""
    return {
        "pair": pair,
        "episodes": episodes,
        **made(),
        "arms": {name: measured(folder) for name, folder in folders.items()},
        "bare": bare(next(iter(folders.values()))),
    }


def table(rows: Sequence[Row]) -> str:
    """docs/bench_loop.md."""
    text = ["# The least work", "", "Made by `python scripts/bench_loop.py --table`.", ""]
    for row in [row for row in rows if "arms" in row]:
        arms = row["arms"]
        text += [
            f"**{row['pair']}**, {row['episodes']} episodes, one seed, {row['date']}, "
            f"MLX {row['mlx']}, CPU, one BLAS thread; in brackets the multiple of the least that "
            "there could be with as many places:",
            "",
            f"| | the least | {' | '.join(arms)} |",
            f"|---|--:|{'--:|' * len(arms)}",
        ]
        for name, label in WORK_NAMES.items():
            counts = [arm["counts"][name] for arm in arms.values()]
            shown = [
                f"{one['done']:,} ({one['done'] / one['least']:.2f})"
                if one["least"]
                else f"{one['done']:,}"
                for one in counts
            ]
            text.append(f"| {label} | {counts[0]['least']:,} | {' | '.join(shown)} |")
        text += [
            "",
            f"| processor seconds | bare | {' | '.join(arms)} |",
            f"|---|--:|{'--:|' * len(arms)}",
        ]
        for name in arms["lockstep"]["processor_seconds"]:
            bare_part = row["bare"].get(name)
            parts = ["-" if bare_part is None else f"{bare_part:.1f}"]
            parts += [f"{arm['processor_seconds'].get(name, 0):.1f}" for arm in arms.values()]
            text.append(f"| {name} | {' | '.join(parts)} |")
        sums = [sum(arm["processor_seconds"].values()) for arm in arms.values()]
        whole = [f"{one:.1f}" if one else "-" for one in (sum(row["bare"].values()), *sums)]
        text += [f"| all | {' | '.join(whole)} |", ""]
    for row in [row for row in rows if "growth" in row]:
        after = {one[0]: one for one in row["after"]}
        settled = min(done for done in after if done >= 200)
        first, last = after[settled], row["after"][-1]
        text += [
            f"**Memory**, {row['episodes']:,} short episodes of the tiny pair, {row['date']}: "
            f"{first[1]:.0f} MiB resident after {settled}, {last[1]:.0f} after all "
            f"({row['growth'][0]:+.1%}); MLX's arrays {first[2]:.1f} and {last[2]:.1f} MiB "
            f"({row['growth'][1]:+.1%}).",
            "",
        ]
    return "\n".join(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pair", choices=PAIRS)
    parser.add_argument("--episodes", type=int)
    parser.add_argument("--no-sequential", action="store_true", help="leave out the slowest way")
    parser.add_argument("--memory", action="store_true", help="resident memory of a long run")
    parser.add_argument("--table", action="store_true", help="write the table")
    given = parser.parse_args()
    rows = []
    if given.pair:
        arms = ARMS[:-1] if given.no_sequential else ARMS
        rows.append(row_of(given.pair, given.episodes or 96, arms))
    if given.memory:
        rows.append(
            {
                **made(),
                **memory(given.episodes or 2000),
            }
        )
    for row in rows:
        print(table([row]))
        add(ROWS, row)
    if given.table:
        TABLE.write_text(table(lines(ROWS)), encoding="utf-8")


if __name__ == "__main__":
    main()
