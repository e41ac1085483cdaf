"""The run through all sets of an evaluation: every output is a line of ``outputs.jsonl``.

``eval.json`` has what they add up to.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_fd import runs
from mlx_fd.evaluation.bench import Bench
from mlx_fd.evaluation.cache import Cache
from mlx_fd.evaluation.folders import RESULTS, request_of
from mlx_fd.evaluation.results import results_of
from mlx_fd.evaluation.sampling import WARM
from mlx_fd.evaluation.solving import Solving, first_by
from mlx_fd.evaluation.suites import Options, Set
from mlx_fd.evaluation.target import Models, Target
from mlx_fd.files import append_lines, write_atomic, write_json
from mlx_fd.runs.checked import with_digest
from mlx_fd.runs.manifest import versions
from mlx_fd.runs.records.evaluation import EvaluationFile, OutputRow

OUTPUTS = "outputs.jsonl"
_UNFINISHED = ".outputs.jsonl.tmp"


@dataclass(frozen=True)
class Attempted:
    """A system is done with so many of a set's items, samples counted."""

    set: str
    system: str
    done: int
    total: int


Report = Callable[[Attempted], None]


def make_bench(
    target: Target, options: Options, cache: Cache, progress: Callable[[str, int], None]
) -> Bench:
    """What the sets are generated with."""
    temperatures = options.temperature
    generation = target.config.generation
    by_both = generation.answers_by == "both"
    own = generation.expert_temperature if by_both else generation.answer_temperature
    first = own if temperatures is None else temperatures
    bare = 0.0 if temperatures is None else temperatures
    if options.samples > 1 and temperatures is None:
        first, bare = first or WARM, WARM
    return Bench(
        target=target,
        models=Models(target),
        cache=cache,
        seed=options.seed,
        samples=options.samples,
        first_temperature=first,
        bare_temperature=bare,
        progress=progress,
    )


def evaluate(
    bench: Bench, sets: Sequence[Set], options: Options, folder: Path, report: Report
) -> EvaluationFile:
    """Put every set before its systems and write the folder, which the caller has claimed.

    After a kill the same call goes on: batches that were done come out of the cache.

    Args:
        bench: what is generated with.
        sets: of :func:`make_sets`.
        options: the suite, its size and its files.
        folder: gets ``eval.json`` and ``outputs.jsonl``.
        report: called after each batch.

    Returns:
        What ``eval.json`` holds.

    Raises:
        UserError: the folder cannot be written.
    """
    advice = "free some space, then run the same command again: it goes on"
    target = bench.target
    # A file may change while it goes.
    request = request_of(target, options)
    # Where an evaluation is done, its outputs stay until they are there again.
    outputs = folder / (_UNFINISHED if (folder / RESULTS).exists() else OUTPUTS)
    with runs.wrap_write_errors(folder, advice):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(outputs, b"")
    found = []
    for one in sets:
        by_system: dict[str, list[list[OutputRow]]] = {}
        for system in one.systems:
            by_system[system] = [[] for _ in one.items]
            for batch in _batches(bench, one, system, report):
                with runs.wrap_write_errors(folder, advice):
                    append_lines(outputs, [row for _, row in batch])
                for index, row in batch:
                    by_system[system][index].append(row)
        found.append(results_of(one, by_system))
    results: EvaluationFile = {
        "format": 1,
        "target": target.name,
        "suite": options.suite,
        "asked": request,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "models": target.models,
        "seed": options.seed,
        "k": options.samples,
        "temperature": {"first_answers": bench.first_temperature, "bare": bench.bare_temperature},
        "answers_by": first_by(bench),
        "stands_alone": target.threshold is not None,
        "text_models": next((one.readers.about() for one in sets if isinstance(one, Solving)), {}),
        "sets": found,
    }
    with runs.wrap_write_errors(folder, advice):
        outputs.replace(folder / OUTPUTS)
        write_json(folder / RESULTS, with_digest(results))
    return results


def _batches(
    bench: Bench, one: Set, system: str, report: Report
) -> Iterator[list[tuple[int, OutputRow]]]:
    """A system's batches of rows, each with its item's place."""
    size = bench.target.config.generation.batch_size
    how = bench.target.config.generation.answer_filter
    items: Sequence[Any] = one.items
    done, total = 0, len(items) * one.samples
    for sample in range(one.samples):
        for batch, chunk in bench.batches(items):
            trials = one.attempt(bench, system, batch, sample, chunk)
            yield [
                (
                    batch * size + index,
                    {
                        "set": one.name,
                        "system": system,
                        "sample": sample,
                        **one.row(item, trial, how),
                        **trial.to_json(),
                    },
                )
                for index, (item, trial) in enumerate(zip(chunk, trials, strict=True))
            ]
            mx.clear_cache()
            done += len(chunk)
            report(Attempted(one.name, system, done, total))
