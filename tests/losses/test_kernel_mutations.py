"""Mistakes put into our kernels on purpose: the emulator and the references catch each of them."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_fd.losses import kernels
from mlx_fd.models.logit_transform import LogitTransform
from support.draws import ALL
from support.metal.cases import ROWS, close, hidden, numbers, of_twin
from support.metal.emulator import KernelError

pytest_plugins = ["support.metal.fixtures"]

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
# File, what it says, what it says by mistake; the mistake is made wherever the text stands.
MUTATIONS = {
    "no barrier before scratch is used again": (
        "common.metal",
        f"left in scratch.\n  {BARRIER}",
        "left in scratch.\n",
    ),
    "no barrier before scratch is read": ("common.metal", f"  }}\n  {BARRIER}", "  }\n"),
    "a barrier that fences nothing": ("common.metal", "mem_threadgroup", "mem_none"),
    "a barrier for some of the threads": (
        "common.metal",
        "  if (lane == 0) {\n",
        f"  if (lane == 0) {{\n    {BARRIER}",
    ),
    "one simdgroup too many": ("common.metal", "lane < simdgroups", "lane <= simdgroups"),
    "one simdgroup too few": ("common.metal", "lane < simdgroups", "lane + 1 < simdgroups"),
    "a sum that a new maximum does not rescale": ("common.metal", "seen.sum * lesser", "seen.sum"),
    "sums that the common maximum does not rescale": (
        "common.metal",
        "seen.sum * exp(scale * (seen.most - most))",
        "seen.sum",
    ),
    "a mixture the wrong way round": ("common.metal", "? beta : 1.0f", "? 1.0f - beta : 1.0f"),
    "a simdgroup of 64": ("divergence.metal", "scratch[THREADS / 32]", "scratch[THREADS / 64]"),
    "a row that ends too late": ("divergence.metal", "j < width", "j <= width"),
    "a row that ends too early": ("divergence.metal", "j < width", "j + 1 < width"),
    "rows that overlap": ("divergence.metal", "size_t(row) * width", "size_t(row) * (width - 1)"),
    "a stride one too long": ("divergence.metal", "j += THREADS", "j += THREADS + 1"),
    "all threads write the value": ("divergence.metal", "if (self == 0)", "if (self >= 0)"),
    "no scale": ("common.metal", "model.scale * product", "product"),
    "no cap": ("common.metal", "model.cap > 0.0f ? model.cap * tanh(", "false ? model.cap * tanh("),
    "a cap that is not divided by": ("common.metal", "tanh(logit / model.cap)", "tanh(logit)"),
    "no scale in the gradient": ("common.metal", "return model.scale * (1.0f", "return (1.0f"),
    "no cap in the gradient": ("common.metal", "(1.0f + share)", "1.0f"),
    "the student's transform for the teacher": (
        "divergence.metal",
        "{settings[4], settings[5]}",
        "{settings[2], settings[3]}",
    ),
    "no temperature in the gradient": ("divergence.metal", "temperature * slope", "slope"),
    "a moved maximum forgotten": ("divergence.metal", "moved * mine.sum", "0.0f"),
    "masked positions read": ("alignment.metal", "if (mask[first + i])", "if (true)"),
    "masked positions given a gradient": (
        "alignment.metal",
        "mask[first + i] ? slope : 0.0f",
        "slope",
    ),
    "the last columns left out": ("alignment.metal", "column < COLUMNS", "column + 1 < COLUMNS"),
    "columns beyond the width": ("alignment.metal", "j < width", "true"),
    "ties by the wrong index": ("common.metal", "index < other_index", "index > other_index"),
    "no barrier between exchanges": ("top_k.metal", f"        {BARRIER}", ""),
    "no barrier before collecting again": (
        "top_k.metal",
        f"held_index[K - 1];\n    {BARRIER}",
        "held_index[K - 1];\n",
    ),
    "room for more than there is": ("top_k.metal", "> CAPACITY", "> CAPACITY + THREADS"),
    "runs sorted one way": ("top_k.metal", "(low & size) == 0", "true"),
    "only lanes below 16 summed": ("cuda.h", "int apart = 16", "int apart = 8"),
    "a warp of 16": ("cuda.h", "threadIdx.x % 32", "threadIdx.x % 16"),
}
TRANSFORMS = (LogitTransform(0.5, 3.0), LogitTransform(3.0, 15.0))


def runs(dialect):
    """A few calls of each kernel; the first that is wrong ends it."""
    ours, theirs = numbers(0, 2, 700), numbers(1, 2, 700)
    # The largest logits last: maxima move all along.
    rising = mx.array(np.sort(np.array(ours), axis=-1))
    calls = [
        *(
            (kernels.divergence_rows, [student, theirs], {"beta": beta, "temperature": 2.0})
            for beta in (0.0, 1.0, 0.3)
            for student in (ours, rising)
        ),
        (
            kernels.divergence_rows,
            [ours, theirs],
            {"beta": 0.3, "temperature": 2.0, "transforms": TRANSFORMS},
        ),
        (kernels.alignment_rows, hidden(mx.float32, 3, 5, 300, per_token=False), {}),
        *(
            (kernels.top_k_rows, [mx.array(row[None].astype(np.float32))], {"k": 40})
            for row in ROWS.values()
        ),
    ]
    for function, arrays, options in calls:
        outputs = function(*arrays, **options, on=dialect)
        close(outputs, of_twin(function, arrays, **options))


@pytest.mark.parametrize("dialect", ["metal", "cuda"])
def test_without_a_mistake_all_is_well(emulator, dialect):
    runs(dialect)
    emulator.breadth = False
    runs(dialect)


# By day one of three, each of which is compiled anew.
@pytest.mark.parametrize("name", [*MUTATIONS][:: 1 if ALL else 3])
def test_a_mistake_is_caught(name, emulator, monkeypatch, tmp_path):
    file, said, mistaken = MUTATIONS[name]
    folder = shutil.copytree(kernels.source_folder(), tmp_path / "kernels")
    text = (folder / file).read_text()
    assert said in text
    (folder / file).write_text(text.replace(said, mistaken))
    monkeypatch.setattr(kernels, "source_folder", lambda: folder)
    emulator.breadth = False
    with pytest.raises((KernelError, AssertionError)) as caught:
        runs("cuda" if file == "cuda.h" else "metal")
    assert "does not compile" not in str(caught.value)
