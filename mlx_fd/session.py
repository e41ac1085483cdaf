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
from typing import TYPE_CHECKING, Any

from mlx_fd import __version__, runs
from mlx_fd import problems as problem_sets
from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.models import fingerprint
from mlx_fd.models.aliases import ALIASES
from mlx_fd.models.resolve import default_student, parse_name, resolve, why_changed
from mlx_fd.problems import Problem

if TYPE_CHECKING:
    from mlx_fd.evaluation.exam import Question


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

    def exam(self) -> tuple[Question, ...]:
        """What the student is examined on, where the problems' source knows the truth."""
        size = self.config.episode.exam_size
        if self.config.problems.problems != "arithmetic" or not size:
            return ()
        from mlx_fd.evaluation.exam import questions

        return questions(size, self.config.episode.seed)


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

    from mlx_fd.backend import backend
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
    if "attention" in config.losses.losses:
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


def manifest_of(
    config: Config,
    expert: Path | None,
    student: Path,
    found: problem_sets.ProblemSet,
    vocab: int,
) -> dict[str, Any]:
    """What ``manifest.json`` holds.

    Args:
        config: of the run.
        expert: the expert's directory (of self-distillation, the critic's), if there is one.
        student: the student's.
        found: the problems that the run's were drawn from.
        vocab: tokens that student and expert share.
    """

    def model(name: str, path: Path | None) -> dict[str, Any]:
        if path is None:
            return {"name": name, "path": "", "sha256": ""}
        digest = fingerprint.content_hash(path)
        kind = fingerprint.FORMAT
        return {"name": name, "path": str(path), "sha256": digest, "fingerprint": kind}

    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "backend": backend_settings(),
        "seed": config.episode.seed,
        "expert": model(config.selfdistill.critic or config.models.expert, expert),
        "student": model(config.models.student, student),
        "problems": {
            "name": found.name,
            "split": found.split,
            "sha256": found.sha256,
            "skipped_rows": found.skipped,
        },
        "shared_vocabulary": vocab,
        "options": _flat(config),
    }


def settled(config: Config) -> Config:
    """The configuration that means the same wherever and whenever it is read again.

    The default student is named, and files and directories of this machine get their whole path.
    """
    models, source = config.models, config.problems.problems
    if source not in problem_sets.EMBEDDED:  # they are meant, whatever lies in this folder
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
            expert=settled_model(models.expert) if models.expert else "",
            student=settled_model(student),
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


def settled_model(name: str) -> str:
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
    from mlx_fd import roles
    from mlx_fd.models.directory import AGAIN, blaming
    from mlx_fd.models.memory import Workload, check_memory, weight_bytes

    expert_config, student_config = (
        json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (expert, student)
    )
    for path, sizes in ((expert, expert_config), (student, student_config)):
        with blaming(f"{path}/config.json: no model of the llama or qwen2 kind has this", AGAIN):
            weight_bytes(sizes)
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
            answer_tokens=options.answer_tokens,
            feedback_tokens=max(options.feedback_tokens, options.merge_tokens),
            solutions=losses.learns_solutions,
            attention="attention" in losses.losses,
            head_by_head=losses.attention_heads == "aligned",
            lora_rank=config.models.lora_rank,
            train_full=config.models.train == "full",
            checkpoint_layers=config.training.checkpoint_layers,
            on_cpu=on_cpu,
            float32=on_cpu and config.models.dequantize == "auto",
            shared=student == expert or source == str(expert.resolve()),
        ),
    )


# Where the run goes on is the same with another value of these; models and problems are compared by
# content.
_CHANGEABLE = (
    "expert",
    "student",
    "problems",
    "teacher_cache",
    "micro_batch",
    "checkpoint_layers",
    "checkpoint_every",
    "keep_checkpoints",
)


def _flat(config: Config) -> dict[str, Any]:
    """Every option by its name, as JSON has it."""
    sections: dict[str, dict[str, Any]] = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for options in sections.values() for name, value in options.items()}


def check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> list[str]:
    """Compare a run's manifest with what is here now, before it is resumed.

    Returns:
        Differences that make a bit-identical resume uncertain.

    Raises:
        UserError: another model, other data or other options than the run began with.
    """
    try:
        unclear = []
        for part in ("expert", "student", "problems"):
            found = fingerprint.compare(old[part], new[part])
            if found is None:
                unclear.append(
                    f"{folder}: it began with a version of mlx-fd that did not record all of its "
                    f"models: whether the {part} ({old[part]['name']}) is the same, tokenizer and "
                    "every weight, cannot be told; if you changed it, begin a new run"
                )
            elif not found:
                raise UserError(
                    f"{folder}: the run began with another {part} ({old[part]['name']}): "
                    f"{_why_other(part, old, new)}, or begin a new run."
                )
        # An older version had fewer options, and did what the others do by default.
        options, now = ({**_flat(Config()), **manifest["options"]} for manifest in (old, new))
        changed = {
            name: (value, now.get(name))
            for name, value in options.items()
            if now.get(name) != value
        }
        # With a last batch that was not full, the next one would leave problems out. With epochs or
        # phases, all that was done depends on how many episodes there were to be.
        whole = (
            options["episodes"] % options["batch_size"] == 0
            and options["epochs"] == 1
            and options["loss_weights"] in ("ema", "fixed")
        )
        uncertain = unclear + [
            f"{name} was {value}, is {new[part].get(name)}: the run goes on, but its last digits "
            "may differ from an uninterrupted one's"
            for part in ("versions", "backend")
            for name, value in old[part].items()
            if new[part].get(name) != value
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / runs.MANIFEST}: this is not what mlx-fd wrote ({error!r}). Bring the old "
            "file back, or begin a new run."
        ) from error
    command = "self-distill" if options.get("method") else "loop"
    for name, (was, is_now) in changed.items():
        if name not in _CHANGEABLE and not (name == "episodes" and whole):
            raise UserError(
                f"{folder / runs.CONFIG}: {name} was {was!r} when the run began and is {is_now!r} "
                f"now. Put it back, or begin a new run: mlx-fd {command} "
                f"--config {folder / runs.CONFIG} --out ANOTHER"
            )
    return uncertain


def changed_options(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What the user is told of options that were changed, and may be, since the run began.

    Args:
        old: the run's manifest.
        new: that of what is here now; :func:`check_same` found nothing wrong with it.
    """
    was, now = ({**_flat(Config()), **manifest["options"]} for manifest in (old, new))
    changed = [
        f"{name} was {was[name]!r}, is {now[name]!r}" for name in now if was[name] != now[name]
    ]
    return [f"{runs.CONFIG} was changed: {'; '.join(changed)}"] if changed else []


def _why_other(part: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    """Why the models or problems of two manifests differ, and what to do about it."""
    name = old[part]["name"]
    if part == "problems" or name != new[part]["name"]:
        return "its content has changed since. Bring the old one back"
    return why_changed(name, old["versions"])


def open_pair(plan: Plan, projection: int | None = None) -> Any:
    """Load the models of a plan.

    Args:
        plan: of the run.
        projection: size of the hidden states that the projection was made for; ``None``: the
            expert's.

    Returns:
        The :class:`mlx_fd.episode.Pair`, the student with fresh LoRA and heads.
    """
    from mlx_fd.episode import Pair
    from mlx_fd.models import taps
    from mlx_fd.models.loading import load_pair
    from mlx_fd.models.student import make_student

    options = plan.config.models
    expert, base = load_pair(plan.expert_path, plan.student_path, dequantize=options.dequantize)
    width = projection or taps.width(expert.model)
    student = make_student(base.model, width, options, plan.config.episode.seed)
    # One tokenizer for both: they were compared token by token, and so read the same prompts.
    reader = dataclasses.replace(
        base, model=student.model, tokenizer=expert.tokenizer, vocab=plan.vocab
    )
    expert = dataclasses.replace(expert, vocab=plan.vocab)
    return Pair(expert, student, reader, plan.vocab)


def versions() -> dict[str, str]:
    """Versions that a run's numbers depend on."""
    packages = ("mlx", "mlx-lm", "numpy", "transformers", "tokenizers")
    found = {"python": platform.python_version(), "system": platform.platform()}
    found["mlx-fd"] = __version__
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


# What the BLAS and OpenMP that MLX and NumPy may use take their number of threads from, beside what
# is under "threads" since the first version.
_THREAD_VARIABLES = (
    "GOTO_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def backend_settings() -> dict[str, Any]:
    """What a run computes with, and how sums are split over threads: their last digits."""
    from mlx_fd.backend import backend

    here = backend()
    return {
        "device": here.device,
        "blas": here.blas,
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", f"all {os.cpu_count()}"),
        **{name: os.environ.get(name, "not set") for name in _THREAD_VARIABLES},
        "cores": _cores(),
    }


def _cores() -> int:
    """How many cores this process may use; with no number of threads set, BLAS uses them all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
