"""The student: a language model with LoRA, a score head and an alignment projection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_fd.config import ModelOptions
from mlx_fd.errors import UserError
from mlx_fd.models.directory import ADAPTER_CONFIG, blaming, read_header
from mlx_fd.models.lora import lora_layers, lora_parameters, put_lora
from mlx_fd.models.onward import goes_on
from mlx_fd.models.view import View

ADAPTER_WEIGHTS = "adapters.safetensors"
HEADS = "heads.safetensors"
MADE_WITH = ("train", "lora_rank", "lora_scale", "lora_layers", "lora_keys", "score_at")
"""Options that decide, with the weights, what a student says."""


class Student(nn.Module):
    """A language model that also scores and aligns.

    Attributes:
        model: the mlx-lm model, with LoRA layers unless it trains whole.
        view: its parts.
        score_head: linear d -> 1; its tanh is the student's score. It starts at zero: no opinion.
        score_at: where it reads: ``"prompt"``, at the last token before the feedback, or
            ``"own"`` and ``"feedback"``, where the feedback's last token is predicted; they differ
            in whose feedback it learns on.
        scores: whether its head's score counts in the loop: not where no loss teaches the head.
        goes_on: whether its own feedback is read on from a text of the expert's that begins alike.
        projection: linear d -> d_expert of the hidden-alignment loss, without bias. It starts as
            the identity where the widths are equal.
    """

    def __init__(self, view: View, expert_width: int, score_at: str = "prompt"):
        super().__init__()
        self.score_at = score_at
        self.scores = True
        self.goes_on = False
        width = view.width
        self.model = view.model
        self.view = view
        self.score_head = nn.Linear(width, 1)
        self.score_head.weight = mx.zeros((1, width))
        self.score_head.bias = mx.zeros((1,))
        self.projection = nn.Linear(width, expert_width, bias=False)
        if width == expert_width:
            self.projection.weight = mx.eye(width)

    @property
    def scores_at_end(self) -> bool:
        """Whether the head reads the end of a feedback, and not what comes before it."""
        return self.score_at != "prompt"

    def score(self, final: mx.array) -> mx.array:
        """Scores in (-1, 1) of final hidden states [..., d]: shape [...], float32."""
        return mx.tanh(self.score_head(final.astype(mx.float32))).squeeze(-1)


def prepare(model: nn.Module, options: ModelOptions, seed: int = 0) -> None:
    """Freeze a language model but for what trains, in place.

    Args:
        model: its weights may be on the disk still.
        options: what trains, and LoRA's rank, scale, dropout, layers and modules.
        seed: of the dropout; LoRA's matrices are drawn from MLX's random state.

    Raises:
        UserError: ``train="full"`` on quantised weights, which cannot be trained, or modules that
            LoRA or DoRA cannot go on.
    """
    if options.train != "full":
        put_lora(model, options, seed)
        return
    if any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters())):
        raise UserError(
            "--train full needs a student with unquantised weights: choose a bf16 form "
            "(for instance --student qwen2.5-0.5b-bf16), or train LoRA."
        )
    # In bfloat16 most steps of an ordinary learning rate round to nothing.
    model.set_dtype(mx.float32)
    model.unfreeze()


def make_student(view: View, expert_width: int, options: ModelOptions, seed: int) -> Student:
    """Freeze the base and put the trainable parts on it.

    Args:
        view: of the student's language model, which is changed in place.
        expert_width: size of the expert's hidden states.
        options: as for :func:`prepare`.
        seed: of the LoRA and projection initialisation, and of the dropout.

    Raises:
        UserError: as for :func:`prepare`; or ``train="full"`` on a model whose head is no linear
            layer, which would not be learned.
    """
    # Seeded right here: MLX is lazy, and arrays made earlier must not shift this draw.
    mx.random.seed(seed)
    if options.train == "full" and view.head_path is None:
        raise UserError(
            "--train full needs a head that is one linear layer, and this model's logits are made "
            "in another way: train LoRA."
        )
    prepare(view.model, options, seed)
    student = Student(view, expert_width, options.score_at)
    mx.eval(student.parameters())
    # Two texts that begin alike drop different entries.
    if student.score_at == "own" and not options.lora_dropout:
        student.goes_on = goes_on(view)
    student.train()
    return student


def parameter_group(name: str) -> str:
    """Which learning rate a parameter takes, by its path: ``score``, ``projection`` or ``lora``."""
    head = name.split(".", 1)[0]
    return {"score_head": "score", "projection": "projection"}.get(head, "lora")


def adapter_weights(student: Student) -> dict[str, mx.array]:
    """The trained weights of the language model, named as mlx-lm names them."""
    return dict(tree_flatten(student.model.trainable_parameters()))


def head_weights(student: Student) -> dict[str, mx.array]:
    """The score head and the alignment projection."""
    return {
        name: value
        for name, value in tree_flatten(student.trainable_parameters())
        if not name.startswith("model.")
    }


def adapter_config(student: Student, options: ModelOptions, model_path: Path) -> dict[str, Any]:
    """What mlx-lm needs to put the adapter back on its model."""
    return {
        "model": str(model_path),
        "fine_tune_type": options.train,
        "num_layers": lora_layers(student.model, options),
        "lora_parameters": lora_parameters(student.model, options),
    }


def save_weights(student: Student, folder: Path) -> None:
    """Write adapter and heads into an existing folder."""
    mx.save_safetensors(str(folder / ADAPTER_WEIGHTS), adapter_weights(student))
    mx.save_safetensors(str(folder / HEADS), head_weights(student))


def save_student(student: Student, options: ModelOptions, model_path: Path, folder: Path) -> None:
    """Write adapter, adapter config and heads into an existing folder."""
    save_weights(student, folder)
    config = adapter_config(student, options, model_path)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_arrays(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file.

    Raises:
        UserError: it is missing or cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: cannot be read: it is not there")
    read_header(path)  # MLX reads on beyond the end of a file that was cut off
    with blaming(f"{path}: cannot be read"):
        arrays = mx.load(str(path), format="safetensors")
    assert isinstance(arrays, dict)
    return arrays


def read_trained(path: Path) -> dict[str, mx.array]:
    """The arrays of an adapter or of heads: what a training wrote, which must be numbers.

    An adapter with NaN loads like any other, and what it then says is chosen by nothing.

    Raises:
        UserError: it is missing, cannot be read, or has numbers that are not finite; the message
            names file and tensor.
    """
    arrays = read_arrays(path)
    for name, array in arrays.items():
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            raise UserError(
                f"{path}: {name} has numbers that are not finite: these weights are damaged, or "
                "the training went wrong; take another checkpoint"
            )
    return arrays


def projection_width(folder: Path) -> int:
    """Size of the expert's hidden states that a checkpoint's projection was made for.

    Raises:
        UserError: the heads cannot be read, or hold no projection.
    """
    heads = read_arrays(folder / HEADS)
    if "projection.weight" not in heads:
        raise UserError(f"{folder / HEADS}: has no projection; take another checkpoint")
    return heads["projection.weight"].shape[0]


def load_student(student: Student, folder: Path) -> None:
    """Read what :func:`save_student` wrote, in place.

    Raises:
        UserError: a file is missing, has numbers that are not finite, or does not fit this student.
    """
    adapter, heads = read_trained(folder / ADAPTER_WEIGHTS), read_trained(folder / HEADS)
    parts = (
        (student.model, adapter, adapter_weights(student)),
        (student, heads, head_weights(student)),
    )
    for _, weights, wanted in parts:
        shapes = {name: value.shape for name, value in weights.items()}
        if shapes != {name: value.shape for name, value in wanted.items()}:
            raise UserError(f"{folder}: these weights belong to another student or LoRA rank.")
    # All of them fit before one is put in.
    for module, weights, _ in parts:
        module.load_weights(list(weights.items()), strict=False)
    mx.eval(student.parameters())
