"""The committed rows and table of the benchmark of drafts belong together."""

import pytest

from support.scripted import script


@pytest.fixture(scope="module")
def bench():
    return script("bench_speculative")


def row(seed, before, after, written=(10, 30, 20)):
    def of(accepted):
        steps = [n - one for n, one in zip(written, accepted, strict=True)]
        return {"same": 50, "accepted": list(accepted), "steps": steps}

    kind = {
        "written": list(written),
        "seconds": {"plain": 2.0, "untrained": 3.0, "trained": 2.5},
        "untrained": of(before),
        "trained": of(after),
    }
    made = {"seed": seed, "episodes": 64, "date": "2026-11-29", "mlx": "0", "device": "cpu"}
    return {**made, "tokens": 4, "answer": kind, "feedback": kind}


def test_the_table_is_that_of_the_rows(bench):
    assert bench.TABLE.read_text() == bench.table(bench.ROWS)
    for one in bench.latest(bench.ROWS, "seed").values():
        for kind in bench.KINDS:
            assert len(one[kind]["written"]) == bench.PROBLEMS
            for draft in (bench.UNTRAINED, bench.TRAINED):
                found = one[kind][draft]
                assert found["same"] == bench.PROBLEMS
                # A step writes one token more than it accepts, but where a text ends within it.
                columns = zip(one[kind]["written"], found["accepted"], found["steps"], strict=True)
                assert all(n - more <= steps <= n - more + 1 for n, more, steps in columns)


def test_shares_are_of_all_tokens_and_differences_are_paired(bench):
    rows = [row(0, (2, 6, 4), (5, 15, 10)), row(1, (2, 6, 4), (6, 18, 12))]
    [before, _] = bench.share("answer", bench.UNTRAINED, "accepted")(rows)
    assert before.value == pytest.approx(12 / 60)
    # The same share in each problem: it is known without an error, and so is the difference.
    assert before.error == pytest.approx(0.0, abs=1e-12)
    changes = bench.change("feedback", "accepted")(rows)
    assert [one.value for one in changes] == pytest.approx([18 / 60, 24 / 60])
    steps = bench.change("feedback", "steps")(rows)
    assert [one.value for one in steps] == pytest.approx([-18 / 60, -24 / 60])
    mean = bench.over_runs(changes)[0]
    assert bench.shown(mean, "+") == "+35.0 (-28.5 to +98.5)"
