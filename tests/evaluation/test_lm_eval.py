"""lm-evaluation-harness and `mlx-fd eval` on the same prompts count the same answers."""

import importlib.util
import subprocess
import sys

import pytest

from support import ROOT

SCRIPT = ROOT / "scripts" / "lm_eval_check.py"


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed here"
)
def test_twenty_problems_are_counted_alike():
    done = subprocess.run(
        [sys.executable, SCRIPT, "tiny-student", "--problems", "arithmetic", "--limit", "20"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "20 problems, the same text in 20" in done.stdout
    counts = {
        line.split(":")[0]: [int(word) for word in line.split() if word.isdigit()]
        for line in done.stdout.splitlines()
        if "right by mlx-fd" in line
    }
    assert set(counts) == {"strict", "flexible"}
    for ours, theirs in counts.values():
        # Some right and some wrong, or the agreement would say little.
        assert ours == theirs and 0 < ours < 20
