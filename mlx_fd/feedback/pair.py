"""Expert and student in memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd.config import Config, override
from mlx_fd.models.loading import Loaded
from mlx_fd.models.student import Student
from mlx_fd.runs.plan import Plan, with_absolute_names


@dataclass(frozen=True)
class Pair:
    """The two models of a run.

    Attributes:
        expert: answers, gives feedback, merges, revises and criticises itself.
        student: the student's trainable parts around its language model.
        student_lm: that language model with the expert's tokenizer, so that both read the same
            tokens.
        vocab: tokens the two share (padding of either vocabulary is left out).
    """

    expert: Loaded
    student: Student
    student_lm: Loaded
    vocab: int


def open_pair(plan: Plan, projection: int | None = None) -> Pair:
    """Load the models of a plan.

    Args:
        plan: of the run.
        projection: size of the hidden states that the projection was made for; ``None``: the
            expert's.

    Returns:
        The models, the student with fresh LoRA and heads.
    """
    return _open(plan.expert_path, plan.student_path, plan.config, plan.vocab, projection)


def load_pair(expert: str, student: str = "", *, seed: int = 0, **options: Any) -> Pair:
    """Load an expert and a student by their names, for training code of one's own.

    The pair is checked as a run's is: the same tokenizer, token by token. Weights that both have
    are one array in memory.

    Args:
        expert: an alias, a hub name or an mlx-lm directory.
        student: likewise; empty: the expert's default student.
        seed: of the LoRA and projection initialisation.
        **options: of the models, by their names in docs/reference.md: ``train``, ``lora_rank``,
            ``lora_scale``, ``lora_layers``, ``score_at``, ``dequantize``.

    Returns:
        The models, the student with fresh LoRA and heads, ready to train.

    Raises:
        UserError: an unknown name or option, two models that do not fit, or files that are damaged.
    """
    from mlx_fd.models.pairing import check_pair
    from mlx_fd.models.resolve import resolve

    given = {"expert": str(expert), "student": str(student), "seed": seed, **options}
    config = with_absolute_names(override(Config(), given, "load_pair"))
    paths = resolve(config.models.expert), resolve(config.models.student)
    return _open(*paths, config, check_pair(*paths).shared_vocab, None)


def _open(
    expert_path: Path, student_path: Path, config: Config, vocab: int, projection: int | None
) -> Pair:
    from mlx_fd.models.loading import load_pair as load_models
    from mlx_fd.models.student import make_student

    options = config.models
    expert, base = load_models(expert_path, student_path, dequantize=options.dequantize)
    width = projection or expert.view.width
    student = make_student(base.view, width, options, config.episode.seed)
    # One tokenizer for both: they were compared token by token, and so read the same prompts.
    student_lm = dataclasses.replace(
        base,
        model=student.model,
        tokenizer=expert.tokenizer,
        vocab=vocab,
        template=expert.template,
    )
    return Pair(dataclasses.replace(expert, vocab=vocab), student, student_lm, vocab)
