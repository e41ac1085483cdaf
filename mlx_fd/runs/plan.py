"""From a configuration to the models and problems of a run, with every check on the way.

What can fail fails here, before a long download or a loaded model: names, problems, tokenizers,
memory. Everything slow or large comes after everything that can be wrong.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd import problems as problem_sets
from mlx_fd import runs
from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.models import fingerprint
from mlx_fd.models.aliases import ALIASES
from mlx_fd.models.resolve import default_student, parse_name, resolve
from mlx_fd.problems import Problem
from mlx_fd.problems.sources import SOURCES

if TYPE_CHECKING:
    pass

from mlx_fd.runs.manifest import manifest_of


@dataclass(frozen=True)
class Plan:
    """A run that passed every check; nothing large is loaded yet.

    Attributes:
        config: the configuration, with the student's name filled in.
        expert_path: the expert's directory.
        student_path: the student's directory.
        vocab: tokens the two share.
        probe: held-out problems.
        problems: the run's problems, in order.
        manifest: what ``manifest.json`` holds.
        notes: what the user should know of the pair.
    """

    config: Config
    expert_path: Path
    student_path: Path
    vocab: int
    probe: tuple[Problem, ...]
    problems: tuple[Problem, ...]
    manifest: dict[str, Any]
    notes: tuple[str, ...]


def make_plan(config: Config) -> Plan:
    """Check everything a run needs.

    Raises:
        UserError: a name, file, pair of models or amount of memory that will not do.
    """
    config = settled(config)
    options = config.problems
    problem_sets.check_split(options.split, options.train_on_test)
    # Problems first: a model may be a download of hours.
    found = problem_sets.load(options.problems, options.split, skip_bad_rows=options.skip_bad_rows)
    probe, chosen = problem_sets.probe_and_train(
        found, config.episode.probe_size, options.episodes, config.episode.seed
    )
    expert_path = resolve(config.models.expert)
    student_path = resolve(config.models.student)

    fingerprint.prefetch(expert_path, student_path)

    from mlx_fd.models.backend import backend
    from mlx_fd.models.context import fitting
    from mlx_fd.models.pairing import check_pair

    pairing = check_pair(expert_path, student_path)
    skip = options.skip_bad_rows
    used = found if skip else dataclasses.replace(found, problems=(*probe, *chosen))
    fits, left_out = fitting(used, (expert_path, student_path), config, skip=skip)
    if left_out:
        probe, chosen = problem_sets.probe_and_train(
            fits, config.episode.probe_size, options.episodes, config.episode.seed
        )
    here = backend()
    if config.losses.needs_attention:
        _check_attention(expert_path, student_path)
    questions = [problem.question for problem in (*probe, *chosen)]
    check_run_memory(expert_path, student_path, questions, config, here.on_cpu)
    manifest = manifest_of(config, expert_path, student_path, found, pairing.shared_vocab)
    notes = [*pairing.warnings, *left_out]
    if found.skipped:
        notes.append(f"{found.skipped} rows of {found.name} could not be read and are left out")
    return Plan(
        config,
        expert_path,
        student_path,
        pairing.shared_vocab,
        tuple(probe),
        tuple(chosen),
        manifest,
        tuple(notes),
    )


def settled(config: Config) -> Config:
    """The configuration that means the same wherever and whenever it is read again.

    The default student is named, and files and directories of this machine get their whole path.
    """
    models, source = config.models, config.problems.problems
    if source not in SOURCES:  # they are meant, whatever lies in this folder
        source = _whole_path(source) or source
    student = models.student or _default_student(models.expert)
    losses = config.losses
    if losses.teacher_cache:
        folder = str(Path(losses.teacher_cache).expanduser().absolute())
        losses = dataclasses.replace(losses, teacher_cache=folder)
    return dataclasses.replace(
        config,
        models=dataclasses.replace(
            models,
            expert=absolute_model_name(models.expert) if models.expert else "",
            student=absolute_model_name(student),
        ),
        problems=dataclasses.replace(config.problems, problems=source),
        losses=losses,
    )


def _default_student(expert: str) -> str:
    base = parse_name(expert).base
    if base not in ALIASES and "/" not in base and _whole_path(base) is None:
        # There is no such model, and this says which one may have been meant.
        resolve(expert)
    return default_student(expert)


def absolute_model_name(name: str) -> str:
    """A model's name that means the same in any folder: the whole path of a directory."""
    parsed = parse_name(name)
    path = _whole_path(parsed.base)
    if path is None:
        return name
    return path if parsed.layers is None else f"{path}:layers={parsed.layers}"


def _whole_path(name: str) -> str | None:
    """The absolute path of something on this machine, ``None`` where there is no such thing."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name and path.exists() else None


def check_out(folder: Path) -> None:
    """Make sure that a run directory can be made, without making it.

    Raises:
        UserError: there is something in the folder, or it cannot be written.
    """
    runs.check_new(folder)
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder}: this link leads nowhere; choose another --out")
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{folder}: {there} is a file, not a folder; choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {there} cannot be written; choose another --out")


def _check_attention(*paths: Path) -> None:
    """Make sure that the attention of models can be compared; no weight is read."""
    from mlx_fd.models.attention_taps import check_block
    from mlx_fd.models.loading import open_lazily

    for path in paths:
        model, _ = open_lazily(path)
        for block in model.layers:
            check_block(block)


def check_run_memory(
    expert: Path, student: Path, questions: Sequence[str], config: Config, on_cpu: bool
) -> None:
    """Make sure the run fits into memory."""
    from mlx_fd.models.directory import AGAIN, blaming
    from mlx_fd.models.memory import Workload, check_memory, weight_bytes
    from mlx_fd.problems import prompts

    expert_config, student_config = (
        json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (expert, student)
    )
    for path, sizes in ((expert, expert_config), (student, student_config)):
        with blaming(f"{path}/config.json: no model of the llama or qwen2 kind has this", AGAIN):
            weight_bytes(sizes)
    longest = max(questions, key=len)
    nothing = prompts.Feedback("", None, ())
    said = [
        prompts.answer_prompt(longest),
        prompts.feedback_prompt(),
        prompts.merge_prompt(nothing, nothing),
        prompts.revise_prompt(""),
        prompts.critique_prompt(),
        prompts.final_prompt(),
    ]
    options, losses = config.generation, config.losses
    batch_size = min(options.batch_size, len(questions))
    # Of each episode its feedback, and its solution where those are learned from.
    samples = batch_size * (2 if losses.learns_solutions else 1)
    source = (student_config.get("mlx_fd") or {}).get("source")
    check_memory(
        expert_config,
        student_config,
        Workload(
            batch_size=batch_size,
            micro_batch=min(config.training.micro_batch, samples),
            # Fewer than 3 characters a token are rare in English and in arithmetic.
            prompt_tokens=sum(map(len, said)) // 3,
            max_answer_tokens=options.max_answer_tokens,
            max_feedback_tokens=max(options.max_feedback_tokens, options.max_merge_tokens),
            solutions=losses.learns_solutions,
            attention=losses.needs_attention,
            head_by_head=losses.attention_heads == "aligned",
            lora_rank=config.models.lora_rank,
            train_full=config.models.train == "full",
            grad_checkpoint=config.training.grad_checkpoint,
            on_cpu=on_cpu,
            float32=on_cpu and config.models.dequantize == "auto",
            shared=student == expert or source == str(expert.resolve()),
        ),
    )
