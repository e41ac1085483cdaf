"""The benchmark of the losses: its table and plot are those of its committed rows."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_readme_and_plot_are_those_of_the_rows():
    spec = importlib.util.spec_from_file_location(
        "bench_losses", ROOT / "scripts" / "bench_losses.py"
    )
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    assert bench.table(bench.CSV) in (ROOT / "README.md").read_text()
    assert bench.PLOT.read_text() == bench.plot(bench.CSV)
