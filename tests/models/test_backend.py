import os
import subprocess
import sys

import pytest

from mlx_fd.models.backend import backend


def in_process(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
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
    code = "from mlx_fd.models.backend import load_blas; print(*load_blas(), sep='\\n')"
    assert in_process(code, MLX_FD_BLAS="off") == "None\nswitched off by MLX_FD_BLAS=off\n"
    name, note = in_process(code, MLX_FD_BLAS="libm.so.6").splitlines()
    assert name == "libm.so.6" and name in note
    name, note = in_process(code, MLX_FD_BLAS="libnone.so").splitlines()
    assert name == "None" and "MLX_FD_BLAS=libnone.so cannot be loaded" in note
    late = in_process("import mlx.core; " + code, MLX_FD_BLAS="libm.so.6").splitlines()
    assert late == ["None", "not used: MLX was imported before mlx_fd"]


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
