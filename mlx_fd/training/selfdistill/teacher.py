"""The self-teacher's weights: all of the student's arrays but the adapter's.

The base weights exist once. A teacher is a set of adapter tensors, named as the model names them,
that is put in for as long as the teacher reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_fd.config import Method

Weights = dict[str, mx.array]
# The file of a checkpoint that holds them.
TEACHER_WEIGHTS = "teacher.safetensors"


def adapter(model: nn.Module) -> Weights:
    """The adapter of a model as it is now."""
    return dict(tree_flatten(model.trainable_parameters()))


def zero_adapter(weights: Weights) -> Weights:
    """An adapter that adds exactly 0: the base model."""
    return {
        name: mx.zeros_like(value) if name.endswith("lora_b") else value
        for name, value in weights.items()
    }


@contextmanager
def adapter_swapped(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Let a model read with another adapter; its own is back in place afterwards."""
    before = adapter(model)
    model.load_weights(list(weights.items()), strict=False)
    try:
        yield
    finally:
        model.load_weights(list(before.items()), strict=False)


def first_teacher(model: nn.Module, options: Method) -> Weights:
    """The self-teacher's adapter before any update."""
    student = adapter(model)
    return zero_adapter(student) if options.self_teacher == "base" else student


def next_teacher(teacher: Weights, model: nn.Module, options: Method, updates: int) -> Weights:
    """The self-teacher's adapter after an update of the student.

    Args:
        teacher: its LoRA weights before the update.
        model: the student after the update.
        options: which teacher: ``"ema"`` keeps ``teacher_decay`` of itself.
        updates: how many there have been, with this one.
    """
    if options.self_teacher == "base":
        return teacher
    student = adapter(model)
    if options.self_teacher == "ema":
        # Rounded: 1 - 0.95 is not the float 0.05.
        rate = round(1 - options.teacher_decay, 12)
        student = {
            name: (1 - rate) * value + rate * student[name] for name, value in teacher.items()
        }
        mx.eval(student)
    elif options.self_teacher == "snapshot" and updates % options.teacher_sync_steps:
        return teacher
    return student


def keeps_teacher(options: Method) -> bool:
    """Whether the teacher's weights are neither the base model's nor the student's."""
    return options.self_teacher in ("ema", "snapshot")
