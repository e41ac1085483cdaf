"""The row functions: Metal's and CUDA's text in the emulator, and the MLX graph, in one grid."""

import itertools
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_fd.errors import UserError
from mlx_fd.losses import kernels
from mlx_fd.losses.divergence import Target, fused_linear_divergence
from mlx_fd.losses.kernel_checks import divergence_reference, float64, top_k_reference
from mlx_fd.losses.teacher import teacher_top_k
from mlx_fd.models.backend import Backend
from mlx_fd.models.logit_transform import LinearLogits, LogitTransform
from support.draws import by_day
from support.metal.cases import ROWS, close, hidden, numbers, of_twin
from support.metal.emulator import Kernel, cuda_text
from support.summed_losses import hidden_alignment_loss

pytest_plugins = ["support.metal.fixtures"]

DIALECTS = ("metal", "cuda")
SCHEDULES = list(itertools.product((True, False), ("forward", "random")))
DTYPES = (mx.float32, mx.bfloat16, mx.float16)
BETAS = {"forward": 0.0, "reverse": 1.0, "between": 0.3}


def same_anywhere(emulator, function, arrays, scale=0.0, **options):
    """Both dialects in several orders, checked and bit-equal; the graph; and the reference."""
    references = of_twin(function, arrays, **options)
    close(function(*arrays, **options, on="graph"), references, scale)
    for dialect in DIALECTS:
        first = None
        for emulator.breadth, emulator.order in SCHEDULES:
            outputs = function(*arrays, **options, on=dialect)
            close(outputs, references, scale)
            first = first or outputs
            assert all(map(mx.array_equal, outputs, first))


# ---- the references (more of them: test_divergence.py) ----


def test_divergence_by_hand():
    """Softmax of logarithms is what was there before: p = (1/2, 1/2), q = (3/4, 1/4)."""
    student, teacher = np.log([[0.75, 0.25]]), np.log([[0.5, 0.5]])
    p, q = np.array([0.5, 0.5]), np.array([0.75, 0.25])
    forward, grad = divergence_reference(student, teacher, beta=0.0, temperature=1.0)
    assert forward[0] == pytest.approx(0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25))
    np.testing.assert_allclose(grad[0], q - p, atol=1e-15)
    reverse, _ = divergence_reference(student, teacher, beta=1.0, temperature=1.0)
    assert reverse[0] == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    value, _ = divergence_reference(student, teacher, beta=0.25, temperature=1.0)
    middle = np.array([0.6875, 0.3125])
    expected = 0.25 * (p * np.log(p / middle)).sum() + 0.75 * (q * np.log(q / middle)).sum()
    assert value[0] == pytest.approx(expected)
    assert middle == pytest.approx(0.25 * p + 0.75 * q)


# ---- divergence ----


@pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS)
@pytest.mark.parametrize("dtype", by_day(DTYPES))
def test_divergence_over_shapes(emulator, dtype, beta):
    for rows, vocab in ((1, 1), (1, 9), (3, 255), (2, 257), (1, 2111)):
        arrays = [numbers(seed, rows, vocab, dtype=dtype) for seed in (0, 1)]
        # Of one token there is nothing to say: 0, up to rounding.
        scale = 1.0 if vocab == 1 else 0.0
        same_anywhere(emulator, kernels.divergence_rows, arrays, scale, beta=beta, temperature=1.0)


@pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS)
def test_divergence_of_logits_of_ten_thousand(emulator, beta):
    """Far apart, and close to each other at a great height.

    A gradient that is almost nothing, because almost all probability is in one place, is as exact
    as the difference of logits that it is made of.
    """
    wild = [numbers(0, 3, 600, size=1e4), numbers(1, 3, 600, size=1e4)]
    scale = 1e3 if beta == 1 else 0.1
    same_anywhere(emulator, kernels.divergence_rows, wild, scale, beta=beta, temperature=1.0)
    high = [numbers(0, 3, 600) + 1e4, numbers(1, 3, 600) - 1e4]
    same_anywhere(emulator, kernels.divergence_rows, high, 0.1, beta=beta, temperature=0.5)


@pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS)
def test_divergence_of_forbidden_tokens(emulator, beta):
    """-inf in both is no token at all, wherever it stands."""
    rows = [float64(numbers(seed, 2, 600)) for seed in (0, 1)]
    for logits in rows:
        logits[0, ::2] = logits[1, :300] = -np.inf
    arrays = [mx.array(logits.astype(np.float32)) for logits in rows]
    same_anywhere(emulator, kernels.divergence_rows, arrays, beta=beta, temperature=2.0)
    left = [mx.array(logits[:1, 1::2].astype(np.float32)) for logits in rows]
    for dialect in DIALECTS:
        value, grad = kernels.divergence_rows(*arrays, beta=beta, temperature=2.0, on=dialect)
        value_left, slope_left = kernels.divergence_rows(
            *left, beta=beta, temperature=2.0, on=dialect
        )
        np.testing.assert_allclose(value[:1], value_left, rtol=1e-5)
        np.testing.assert_allclose(grad[:1, 1::2], slope_left, rtol=1e-3, atol=1e-7)
        assert not np.array(grad)[0, ::2].any() and not np.array(grad)[1, :300].any()


@pytest.mark.parametrize("one_sided", ["student", "teacher"])
def test_a_token_that_only_one_of_the_two_has(emulator, one_sided):
    """A mixture has both; a KL is finite but huge, as the graph has it."""
    student, teacher = numbers(0, 2, 300), numbers(1, 2, 300)
    forbidden = mx.arange(300) % 3 == 0
    if one_sided == "student":
        teacher = mx.where(forbidden, -mx.inf, teacher)
    else:
        student = mx.where(forbidden, -mx.inf, student)
    same_anywhere(emulator, kernels.divergence_rows, [student, teacher], beta=0.4, temperature=1.0)
    beta = 1.0 if one_sided == "student" else 0.0
    options = {"beta": beta, "temperature": 1.0}
    of_graph = kernels.divergence_rows(student, teacher, **options, on="graph")
    assert (of_graph[0] > 1e18).all()
    for dialect in DIALECTS:
        outputs = kernels.divergence_rows(student, teacher, **options, on=dialect)
        close(outputs, list(map(float64, of_graph)))


def test_divergence_of_a_nan_is_nan(emulator):
    """In its own row alone."""
    logits = numbers(0, 2, 300)
    broken = mx.array(np.where(np.arange(600).reshape(2, 300) == 5, np.nan, np.array(logits)))
    for dialect, beta, pair in itertools.product(
        DIALECTS, BETAS.values(), ((broken, logits), (logits, broken))
    ):
        value, grad = kernels.divergence_rows(*pair, beta=beta, temperature=1.0, on=dialect)
        assert np.isnan(np.array(value)).tolist() == [True, False]
        assert np.isnan(np.array(grad)[0]).all() and not np.isnan(np.array(grad)[1]).any()


TRANSFORMS = {
    "scales": (LogitTransform(0.125), LogitTransform(-2.0)),
    "a cap for the student": (LogitTransform(1.0, 4.0), LogitTransform()),
    "a cap for the teacher": (LogitTransform(), LogitTransform(1.0, 4.0)),
    "all": (LogitTransform(0.5, 3.0), LogitTransform(3.0, 15.0)),
}


@pytest.mark.parametrize("transforms", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS)
def test_divergence_of_scaled_and_capped_logits(emulator, beta, transforms):
    """The gradient is by the products that the logits are made of."""
    options = {"beta": beta, "temperature": 2.0, "transforms": transforms}
    for dtype in DTYPES:
        arrays = [numbers(seed, 2, 301, dtype=dtype) for seed in (0, 1)]
        same_anywhere(emulator, kernels.divergence_rows, arrays, **options)
    # Of a forbidden token a cap makes one that is just not likely, as the model itself does.
    forbidden = mx.where(mx.arange(301) % 7 == 0, -mx.inf, numbers(0, 2, 301))
    if all(transform.soft_cap for transform in transforms):
        arrays = [forbidden, numbers(1, 2, 301)]
        same_anywhere(emulator, kernels.divergence_rows, arrays, **options)


@pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS)
def test_divergence_of_a_real_vocabulary(emulator, beta):
    arrays = [numbers(0, 1, 151936), numbers(1, 1, 151936)]
    options = {"beta": beta, "temperature": 1.0}
    for dialect in DIALECTS:
        outputs = kernels.divergence_rows(*arrays, **options, on=dialect)
        close(outputs, of_twin(kernels.divergence_rows, arrays, **options))


@pytest.mark.parametrize(("beta", "times"), [(0.0, 2), (1.0, 2), (0.3, 3)], ids=BETAS)
def test_how_often_a_logit_is_read(emulator, beta, times):
    """Only between the KLs a third time; a top-k once."""
    arrays = [numbers(0, 2, 700), numbers(1, 2, 700)]
    for dialect in DIALECTS:
        kernels.divergence_rows(*arrays, beta=beta, temperature=1.0, on=dialect)
        assert emulator.reads["student"] == emulator.reads["teacher"] == times * 2 * 700
        assert emulator.reads["gradient"] == 0
        kernels.top_k_rows(arrays[0], 20, on=dialect)
        assert emulator.reads["logits"] == 2 * 700


def test_divergence_of_mixed_types(emulator):
    arrays = [numbers(0, 2, 300, dtype=mx.bfloat16), numbers(1, 2, 300)]
    same_anywhere(emulator, kernels.divergence_rows, arrays, beta=0.5, temperature=4.0)


def test_equal_rows_do_not_diverge(emulator):
    logits = numbers(0, 2, 500)
    for dialect, beta in itertools.product(DIALECTS, BETAS.values()):
        value, grad = kernels.divergence_rows(
            logits, logits, beta=beta, temperature=1.0, on=dialect
        )
        assert mx.abs(value).max() < 1e-6 and mx.abs(grad).max() < 1e-6


# ---- alignment ----


@pytest.mark.parametrize("per_token", [False, True], ids=["pooled", "per token"])
@pytest.mark.parametrize("dtype", by_day(DTYPES))
def test_alignment_over_shapes(emulator, dtype, per_token):
    for samples, positions, width in ((1, 1, 5), (3, 5, 33), (2, 7, 256), (3, 4, 515)):
        arrays = hidden(dtype, samples, positions, width, per_token)
        same_anywhere(emulator, kernels.alignment_rows, arrays)


@pytest.mark.parametrize("per_token", [False, True], ids=["pooled", "per token"])
def test_alignment_of_large_states_and_of_none(emulator, per_token):
    student, teacher, mask = hidden(mx.float32, 3, 5, 300, per_token)
    same_anywhere(emulator, kernels.alignment_rows, [student * 1e4, teacher * 1e4, mask])
    zeros = [mx.zeros((2, 3, 40)), numbers(0, *((2, 3, 40) if per_token else (2, 40)))]
    same_anywhere(emulator, kernels.alignment_rows, [*zeros, mx.ones((2, 3))])
    zeros[1] = mx.zeros_like(zeros[1])
    same_anywhere(emulator, kernels.alignment_rows, [zeros[0] + 1, zeros[1], mx.ones((2, 3))])


# ---- top k ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_over_shapes(emulator, dtype):
    for rows, vocab in ((1, 20), (3, 255), (1, 3001)):
        arrays = [numbers(vocab, rows, vocab, dtype=dtype)]
        same_anywhere(emulator, kernels.top_k_rows, arrays, k=20)


def test_top_k_of_few_and_of_many(emulator):
    for vocab, k in ((1, 1), (257, 1), (255, 64), (600, 600)):
        same_anywhere(emulator, kernels.top_k_rows, [numbers(vocab, 2, vocab)], k=k)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_top_k_of_rows_in_order(emulator, row):
    """The most candidates that there can be, some of each tile, the fewest, and ties."""
    arrays = [mx.array(np.stack([row, row[::-1]]).astype(np.float32))]
    same_anywhere(emulator, kernels.top_k_rows, arrays, k=50)


def test_top_k_of_large_and_forbidden_logits(emulator):
    logits = float64(numbers(0, 2, 700, size=1e4))
    logits[1, 3:] = -np.inf
    arrays = [mx.array(logits.astype(np.float32))]
    for dialect in DIALECTS:
        outputs = kernels.top_k_rows(*arrays, k=5, on=dialect)
        for output, graph in zip(
            outputs, kernels.top_k_rows(*arrays, k=5, on="graph"), strict=True
        ):
            np.testing.assert_allclose(output, graph, rtol=1e-6)
        assert outputs[1].tolist()[1][3:] == [3, 4]
    close(
        [output[:1] for output in outputs],
        [reference[:1] for reference in top_k_reference(logits[:1], 5)],
    )


def test_a_k_too_large_for_the_kernel_is_left_to_the_graph(emulator):
    logits = numbers(0, 1, 2000)
    emulator.check = False
    for k in (1792, 1793):
        close(kernels.top_k_rows(logits, k, on="metal"), top_k_reference(float64(logits), k))


# ---- all ----


def test_fifty_orders_give_one_result(emulator):
    calls = [
        lambda on: kernels.divergence_rows(ours, theirs, beta=0.5, temperature=1.0, on=on),
        lambda on: kernels.alignment_rows(*states, on=on),
        lambda on: kernels.top_k_rows(ours, 40, on=on),
    ]
    ours, theirs = numbers(0, 2, 700), numbers(1, 2, 700)
    states = hidden(mx.float32, 3, 5, 33, per_token=True)
    for dialect, call in itertools.product(DIALECTS, calls):
        emulator.order = "forward"
        first = call(dialect)
        emulator.order = "random"
        for emulator.seed in range(50):
            emulator.breadth = emulator.seed % 2 == 0
            assert all(map(mx.array_equal, call(dialect), first))


def test_cuda_s_compiler_takes_the_text(monkeypatch, tmp_path):
    """All kernels in all types, with as much around them as MLX's own headers give."""
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA compiler here (nvcc)")
    texts = []

    class Stop(Exception):
        pass

    def cuda_kernel(**given):
        def call(*, inputs, output_dtypes, template, **_):
            texts.append(cuda_text(Kernel(**given), inputs, output_dtypes, template).text)
            raise Stop

        return call

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    kernels._kernel.cache_clear()
    for dtype in DTYPES:
        for beta in BETAS.values():
            with pytest.raises(Stop):
                logits = mx.zeros((2, 300), dtype)
                kernels.divergence_rows(logits, logits, beta=beta, temperature=1.0, on="cuda")
        with pytest.raises(Stop):
            kernels.top_k_rows(logits, 20, on="cuda")
        with pytest.raises(Stop):
            states = mx.zeros((2, 3, 300), dtype)
            kernels.alignment_rows(states, states, mx.ones((2, 3)), on="cuda")
    kernels._kernel.cache_clear()
    around = (
        "#include <cstdint>\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"
        "struct Shape { int32_t at[10]; "
        "__device__ int32_t operator[](int i) const { return at[i]; } };\n"
    )
    source = tmp_path / "kernels.cu"
    source.write_text(
        around + "".join(f"namespace n{i} {{\n{text}}}\n" for i, text in enumerate(texts))
    )
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-cubin", "-arch=sm_90", str(source), "-o", "/dev/null"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert len(texts) == 15
    assert done.returncode == 0, done.stderr


# ---- which of them runs ----


def test_what_runs_can_be_forced(monkeypatch):
    monkeypatch.setattr(kernels, "backend", lambda: Backend("cuda", None, ""))
    assert kernels.runnable() == ("graph", "cuda")
    for forced in ("graph", "cuda"):
        monkeypatch.setenv("MLX_FD_KERNELS", forced)
        assert kernels.chosen() == forced
    for forced, said in (
        ("metal", "MLX_FD_KERNELS=metal: MLX runs on cuda here; .* one of: graph, cuda"),
        ("vulkan", "MLX_FD_KERNELS=vulkan: must be graph, metal or cuda"),
    ):
        monkeypatch.setenv("MLX_FD_KERNELS", forced)
        with pytest.raises(UserError, match=said):
            kernels.divergence_rows(mx.zeros((1, 2)), mx.zeros((1, 2)), beta=0.5, temperature=1.0)


def test_without_a_gpu_the_graph_runs(monkeypatch):
    monkeypatch.delenv("MLX_FD_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "backend", lambda: Backend("cpu", None, ""))
    kernels._fastest_right.cache_clear()
    assert kernels.runnable() == ("graph",) and kernels.chosen() == "graph"
    kernels._fastest_right.cache_clear()


@pytest.mark.parametrize("device", DIALECTS)
def test_kernels_are_shown_before_they_are_used(device, emulator, monkeypatch, tmp_path, recwarn):
    monkeypatch.delenv("MLX_FD_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "backend", lambda: Backend(device, None, ""))
    kernels._fastest_right.cache_clear()
    assert kernels.chosen() == device and not recwarn

    folder = shutil.copytree(kernels.source_folder(), tmp_path / "kernels")
    text = (folder / "top_k.metal").read_text()
    (folder / "top_k.metal").write_text(text.replace("log(all.sum)", "all.sum"))
    monkeypatch.setattr(kernels, "source_folder", lambda: folder)
    for cache in (kernels._fastest_right, kernels._kernel):
        cache.cache_clear()
    with pytest.warns(UserWarning, match=f"the {device} kernels cannot be used here .1 of their"):
        assert kernels.chosen() == "graph"
    kernels._fastest_right.cache_clear()


@pytest.mark.parametrize("device", DIALECTS)
def test_the_losses_run_through_the_kernels(device, emulator, monkeypatch):
    """Value and gradient of the engine and of the hidden loss, and a teacher's top k."""
    rng = np.random.default_rng(0)

    def some(*shape):
        return mx.array(rng.standard_normal(shape).astype(np.float32))

    def head(rows, width):
        module = nn.Linear(width, rows)
        module.weight, module.bias = some(rows, width), some(rows)
        return module

    # Both do something to their products, and not the same.
    ours = LinearLogits(head(310, 8), LogitTransform(0.5))
    theirs = LinearLogits(head(303, 12), LogitTransform(1.5, 6.0))
    student, teacher, mask = some(5, 8), some(5, 12), mx.array([1.0, 0, 2, 1, 1])
    layers, pooled, valid = [some(2, 4, 6)] * 2, [some(2, 7)] * 2, mx.array([[1, 1, 0, 1], [1] * 4])
    projection = some(6, 7)

    def divergence(hidden, kind, standardize):
        options = {"temperature": 2.0, "vocab": 301, "standardize": standardize}
        target = Target.teacher(teacher, theirs, mask=mask, kind=kind, **options)
        return fused_linear_divergence(hidden, ours, target, chunk=2)[0]

    def alignment(states):
        return hidden_alignment_loss([states, states], pooled, valid, lambda x: x @ projection)[0]

    def everything():
        found = [
            mx.value_and_grad(lambda x, k=kind, s=standardize: divergence(x, k, s))(student)
            for kind in ("forward", "reverse", "jsd")
            for standardize in (False, True)
        ]
        top_k = teacher_top_k(teacher, theirs, k=6, temperature=2.0, vocab=301)
        return [*found, mx.value_and_grad(alignment)(layers[0]), tuple(vars(top_k).values())]

    expected = everything()
    launched, launch = set(), kernels._launch

    def noted(dialect, name, *rest, **template):
        launched.add((dialect, name))
        return launch(dialect, name, *rest, **template)

    monkeypatch.setattr(kernels, "chosen", lambda: device)
    monkeypatch.setattr(kernels, "_launch", noted)
    for found, wanted in zip(everything(), expected, strict=True):
        for one, two in zip(found, wanted, strict=True):
            np.testing.assert_allclose(np.array(one), np.array(two), rtol=2e-5, atol=2e-6)
    assert launched == {(device, name) for name in ("divergence", "alignment", "top_k")}


def test_a_text_that_the_compiler_refuses_is_a_failed_check(monkeypatch):
    """MLX raises where a kernel is first needed."""

    def refused(**given):
        def call(**_):
            raise RuntimeError("Unable to build metal library from source")

        return call

    monkeypatch.setattr(mx.fast, "metal_kernel", refused)
    kernels._kernel.cache_clear()
    checks = kernels.check_rows("metal")
    kernels._kernel.cache_clear()
    assert checks and not any(check.passed for check in checks)
    assert {check.failure for check in checks} == {"Unable to build metal library from source"}


def test_the_graph_passes_its_checks():
    checks = kernels.check_rows("graph")
    assert len(checks) > 15 and all(check.passed for check in checks)


def test_the_texts_are_found_where_the_wheel_puts_them(monkeypatch, tmp_path):
    (tmp_path / "kernel_sources").mkdir()
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "losses" / "kernels.py"))
    assert kernels.source_folder() == tmp_path / "kernel_sources"
