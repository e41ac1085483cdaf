import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from mlx_fd.models.backend import backend, kernels_for


def in_process(code: str, *, environment: Mapping[str, str] = os.environ, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_the_backend_is_the_one_mlx_uses():
    import mlx.core as mx

    here = backend()
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    assert here.on_cpu == (here.device == "cpu") == (not on_gpu)
    assert backend() is here


@pytest.mark.skipif(sys.platform != "linux", reason="no BLAS is loaded elsewhere")
def test_which_blas_is_loaded():
    code = (
        "from mlx_fd.models.backend import load_blas; blas = load_blas(); "
        "print(blas.name, blas.note, sep='\\n')"
    )
    assert in_process(code, MLX_FD_BLAS="off") == "None\nswitched off by MLX_FD_BLAS=off\n"
    name, note = in_process(code, MLX_FD_BLAS="libm.so.6").splitlines()
    assert name == "libm.so.6" and name in note
    name, note = in_process(code, MLX_FD_BLAS="libnone.so").splitlines()
    assert name == "None" and "MLX_FD_BLAS=libnone.so cannot be loaded" in note
    late = in_process("import mlx.core; " + code, MLX_FD_BLAS="libm.so.6").splitlines()
    assert late == ["None", "not used: MLX was imported before mlx_fd"]


AVX2 = "fpu sse2 ssse3 fma sse4_1 avx f16c avx2 bmi2"
AVX512 = f"{AVX2} avx512f avx512dq avx512cd avx512bw avx512vl"


@pytest.mark.parametrize(
    ("cpu_info", "kernels"),
    [
        (f"model\t\t: 207\nflags\t\t: {AVX512} amx_tile\n\nflags\t\t: fpu\n", "SkylakeX"),
        # A Knights Landing has AVX-512, but not all of it.
        (f"flags\t\t: {AVX2} avx512f avx512cd avx512er avx512pf\n", "Haswell"),
        (f"flags\t\t: {AVX2}\n", "Haswell"),
        ("flags\t\t: fpu sse2 avx avx2 bmi2\n", None),
        ("flags\t\t: fpu sse2 ssse3\n", None),
        ("processor\t: 0\nFeatures\t: fp asimd sve\n", None),
        ("flags", None),
        ("", None),
    ],
)
def test_a_cpu_gets_the_kernels_that_it_has_the_instructions_for(cpu_info, kernels):
    assert kernels_for(cpu_info) == kernels


def test_openblas_takes_the_kernels_of_a_cpu_that_it_does_not_know():
    import mlx_fd.models.backend as module

    wanted = kernels_for(module._CPU_INFO.read_text()) if module._CPU_INFO.exists() else None
    if wanted is None or backend().blas.kernels is None:
        pytest.skip("no OpenBLAS with kernels for this CPU")
    code = (
        "import os; from mlx_fd.models.backend import load_blas; "
        "print(load_blas().kernels, os.environ.get('OPENBLAS_CORETYPE'))"
    )
    others = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    # Whoever comes after, NumPy's own among them, chooses for itself.
    assert in_process(code, environment=others).split() == [wanted, "None"]
    assert in_process(code, OPENBLAS_CORETYPE="Nehalem").split() == ["Nehalem"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="no BLAS is loaded elsewhere")
def test_products_are_the_same_with_and_without_it():
    code = (
        "from mlx_fd.models.backend import backend; backend()\n"
        "import mlx.core as mx, numpy as np\n"
        "a = mx.random.normal((33, 65), key=mx.random.key(1))\n"
        "b = mx.random.normal((65, 17), key=mx.random.key(2))\n"
        "exact = np.array(a, dtype=np.float64) @ np.array(b, dtype=np.float64)\n"
        "print(np.abs(np.array(a @ b) - exact).max())"
    )
    for chosen in ("", "off"):
        assert float(in_process(code, MLX_FD_BLAS=chosen)) < 1e-5


@pytest.mark.parametrize("failure", ["ImportError('libmlx.so: none')", "OSError('bad file')"])
def test_no_backend_says_what_to_install(failure, tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text(f"raise {failure}")
    code = (
        "from mlx_fd.models.backend import backend\nfrom mlx_fd.errors import UserError\n"
        "try:\n    backend()\nexcept UserError as error:\n    print(error)"
    )
    text = in_process(code, PYTHONPATH=str(tmp_path))
    for extra in ("mlx-fd[cpu]", "mlx-fd[cuda]", "mlx-fd[cuda12]"):
        assert extra in text
    assert failure.split("'")[1] in text


def test_mlxs_own_functions_can_be_kept():
    code = (
        "from mlx_fd.models.backend import backend; print(backend().cpu_math); "
        "import mlx.core as mx; print(mx.fast.scaled_dot_product_attention.__module__)"
    )
    assert in_process(code, MLX_FD_CPU_MATH="off").splitlines() == ["False", "mlx.core.fast"]
