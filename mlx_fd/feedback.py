"""The distilled student in use: a score and a criticism of one answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mlx_fd import roles, runs
from mlx_fd.config import read
from mlx_fd.episode import feedback_request, head_score, parsed
from mlx_fd.errors import UserError
from mlx_fd.generation import Conversation, Sampling, generate, opening, prefill
from mlx_fd.models.loading import Loaded, content_hash, load
from mlx_fd.models.resolve import resolve
from mlx_fd.models.student import (
    ADAPTER_WEIGHTS,
    HEADS,
    Student,
    load_student,
    make_student,
    read_arrays,
)


def _checkpoint(name: str) -> Path | None:
    """The checkpoint folder that ``name`` means, or ``None`` where it is no run's."""
    folder = Path(name).expanduser()
    if runs.is_run(folder):
        folder = folder / runs.CHECKPOINTS / "best"
        if not folder.exists():
            raise UserError(f"{name}: this run has no checkpoint yet; mlx-fd resume {name}")
    return folder if (folder / ADAPTER_WEIGHTS).is_file() else None


def open_student(name: str) -> tuple[Loaded, Student | None]:
    """A model to give feedback with.

    Args:
        name: a run directory, one of its checkpoints, or a model's name.

    Returns:
        The language model with its tokenizer, and the student around it (``None`` for a plain
        model, which has no score head).

    Raises:
        UserError: nothing of that name, or a checkpoint outside its run.
    """
    checkpoint = _checkpoint(name)
    if checkpoint is None:
        return load(resolve(name)), None
    folder = checkpoint.resolve().parents[1]
    if not runs.is_run(folder):
        raise UserError(
            f"{name}: this checkpoint is outside its run, which says what it belongs to; name a "
            f"checkpoint within a run directory (RUN/{runs.CHECKPOINTS}/NNNNNN)"
        )
    config = read(folder / runs.CONFIG)
    path = resolve(config.models.student)
    if content_hash(path) != runs.read_manifest(folder).get("student", {}).get("sha256"):
        raise UserError(
            f"{name}: the student's base model {path} is not the one that was trained: its "
            "content has changed since. Bring the old one back."
        )
    loaded = load(path, dequantize=config.models.dequantize)
    # The projection is not used here, but load_student wants its place: as wide as it was.
    heads = read_arrays(checkpoint / HEADS)
    if "projection.weight" not in heads:
        raise UserError(f"{checkpoint / HEADS}: has no projection; take another checkpoint")
    width = heads["projection.weight"].shape[0]
    student = make_student(loaded.model, width, config.models, config.episode.seed)
    load_student(student, checkpoint)
    student.eval()
    return dataclasses.replace(loaded, model=student.model), student


def give_feedback(name: str, problem: str, answer: str, max_tokens: int) -> dict[str, Any]:
    """Judge an answer to a problem.

    Args:
        name: what :func:`open_student` takes.
        problem: the problem's text.
        answer: the answer's text.
        max_tokens: most tokens of the feedback.

    Returns:
        ``feedback`` (text), ``written_score`` (parsed from it, or ``None``) and, for a distilled
        student, ``score``: its score head's, in (-1, 1).
    """
    loaded, student = open_student(name)
    tokenizer = loaded.tokenizer
    prompt = (
        *opening(tokenizer, roles.answer_prompt(problem)),
        *tokenizer.encode(answer, add_special_tokens=False),
        *feedback_request(tokenizer),
    )
    hidden, before = prefill(loaded, Conversation(), prompt)
    turn = generate(loaded, [before], [prompt[-1:]], Sampling(max_tokens))[0]
    written = parsed(turn)
    if student is None:
        score = {}
    else:
        score = {"score": round(head_score(student, loaded, hidden, before, prompt, turn), 4)}
    return {**score, "written_score": written.score, "feedback": written.text}
