"""A run directory with a student whose adapter and heads are random, without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fd.models.backend import backend

backend()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

from mlx_fd import runs  # noqa: E402
from mlx_fd.config import Config, override, to_toml  # noqa: E402
from mlx_fd.models.loading import load  # noqa: E402
from mlx_fd.models.student import make_student, save_student  # noqa: E402
from mlx_fd.runs.plan import make_plan  # noqa: E402


def make_run(
    folder: Path, model: Path | str, *, strength: float = 0.1, seed: int = 0, **options: Any
) -> Path:
    """Write a run whose best checkpoint is a student of ``model``.

    Args:
        folder: the run directory.
        model: expert and student's base.
        strength: standard deviation of LoRA's second factor (of the change, where all trains).
        seed: of the random weights.
        **options: of the run.
    """
    given = {
        "expert": str(model),
        "student": str(model),
        "problems": "arithmetic",
        "episodes": 4,
        "probe_size": 2,
        "lora_rank": 4,
        "lora_scale": 3.0,
        # The tests that are about these say so.
        "answers_by": "expert",
        "answer_temperature": 0.0,
        "score_at": "prompt",
        **options,
    }
    plan = make_plan(override(Config(), given, "test"))
    runs.create(folder, to_toml(plan.config), plan.manifest)
    base = load(plan.student_path)
    student = make_student(base.view, base.view.width, plan.config.models, seed)
    rng = np.random.default_rng(seed)
    changed = []
    for name, value in tree_flatten(student.trainable_parameters()):
        noise = mx.array(rng.standard_normal(value.shape).astype(np.float32))
        if name.endswith("lora_b") or name.startswith("score_head"):
            changed.append((name, strength * noise))
        elif plan.config.models.train == "full" and name.startswith("model."):
            changed.append((name, value + 0.1 * strength * noise))
    student.update(tree_unflatten(changed))
    checkpoint = folder / runs.CHECKPOINTS / "000001"
    checkpoint.mkdir()
    save_student(student, plan.config.models, plan.student_path, checkpoint)
    (folder / runs.CHECKPOINTS / "best").symlink_to("000001")
    return folder


def delta(run: Path, module: str) -> np.ndarray:
    """What the adapter adds to a module's weight [out, in], in float64, by mlx-lm's definition."""
    checkpoint = run / runs.CHECKPOINTS / "best"
    adapter = mx.load(str(checkpoint / "adapters.safetensors"))
    low, high = (np.array(adapter[f"{module}.lora_{x}"], dtype=np.float64) for x in "ab")
    scale = json.loads((checkpoint / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    return scale * (low @ high).T
