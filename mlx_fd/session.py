"""From a configuration to the models and problems of a run, with every check on the way.

What can fail fails here, before a long download or a loaded model: names, problems, tokenizers,
memory. Everything slow or large comes after everything that can be wrong.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd import problems as problem_sets
from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.models.resolve import default_student, resolve
from mlx_fd.problems import Problem


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
    options = config.problems
    problem_sets.check_split(options.split, options.train_on_test)
    # Names before anything slow: a missing model is the commonest mistake.
    expert_path = resolve(config.models.expert)
    student = config.models.student or default_student(config.models.expert)
    student_path = resolve(student)
    config = dataclasses.replace(config, models=dataclasses.replace(config.models, student=student))
    found = problem_sets.load(options.problems, options.split, skip_bad_rows=options.skip_bad_rows)
    probe, chosen = problem_sets.probe_and_train(
        found, config.episode.probe_size, options.episodes, config.episode.seed
    )

    from mlx_fd.backend import backend
    from mlx_fd.models.loading import content_hash
    from mlx_fd.models.pairing import check_pair

    pairing = check_pair(expert_path, student_path)
    here = backend()
    questions = [problem.question for problem in (*probe, *chosen)]
    _check_memory(expert_path, student_path, questions, config, here.on_cpu)
    manifest = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "backend": {"device": here.device, "blas": here.blas, "threads": _threads()},
        "seed": config.episode.seed,
        "expert": {
            "name": config.models.expert,
            "path": str(expert_path),
            "sha256": content_hash(expert_path),
        },
        "student": {
            "name": student,
            "path": str(student_path),
            "sha256": content_hash(student_path),
        },
        "problems": {
            "name": found.name,
            "split": found.split,
            "sha256": found.sha256,
            "skipped_rows": found.skipped,
        },
        "shared_vocabulary": pairing.shared_vocab,
    }
    notes = list(pairing.warnings)
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


def _check_memory(
    expert: Path, student: Path, questions: Sequence[str], config: Config, on_cpu: bool
) -> None:
    """Make sure the run fits into memory."""
    from mlx_fd import roles
    from mlx_fd.models.memory import Workload, check_memory

    configs = [json.loads((path / "config.json").read_text()) for path in (expert, student)]
    longest = max(questions, key=len)
    nothing = roles.Feedback("", None, ())
    said = [
        roles.answer_prompt(longest),
        roles.feedback_prompt(),
        roles.merge_prompt(nothing, nothing),
        roles.revise_prompt(""),
        roles.critique_prompt(),
        roles.final_prompt(),
    ]
    options = config.generation
    source = configs[1].get("mlx_fd", {}).get("source")
    check_memory(
        *configs,
        Workload(
            batch_size=options.batch_size,
            micro_batch=min(config.training.micro_batch, options.batch_size),
            # Fewer than 3 characters a token are rare in English and in arithmetic.
            prompt_tokens=sum(map(len, said)) // 3,
            answer_tokens=options.answer_tokens,
            feedback_tokens=max(options.feedback_tokens, options.merge_tokens),
            lora_rank=config.models.lora_rank,
            train_full=config.models.train == "full",
            checkpoint_layers=config.training.checkpoint_layers,
            on_cpu=on_cpu,
            float32=on_cpu and config.models.dequantize == "auto",
            shared=student == expert or source == str(expert.resolve()),
        ),
    )


def check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> list[str]:
    """Compare a run's manifest with what is here now, before it is resumed.

    Returns:
        Differences that make a bit-identical resume uncertain.

    Raises:
        UserError: another model or other data than the run began with.
    """
    for part in ("expert", "student", "problems"):
        if old[part]["sha256"] != new[part]["sha256"]:
            raise UserError(
                f"{folder}: the run began with another {part} ({old[part]['name']}): its content "
                "has changed since. Bring the old one back, or begin a new run."
            )
    uncertain = []
    for part in ("versions", "backend"):
        for name, value in old[part].items():
            if new[part].get(name) != value:
                uncertain.append(
                    f"{name} was {value}, is {new[part].get(name)}: the run goes on, but its "
                    "last digits may differ from an uninterrupted one's"
                )
    return uncertain


def open_pair(plan: Plan) -> Any:
    """Load the models of a plan.

    Returns:
        The :class:`mlx_fd.episode.Pair`, the student with fresh LoRA and heads.
    """
    from mlx_fd.episode import Pair
    from mlx_fd.models import taps
    from mlx_fd.models.loading import load_pair
    from mlx_fd.models.student import make_student

    options = plan.config.models
    expert, base = load_pair(plan.expert_path, plan.student_path, dequantize=options.dequantize)
    student = make_student(base.model, taps.width(expert.model), options, plan.config.episode.seed)
    # One tokenizer for both: they were compared token by token, and so read the same prompts.
    reader = dataclasses.replace(base, model=student.model, tokenizer=expert.tokenizer)
    return Pair(expert, student, reader, plan.vocab)


def versions() -> dict[str, str]:
    """Versions that a run's numbers depend on."""
    packages = ("mlx-fd", "mlx", "mlx-lm", "numpy", "transformers", "tokenizers")
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _threads() -> str:
    return os.environ.get("OPENBLAS_NUM_THREADS", f"all {os.cpu_count()}")
