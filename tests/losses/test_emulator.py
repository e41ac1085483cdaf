"""The kernel emulator: MLX's own text, mlx-lm's own kernels, and bugs put in on purpose."""

import itertools
import re

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner import losses as mlx_lm_losses

from mlx_fd.losses import kernels
from support.draws import ALL
from support.metal.emulator import Kernel, KernelError, metal_text

pytest_plugins = ["support.metal.fixtures"]

THEIRS = ("kl_forward", "kl_backward", "js_forward", "js_backward")
DTYPES = (mx.float32, mx.bfloat16, mx.float16)


@pytest.fixture
def theirs(monkeypatch):
    """Makes one of mlx-lm's kernels, as its installed source has it, with the function given."""
    if not all(hasattr(mlx_lm_losses, f"_make_{name}_kernel") for name in THEIRS):
        pytest.skip("this mlx-lm has other kernels")
    monkeypatch.setattr(mlx_lm_losses, "can_run_metal", lambda: True)

    def make(name, metal_kernel):
        monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
        return getattr(mlx_lm_losses, f"_make_{name}_kernel")()

    return make


# ---- the text ----


def printed_by_mlx(capfd, tmp_path, kernel, inputs, outputs, template):
    """MLX without a GPU records a kernel in an export, and prints its text on the way."""
    call = mx.fast.metal_kernel(
        name=kernel.name,
        input_names=kernel.input_names,
        output_names=kernel.output_names,
        source=kernel.source,
        header=kernel.header,
    )

    def traced(*arrays):
        return call(
            inputs=list(arrays),
            template=list(template),
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(4,) for _ in outputs],
            output_dtypes=list(outputs),
            verbose=True,
        )

    capfd.readouterr()
    mx.export_function(str(tmp_path / "kernel.mlxfn"), traced, *inputs)
    return capfd.readouterr().out.split("```\n", 1)[1].rsplit("\n```", 1)[0].rstrip("\n")


def same_text(capfd, tmp_path, kernel, inputs, outputs, template):
    ours = metal_text(kernel, inputs, outputs, template).text
    assert ours.rstrip("\n") == printed_by_mlx(capfd, tmp_path, kernel, inputs, outputs, template)


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_kernels_are_assembled_as_mlx_does(dtype, capfd, tmp_path):
    header, body = kernels.kernel_text("divergence", "metal")
    names = kernels._SIGNATURES["divergence"]
    kernel = Kernel("kernel", names.inputs, names.outputs, body, header)
    template = [("T", dtype), ("U", mx.float32), ("KIND", 2), ("THREADS", 256)]
    for rows in (1, 40):
        inputs = [mx.zeros((rows, 7), dtype), mx.zeros((rows, 7)), mx.zeros(2)]
        same_text(capfd, tmp_path, kernel, inputs, [mx.float32, dtype], template)


def test_small_inputs_scalars_and_other_templates_are_assembled_as_mlx_does(capfd, tmp_path):
    source = "uint i = thread_position_in_grid.x; o[i] = F ? x[i] : s;"
    kernel = Kernel("kernel", ["x", "s", "y"], ["o", "p"], source + " // x_shape")
    inputs = [mx.zeros((7,), mx.bool_), mx.array(2.0), mx.zeros((8,), mx.uint32)]
    for template in ([], [("F", True), ("N", -3), ("T", mx.int32)]):
        same_text(capfd, tmp_path, kernel, inputs, [mx.float32, mx.float16], template)


def test_mlx_lm_s_kernels_are_assembled_as_mlx_does(theirs, capfd, tmp_path, monkeypatch):
    specs = {name: theirs(name, Kernel) for name in THEIRS}
    monkeypatch.undo()
    for kernel in specs.values():
        inputs = [mx.zeros((2, 9)) for _ in kernel.input_names]
        outputs = [mx.float32 for _ in kernel.output_names]
        same_text(capfd, tmp_path, kernel, inputs, outputs, [("T", mx.float32), ("V", 9)])


# ---- mlx-lm's kernels ----


def run_theirs(make, emulator, dtype, vocab, metal_kernel=None):
    """All four on random logits: their errors, and what the emulator found."""
    random = np.random.default_rng(vocab)
    shape, rows = (2, vocab), 2
    q, p = (mx.array(random.normal(size=shape) * 3).astype(dtype) for _ in range(2))
    cotangent = mx.array(random.normal(size=rows)).astype(dtype)
    options = {
        "template": [("T", dtype), ("V", vocab)],
        "grid": (1024, rows, 1),
        "threadgroup": (1024, 1, 1),
    }
    findings = set()

    def run(name, inputs, shapes):
        kernel = make(name, metal_kernel or emulator.metal_kernel)
        outputs = kernel(
            inputs=inputs, output_shapes=shapes, output_dtypes=[dtype] * len(shapes), **options
        )
        findings.update(emulator.findings)
        return outputs

    (kl,) = run("kl_forward", [q, p], [(rows,)])
    (kl_slope,) = run("kl_backward", [q, p, cotangent], [shape])
    js, of_q = run("js_forward", [q, p], [(rows,), (rows,)])
    (js_slope,) = run("js_backward", [q, p, cotangent, of_q], [shape])

    log_q, log_p = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (f64(q), f64(p)))
    middle = np.logaddexp(log_q, log_p) - np.log(2)
    q64, p64, c = np.exp(log_q), np.exp(log_p), f64(cotangent)[:, None]
    kl_of_q = (q64 * (log_q - middle)).sum(-1)
    wanted = [
        (p64 * (log_p - log_q)).sum(-1),
        c * (q64 - p64),
        ((p64 * (log_p - middle)).sum(-1) + kl_of_q) / 2,
        # As the forward kernel gave it: rounded to the type.
        c / 2 * q64 * (log_q - middle - f64(of_q)[:, None]),
    ]
    errors = [
        np.abs(f64(got) - want).max() / np.abs(want).max()
        for got, want in zip((kl, kl_slope, js, js_slope), wanted, strict=True)
    ]
    return errors, findings


def f64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize(
    ("dtype", "vocab", "most"),
    [
        (mx.float32, 1000, 5e-6),
        (mx.float32, 5000, 5e-6),
        (mx.bfloat16, 5000, 1e-2),
        (mx.float16, 5000, 2e-3),
    ],
)
def test_mlx_lm_s_kernels_are_right_in_lockstep(theirs, emulator, dtype, vocab, most):
    emulator.strict = False
    errors, _ = run_theirs(theirs, emulator, dtype, vocab)
    assert max(errors) < most


def test_the_race_in_mlx_lm_s_kernels_is_found(theirs, emulator):
    """A maximum is overwritten with a sum that a slow simdgroup still has to read."""
    if "mem_none" not in theirs("kl_forward", lambda **given: given["source"]):
        pytest.skip("this mlx-lm has mended its kernels")
    emulator.strict = False
    lockstep, findings = run_theirs(theirs, emulator, mx.float32, 5000)
    assert any(finding.startswith("race: write after read on shared") for finding in findings)
    emulator.breadth = False
    legal, findings = run_theirs(theirs, emulator, mx.float32, 5000)
    assert any(finding.startswith("race: write after read on shared") for finding in findings)
    assert max(lockstep) < 5e-6 and min(legal) > 1e-3


def test_mlx_lm_s_kernels_with_the_missing_barrier_are_clean(theirs, emulator):
    """What is reported is the race, then: with it mended, nothing is, and order does not matter."""
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"

    def mended(**given):
        source = given["source"].replace("mem_none", "mem_threadgroup")
        head, mark, tail = source.partition("// Share the sum_exp across the threadgroup")
        assert mark
        return emulator.metal_kernel(**{**given, "source": head + barrier + mark + tail})

    for emulator.breadth in (True, False):
        errors, findings = run_theirs(theirs, emulator, mx.float32, 5000, mended)
        assert max(errors) < 5e-6 and not findings


# ---- bugs put in on purpose ----

PLACES = (
    "uint i = thread_position_in_grid.x, t = thread_index_in_threadgroup; "
    "uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;\n"
)
FENCED = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SUM = f"""threadgroup float s[32];
float v = simd_sum(x[i]);
if (lane == 0) s[group] = v;
{FENCED}
y[i] = simd_sum(lane < simdgroups_per_threadgroup ? s[lane] : 0.0);"""
SCHEDULES = list(itertools.product((True, False), ("forward", "reverse", "random")))


def run_body(emulator, source, *, threads=256, group=256, size=256, out=256, dtype=mx.float32):
    kernel = emulator.metal_kernel(
        name="body", input_names=["x"], output_names=["y"], source=PLACES + source
    )
    x = mx.array(np.random.default_rng(0).normal(size=size)).astype(dtype)
    (y,) = kernel(
        inputs=[x],
        output_shapes=[(out,)],
        output_dtypes=[dtype],
        grid=(threads, 1, 1),
        threadgroup=(group, 1, 1),
        template=[("T", dtype)],
    )
    return f64(x), f64(y)


BUGS = {
    "reads one too far": ("y[i] = x[i + 1];", {}, "read of x at element 256 of 256"),
    "reads before the start": ("y[i] = x[int(i) - 1];", {}, "out of bounds: read of x"),
    "reads far away": ("y[i] = x[i * 1000000];", {}, "out of bounds: read far from any buffer"),
    "writes one too far": ("y[i + 1] = x[i];", {}, "write of y at element 256 of 256"),
    "writes to an input": ("((float*)x)[i] = 1; y[i] = 0;", {}, "write to the input x"),
    "array overrun": (
        "threadgroup float a[256], b[256]; a[t + 1] = x[i]; b[t] = 0; y[i] = b[t];",
        {},
        "out of bounds: write of threadgroup array a",
    ),
    "array not set": (
        f"threadgroup float a[256]; if (t < 200) a[t] = x[i]; {FENCED} y[i] = a[255 - t];",
        {},
        "uninitialised read of a",
    ),
    "array too large": (
        "threadgroup float a[9000]; a[t] = x[i]; y[i] = a[t];",
        {},
        "36000 bytes of threadgroup memory",
    ),
    "output not written": ("if (i < 100) y[i] = x[i];", {}, "output y is not written in full"),
    "output read first": ("y[i] += x[i];", {}, "uninitialised read of y"),
    "no barrier": (
        "threadgroup float a[256]; a[t] = x[i]; y[i] = a[255 - t];",
        {},
        "race: write after read on a",
    ),
    "no barrier between lanes": (
        "threadgroup float a[256]; a[t] = x[i]; y[i] = a[t ^ 1];",
        {},
        "race: read after write on a",
    ),
    "barrier that fences nothing": (
        SUM.replace("mem_threadgroup", "mem_none"),
        {},
        "fence missing: read after write on s",
    ),
    "barrier of half the threads": (
        f"if (t < 128) {{ {FENCED} }} y[i] = x[i];",
        {},
        "barrier divergence: 128 threads have returned",
    ),
    "two barriers for one": (
        f"if (t < 128) {{ {FENCED}\n }} else {{\n {FENCED} }} y[i] = x[i];",
        {},
        "barrier divergence: threads wait at",
    ),
    "two simd operations for one": (
        "float v = x[i]; if (lane < 16) v = simd_sum(v);\n else v = simd_max(v);\n y[i] = v;",
        {},
        "divergence: lanes of simdgroup",
    ),
    "simd operation after a return": (
        "if (i >= 250) { y[i] = 0; return; } y[i] = simd_sum(x[i]);",
        {},
        "without the whole simdgroup",
    ),
    "simd operation, others at a barrier": (
        f"float v = x[i]; if (lane < 16) v = simd_sum(v);\n else {FENCED} y[i] = v;",
        {},
        "at a barrier",
    ),
    "part of a simdgroup": (
        "y[i] = simd_sum(x[i]);",
        {"threads": 250, "group": 250, "size": 250, "out": 250},
        "without the whole simdgroup",
    ),
    "threadgroups in each other's way": (
        "y[t] = x[i];",
        {"group": 64, "out": 64},
        "race: two writes on y",
    ),
    "too many threads": ("y[i] = x[i];", {"threads": 2048, "group": 2048}, "the most is 1024"),
    "float for bfloat": ("y[i] = x[i] * 2.0f;", {"dtype": mx.bfloat16}, "does not compile"),
    "array of unknown kind": ("threadgroup float a; a = x[i]; y[i] = a;", {}, "cannot read"),
    "a word Metal lacks": ("y[i] = expm1(x[i]);", {}, "does not compile"),
}


@pytest.mark.parametrize("name", [*BUGS][:: 1 if ALL else 2])
def test_a_seeded_bug_is_found(name, emulator):
    source, options, report = BUGS[name]
    with pytest.raises(KernelError, match=re.escape(report)):
        run_body(emulator, source, **options)


RIGHT = {
    "sum over a threadgroup": (SUM, {}, lambda x: np.full(256, x.sum())),
    "scratch used twice": (
        f"""threadgroup float s[32]; float m = simd_max(x[i]); if (lane == 0) s[group] = m; {FENCED}
        m = simd_max(lane < 8 ? s[lane] : -1e30); {FENCED}
        float e = simd_sum(metal::fast::exp(x[i] - m)); if (lane == 0) s[group] = e; {FENCED}
        y[i] = m + log(simd_sum(lane < 8 ? s[lane] : 0.0));""",
        {},
        lambda x: np.full(256, np.log(np.exp(x).sum())),
    ),
    "exchange in a simdgroup": (
        "threadgroup float a[256]; a[t] = x[i]; "
        "simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[t ^ 1];",
        {},
        lambda x: x[np.arange(256) ^ 1],
    ),
    "shuffle and prefix sum": (
        "float v = x[i] + simd_shuffle_xor(x[i], 1); y[i] = simd_prefix_exclusive_sum(v);",
        {},
        lambda x: np.concatenate(
            [np.cumsum(v) - v for v in (x + x[np.arange(256) ^ 1]).reshape(-1, 32)]
        ),
    ),
    "device memory through a barrier": (
        "y[i] = x[i]; threadgroup_barrier(mem_flags::mem_device); "
        f"float v = y[i ^ 32]; {FENCED.replace('mem_threadgroup', 'mem_device')} y[i] = v;",
        {},
        lambda x: x[np.arange(256) ^ 32],
    ),
    "a last threadgroup that is smaller": (
        "y[i] = x[i] * threads_per_threadgroup.x;",
        {"threads": 100, "group": 64, "size": 100, "out": 100},
        lambda x: x * np.repeat([64, 36], [64, 36]),
    ),
    "half of a bfloat": (
        "y[i] = static_cast<T>(x[i] * 0.5);",
        {"dtype": mx.bfloat16},
        lambda x: x / 2,
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_is_clean_in_any_order(name, emulator):
    source, options, reference = RIGHT[name]
    results = []
    for emulator.breadth, emulator.order in SCHEDULES:
        x, y = run_body(emulator, source, **options)
        results.append(y)
        np.testing.assert_array_equal(y, results[0])
    np.testing.assert_allclose(results[0], reference(x), rtol=1e-5, atol=1e-5)


def test_unchecked_gives_the_same_numbers(emulator):
    checked = run_body(emulator, SUM)[1]
    emulator.check = False
    np.testing.assert_array_equal(run_body(emulator, SUM)[1], checked)


def test_cuda_has_whole_blocks(emulator):
    """The surplus threads of the last block run, and must be kept from the buffers."""
    for bound, fails in (("", True), ("if (i < x_shape[0])", False)):
        kernel = emulator.cuda_kernel(
            name="whole",
            input_names=["x"],
            output_names=["y"],
            source=f"int i = blockIdx.x * blockDim.x + threadIdx.x; {bound} y[i] = 2 * x[i];",
        )
        call = {
            "inputs": [mx.arange(100, dtype=mx.float32)],
            "output_shapes": [(100,)],
            "output_dtypes": [mx.float32],
            "grid": (100, 1, 1),
            "threadgroup": (64, 1, 1),
        }
        if fails:
            with pytest.raises(KernelError, match="of x at element 100 of 100"):
                kernel(**call)
        else:
            assert mx.array_equal(kernel(**call)[0], 2 * mx.arange(100))


def test_schedules_run_in_the_orders_they_say(emulator):
    """Who writes last, without anything to keep the threads apart."""
    emulator.strict = False
    source = f"threadgroup uint a[1]; a[0] = t; {FENCED} y[i] = a[0];"
    for emulator.order, writer in (("forward", 255), ("reverse", 0)):
        assert set(run_body(emulator, source)[1]) == {writer}
        assert any(finding.startswith("race: two writes on a") for finding in emulator.findings)
