"""The distilled student in use: a score and a criticism of one answer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd import runs
from mlx_fd.config import Config, read
from mlx_fd.errors import UserError
from mlx_fd.feedback.episode import feedback_request, head_score, parsed
from mlx_fd.models import fingerprint
from mlx_fd.models.context import Surroundings, context_length, too_long
from mlx_fd.models.generation import Conversation, Sampling, first_prompt, generate, prefill
from mlx_fd.models.loading import Loaded, load
from mlx_fd.models.resolve import resolve, why_changed
from mlx_fd.models.student import (
    ADAPTER_WEIGHTS,
    HEADS,
    Student,
    load_student,
    make_student,
    projection_width,
)
from mlx_fd.problems.prompts import answer_prompt, feedback_prompt
from mlx_fd.runs.checkpoints import check_weights


@dataclass(frozen=True)
class ModelRef:
    """Where a model that can be used is.

    Attributes:
        model: directory of the language model; a student's base.
        checkpoint: the student's checkpoint, ``None`` for a plain model.
        run: the run directory it belongs to.
        config: the run's configuration.
    """

    model: Path
    checkpoint: Path | None = None
    run: Path | None = None
    config: Config | None = None

    @property
    def scores(self) -> bool:
        """Whether a score head was trained: in the loop it is, by self-distillation it is not."""
        return self.config is not None and not self.config.self_distils


def _checkpoint(name: str) -> Path | None:
    """The checkpoint folder that ``name`` means, or ``None`` where it is no run's."""
    folder = Path(name).expanduser()
    if runs.is_run(folder):
        folder = folder / runs.CHECKPOINTS / "best"
        if not folder.exists():
            raise UserError(f"{name}: this run has no checkpoint yet; mlx-fd resume {name}")
    return folder if (folder / ADAPTER_WEIGHTS).is_file() else None


def locate_model(name: str) -> ModelRef:
    """A model or a student by its name, not loaded yet.

    Args:
        name: a run directory (its best checkpoint), one of its checkpoints, or a model's name.

    Raises:
        UserError: nothing of that name, a checkpoint outside its run or with other weights than
            the run wrote, or another base model than the one that was trained.
    """
    checkpoint = _checkpoint(name)
    if checkpoint is None:
        return ModelRef(resolve(name))
    checkpoint = checkpoint.resolve()
    folder = checkpoint.parents[1]
    if not runs.is_run(folder):
        raise UserError(
            f"{name}: this checkpoint is outside its run, which says what it belongs to; name a "
            f"checkpoint within a run directory (RUN/{runs.CHECKPOINTS}/NNNNNN)"
        )
    check_weights(checkpoint, (ADAPTER_WEIGHTS, HEADS))
    # First: options of another version are none of this one's.
    manifest = runs.read_manifest(folder)
    config = read(folder / runs.CONFIG)
    path = resolve(config.models.student)
    if not fingerprint.is_same(manifest.get("student", {}), path):
        why = why_changed(config.models.student, manifest.get("versions", {}))
        raise UserError(
            f"{name}: the student's base model {path} is not the one that was trained: {why}."
        )
    return ModelRef(path, checkpoint, folder, config)


def open_student(ref: ModelRef) -> tuple[Loaded, Student | None]:
    """Load a model to give feedback with.

    Returns:
        The language model with its tokenizer, and the student around it (``None`` for a plain
        model, which has no score head).

    Raises:
        UserError: files are missing or damaged, or do not belong together.
    """
    if ref.checkpoint is None or ref.config is None:
        return load(ref.model), None
    options = ref.config.models
    loaded = load(ref.model, dequantize=options.dequantize)
    # The projection is not used here, but load_student wants its place: as wide as it was.
    width = projection_width(ref.checkpoint)
    student = make_student(loaded.model, width, options, ref.config.episode.seed)
    load_student(student, ref.checkpoint)
    student.eval()
    return dataclasses.replace(loaded, model=student.model), student


def give_feedback(name: str, problem: str, answer: str, max_tokens: int) -> dict[str, Any]:
    """Judge an answer to a problem.

    Args:
        name: what :func:`locate_model` takes.
        problem: the problem's text.
        answer: the answer's text.
        max_tokens: most tokens of the feedback.

    Returns:
        ``feedback`` (text), ``written_score`` (parsed from it, or ``None``) and, for a distilled
        student, ``score``: its score head's, in (-1, 1).
    """
    ref = locate_model(name)
    _check_length(ref.model, problem, answer, max_tokens)
    loaded, student = open_student(ref)
    tokenizer = loaded.tokenizer
    prompt = (
        *first_prompt(tokenizer, answer_prompt(problem)),
        *tokenizer.encode(answer, add_special_tokens=False),
        *feedback_request(tokenizer),
    )
    hidden, before = prefill(loaded, Conversation(), prompt)
    turn = generate(loaded, [before], [prompt[-1:]], Sampling(max_tokens))[0]
    written = parsed(turn)
    if student is None or not ref.scores:
        score = {}
    else:
        score = {"score": round(head_score(student, loaded, hidden, before, prompt, turn), 4)}
    return {**score, "written_score": written.written_score, "feedback": written.text}


def _check_length(model: Path, problem: str, answer: str, max_tokens: int) -> None:
    prompts = answer_prompt("") + feedback_prompt()
    counts = too_long(
        [f"{problem}\n{answer}"], model, Surroundings(prompts, max_tokens, "--tokens")
    )
    if counts:
        raise UserError(
            f"problem and answer have {counts[0]} tokens, and with up to {max_tokens} tokens of "
            f"feedback do not fit into the {context_length(model)} of {model}; shorten them, or "
            "take a smaller --tokens"
        )
