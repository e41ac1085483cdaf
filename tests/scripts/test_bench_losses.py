"""The benchmark of the losses: its table and plot are those of its committed rows."""

from support import ROOT
from support.scripted import script


def test_page_and_plot_are_those_of_the_rows():
    bench = script("bench_losses")
    assert bench.table(bench.CSV) in (ROOT / "docs" / "benchmarks.md").read_text()
    assert bench.PLOT.read_text() == bench.plot(bench.CSV)
