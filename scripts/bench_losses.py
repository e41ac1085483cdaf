"""Time and memory of the fused linear divergence beside what it replaces.

python scripts/bench_losses.py                 # measure the whole grid, append to the CSV
python scripts/bench_losses.py --quick         # a small grid, two minutes, into no file
python scripts/bench_losses.py --plot          # docs/bench_losses.svg, from the CSV alone
python scripts/bench_losses.py --table         # the table of docs/benchmarks.md, from the CSV alone

Four contenders make the value and its gradient by the student's final hidden states:

- engine: mlx_fd.losses.divergence.fused_linear_divergence
- dense: logit_loss of tests/support/dense_losses.py on whole logits, differentiated by MLX
- mlx-lm: kl_div_loss and js_div_loss of mlx_lm.tuner.losses likewise (on Metal they are kernels)
- matmuls: the products that no way around exists to, alone: the student's logits, their gradient's
  way back, and the teacher's logits (of a 4-bit head: unpacked once, then multiplied)

Each measurement is a process of its own. Peak memory is MLX's, above what is there before: heads
and hidden states are not counted. A time is the best of several runs, where one is short; on a CPU
it is processor time, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mlx_fd.models.backend import backend

if TYPE_CHECKING:
    import mlx.core as mx

# A row of the CSV: a cell of the grid, and what was measured of a contender.
Row = dict[str, Any]
Latest = dict[tuple[str, ...], dict[str, Row]]
Lines = dict[str, list[tuple[int, float]]]

DOCS = Path(__file__).parents[1] / "docs"
CSV, PLOT = DOCS / "bench_losses.csv", DOCS / "bench_losses.svg"
CONTENDERS = ("engine", "dense", "mlx-lm", "matmuls")
# Float32 [tokens, vocabulary] that a contender holds at its peak, to see whether it fits.
ARRAYS = {
    "dense": {"kl": 10, "jsd": 19},
    "mlx-lm": {"kl": 8, "jsd": 18},
    "matmuls": {"kl": 1, "jsd": 1},
    "engine": {"kl": 1, "jsd": 1},
}
GRID = [
    {"tokens": n, "vocab": v, "kind": kind, "head": head}
    for head in ("dense", "4-bit")
    for kind in ("kl", "jsd")
    for v in (32_000, 151_936)
    for n in (64, 256, 1024, 2048)
]
QUICK = [
    {"tokens": n, "vocab": 8192, "kind": kind, "head": head}
    for head in ("dense", "4-bit")
    for kind in ("kl", "jsd")
    for n in (16, 256)
]
KEY = ("tokens", "vocab", "kind", "head", "d_student", "d_teacher", "threads")
COLUMNS = (
    *("date", "device", "threads", "mlx", "mlx_lm", "mlx_fd", "d_student", "d_teacher"),
    *("head", "kind", "vocab", "tokens", "contender", "seconds", "peak_bytes", "note"),
)


# ---- one measurement, in its own process ----


def heads_and_states(cell: Row) -> tuple[Any, Any, mx.array, mx.array]:
    """The student's and the teacher's head and final states: logits of a spread of 2."""
    import mlx.core as mx
    from mlx import nn

    rng = np.random.default_rng(0)

    def head(width: int) -> Any:
        module = nn.Linear(1, 1, bias=False)
        module.weight = mx.array(rng.standard_normal((cell["vocab"], width), np.float32))
        module.weight *= 2 / width**0.5
        module.freeze()
        mx.eval(module.parameters())
        return module

    def states(width: int) -> mx.array:
        return mx.array(rng.standard_normal((cell["tokens"], width), np.float32))

    student, teacher = head(cell["d_student"]), head(cell["d_teacher"])
    if cell["head"] == "4-bit":
        teacher = nn.QuantizedLinear.from_linear(teacher, 64, 4)
    hidden, target = states(cell["d_student"]), states(cell["d_teacher"])
    mx.eval(teacher.parameters(), hidden, target)
    return student, teacher, hidden, target


def contender(
    name: str, cell: Row, student: Any, teacher: Any, hidden: mx.array, target: mx.array
) -> Callable[[], Any]:
    """A function of nothing that evaluates one step and returns its value and gradient."""
    import mlx.core as mx
    from mlx_lm.tuner.losses import js_div_loss, kl_div_loss

    from mlx_fd.losses.divergence import Target, fused_linear_divergence
    from support.dense_losses import logit_loss

    mask = mx.ones((cell["tokens"],))
    kind = {"kl": "forward", "jsd": "jsd"}[cell["kind"]]
    options: dict[str, Any] = {"temperature": 1.0, "vocab": cell["vocab"]}

    def engine(x: mx.array) -> mx.array:
        wanted = Target.teacher(target, teacher, mask=mask, kind=kind, **options)
        return fused_linear_divergence(x, student, wanted)[0]

    def dense(x: mx.array) -> mx.array:
        logits = student(x)[None], teacher(target)[None]
        total: mx.array = logit_loss(*logits, mask[None], kl=kind, standardize=False, **options)[0]
        return total

    def mlx_lm(x: mx.array) -> Any:
        loss = kl_div_loss if cell["kind"] == "kl" else js_div_loss
        return loss(student(x), mx.stop_gradient(teacher(target))).sum()

    def matmuls() -> None:
        logits = student(hidden)
        mx.eval(logits)
        back = logits @ student.weight
        mx.eval(back)
        del logits, back
        weight = teacher.weight
        if cell["head"] == "4-bit":
            weight = mx.dequantize(
                weight, teacher.scales, teacher.biases, teacher.group_size, teacher.bits
            )
        mx.eval(target @ weight.T)

    losses: dict[str, Callable[[mx.array], Any]] = {
        "engine": engine,
        "dense": dense,
        "mlx-lm": mlx_lm,
    }
    if name not in losses:
        return matmuls

    def step() -> Any:
        value_and_gradient = mx.value_and_grad(losses[name])(hidden)
        mx.eval(value_and_gradient)
        return value_and_gradient

    return step


def measure(cell: Row, name: str, most: int = 7, enough: float = 4.0) -> dict[str, float]:
    """Seconds of the best run and peak bytes; up to ``most`` runs, in about ``enough`` seconds."""
    import mlx.core as mx

    clock = time.process_time if backend().on_cpu else time.perf_counter
    run = contender(name, cell, *heads_and_states(cell))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    times: list[float] = []
    while len(times) < most and sum(times) < enough:
        start = clock()
        run()
        times.append(clock() - start)
    return {"seconds": min(times), "peak_bytes": mx.get_peak_memory() - before}


# ---- is it right? ----


def check() -> None:
    """Stop unless the engine's value and gradient are those of float64 NumPy."""
    import mlx.core as mx

    from mlx_fd.losses.kernel_checks import divergence_reference

    for head in ("dense", "4-bit"):
        for kind, beta in (("kl", 0.0), ("jsd", 0.5)):
            cell: Row = {"tokens": 33, "vocab": 4099, "kind": kind, "head": head}
            cell |= {"d_student": 64, "d_teacher": 128}
            student, teacher, hidden, target = heads_and_states(cell)
            value, grad = contender("engine", cell, student, teacher, hidden, target)()
            weight = teacher.weight
            if head == "4-bit":
                weight = mx.dequantize(weight, teacher.scales, teacher.biases, 64, 4)
            ours, theirs, w, v = (
                np.array(a).astype(float) for a in (hidden, target, student.weight, weight)
            )
            values, by_logits = divergence_reference(
                ours @ w.T, theirs @ v.T, beta=beta, temperature=1
            )
            expected = by_logits @ w
            errors = (
                abs(value.item() / values.sum() - 1),
                np.abs(np.array(grad) - expected).max() / np.abs(expected).max(),
            )
            print(f"check {kind} {head}: value off by {errors[0]:.0e}, gradient by {errors[1]:.0e}")
            if max(errors) > 1e-5:
                raise SystemExit("the engine is not right here: no times")


# ---- the grid ----


def device() -> str:
    """Name of the GPU, or of the CPU."""
    import mlx.core as mx

    if not backend().on_cpu:
        return str(mx.device_info()["device_name"])
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names) or os.cpu_count()} cores"


def fits(cell: Row, name: str, memory: float) -> bool:
    """Whether so many bytes of memory are enough."""
    arrays = ARRAYS[name][cell["kind"]] * cell["tokens"] + cell["d_student"] + cell["d_teacher"]
    return bool(4 * cell["vocab"] * arrays < memory)


def machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def run_grid(cells: Sequence[Row], out: Path, longest: float, memory: float) -> None:
    """A row for each cell and contender; a contender too large or too slow is not run."""
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "device": device(),
        **{name.replace("-", "_"): version(name) for name in ("mlx", "mlx-lm", "mlx-fd")},
    }
    # Seconds and bytes of a token, from the last cell of a kind that was run.
    pace: dict[tuple[Any, ...], list[float]] = {}
    for cell in cells:
        for name in CONTENDERS:
            series = (name, *(cell[key] for key in KEY if key != "tokens"))
            seconds, size = (each * cell["tokens"] for each in pace.get(series, [0, 0]))
            row = about | cell | {"contender": name, "seconds": "", "peak_bytes": round(size) or ""}
            if not fits(cell, name, memory):
                row["note"] = "not run: too large; memory as of fewer tokens, in proportion"
            elif seconds > longest:
                row["note"] = "not run: too slow; memory as of fewer tokens, in proportion"
            else:
                result = in_a_process(cell, name)
                row |= result
                pace[series] = [result[key] / cell["tokens"] for key in ("seconds", "peak_bytes")]
            append(out, row)
            print(*(row.get(key, "") for key in COLUMNS[8:]), sep="\t", flush=True)


def in_a_process(cell: Row, name: str) -> dict[str, float]:
    threads = str(cell["threads"])
    done = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps([cell, name])],
        env=os.environ | {"OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def append(out: Path, row: Row) -> None:
    new = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)


# ---- what the CSV says ----


def latest(path: Path) -> Latest:
    """The last row of each cell and contender: {cell: {contender: row}}."""
    cells: Latest = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            cells.setdefault(tuple(row[key] for key in KEY), {})[row["contender"]] = row
    return cells


def number(rows: dict[str, Row], name: str, key: str) -> float | None:
    """What was measured of a contender, or None."""
    text = rows[name].get(key) if name in rows else None
    return float(text) if text else None


def times(rows: dict[str, Row], name: str, key: str, by: str = "engine") -> str:
    """A contender's number in those of another."""
    ours, theirs = number(rows, by, key), number(rows, name, key)
    if not ours or not theirs:
        return "-"
    computed = "~" if key == "peak_bytes" and rows[name]["note"] else ""
    return (
        f"{computed}{theirs / ours:.2f}" if theirs < 10 * ours else f"{computed}{theirs / ours:.0f}"
    )


def table(path: Path) -> str:
    """The table of docs/benchmarks.md: the engine's time and memory, the others as multiples.

    Of the smallest and the largest number of tokens; the plot has those between.
    """
    lines = [
        "| teacher's head | | vocabulary | tokens | engine | matmuls | dense | mlx-lm "
        "| engine | dense | mlx-lm |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    cells = latest(path)
    sizes = [int(key[0]) for key in cells]
    ends = min(sizes), max(sizes)
    for (tokens, vocab, kind, head, *_), rows in cells.items():
        if int(tokens) not in ends:
            continue
        seconds, size = (
            number(rows, "engine", key) or math.nan for key in ("seconds", "peak_bytes")
        )
        columns = [
            *(
                head,
                kind.upper(),
                f"{int(vocab):,}",
                f"{int(tokens):,}",
                f"{seconds:.2f} s",
            ),
            *(times(rows, name, "seconds") for name in ("matmuls", "dense", "mlx-lm")),
            f"{size / 1e6:,.0f} MB",
            *(times(rows, name, "peak_bytes") for name in ("dense", "mlx-lm")),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


WIDTH, HEIGHT, LEFT, TOP = 330, 190, 60, 46
COLOURS = {"engine": "#0a7d4b", "dense": "#c2410c", "mlx-lm": "#6d4fc4", "matmuls": "#777777"}


def panel(at: tuple[int, int], title: str, lines: Lines) -> str:
    """Lines {contender: [(tokens, number)]} on logarithmic axes, as SVG."""
    left, top = at
    points = [point for line in lines.values() for point in line]
    low = [min(p[axis] for p in points) for axis in (0, 1)]
    high = [max(p[axis] for p in points) for axis in (0, 1)]
    first, last = math.floor(math.log10(low[1])), math.ceil(math.log10(high[1]))

    def x(tokens: float) -> float:
        return left + WIDTH * math.log(tokens / low[0]) / math.log(high[0] / low[0])

    def y(value: float) -> float:
        return top + HEIGHT * (last - math.log10(value)) / (last - first)

    parts = [f'<text x="{left}" y="{top - 10}" font-weight="bold">{title}</text>']
    for power in range(first, last + 1):
        height = y(10**power)
        parts.append(
            f'<path d="M{left} {height:.1f}h{WIDTH}" stroke="#ddd"/><text x="{left - 6}" '
            f'y="{height + 4:.1f}" text-anchor="end">{10**power:g}</text>'
        )
    for tokens in sorted({p[0] for p in points}):
        parts.append(
            f'<text x="{x(tokens):.1f}" y="{top + HEIGHT + 16}" text-anchor="middle">'
            f"{tokens:g}</text>"
        )
    for name, line in lines.items():
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{COLOURS[name]}"/>'
            for a, b in line
        ]
    return "\n".join(parts)


def plot(path: Path) -> str:
    """Time and memory over tokens at the largest vocabulary, the teacher's head dense, as SVG."""
    cells = {key: rows for key, rows in latest(path).items() if key[3] == "dense"}
    vocab = max(int(key[1]) for key in cells)
    parts = []
    kinds = [k for k in ("kl", "jsd") if any(key[1:3] == (str(vocab), k) for key in cells)]
    for row, kind in enumerate(kinds):
        for column, (key, unit, what) in enumerate(
            (("seconds", 1, "seconds"), ("peak_bytes", 1e9, "GB"))
        ):
            lines: Lines = {}
            for (tokens, wide, divergence, *_), rows in cells.items():
                for name in CONTENDERS:
                    value = number(rows, name, key)
                    if int(wide) == vocab and divergence == kind and value:
                        lines.setdefault(name, []).append((int(tokens), value / unit))
            at = (LEFT + column * (WIDTH + LEFT + 20), TOP + row * (HEIGHT + TOP + 30))
            title = f"{kind.upper()} over {vocab:,}: {what} by tokens"
            parts.append(panel(at, title, {name: sorted(line) for name, line in lines.items()}))
    width, height = 2 * (WIDTH + LEFT) + 60, len(kinds) * (HEIGHT + TOP + 30) + 30
    for index, (name, colour) in enumerate(COLOURS.items()):
        parts.append(
            f'<circle cx="{LEFT + 90 * index}" cy="{height - 16}" r="4" fill="{colour}"/>'
            f'<text x="{LEFT + 8 + 90 * index}" y="{height - 12}">{name}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" '
        f'fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the fused linear divergence.")
    parser.add_argument("--quick", action="store_true", help="a small grid, into no file")
    parser.add_argument("--table", action="store_true", help="print the CSV as a table")
    parser.add_argument("--plot", action="store_true", help=f"write {PLOT.name} from the CSV")
    parser.add_argument("--csv", type=Path, default=CSV, help="where the rows are")
    parser.add_argument("--hidden", type=int, nargs=2, default=(1536, 3584), metavar="D")
    parser.add_argument("--threads", type=int, default=1, help="of the BLAS, on a CPU")
    parser.add_argument("--longest", type=float, default=100, help="seconds of a run")
    memory = 0.85e-9 * machine_memory()
    parser.add_argument("--memory", type=float, default=memory, help="GB that a run may take")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.table:
        print(table(asked.csv))
    if asked.plot:
        PLOT.write_text(plot(asked.csv))
    if asked.table or asked.plot:
        return
    backend()
    if asked.measure:
        print(json.dumps(measure(*asked.measure)))
        return
    check()
    widths = dict(zip(("d_student", "d_teacher"), asked.hidden, strict=True))
    cells = [
        cell | widths | {"threads": asked.threads} for cell in (QUICK if asked.quick else GRID)
    ]
    with TemporaryDirectory() as folder:
        out = Path(folder, "quick.csv") if asked.quick else asked.csv
        run_grid(cells, out, asked.longest, 1e9 * asked.memory)
        print(table(out))


if __name__ == "__main__":
    main()
