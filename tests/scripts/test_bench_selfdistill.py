"""The self-distillation bench: rows, table and page belong together, its statistics are right."""

import json
import math

import pytest

from mlx_fd.models.aliases import TINY_BASE
from mlx_fd.training.selfdistill.methods import METHODS
from support import ROOT
from support.scripted import script


@pytest.fixture(scope="module")
def bench():
    return script("bench_selfdistill")


def row(arm, seed, greedy, sampled=(4, 4, 4)):
    return {
        "arm": arm,
        "seed": seed,
        "rate": 0.001,
        "attempts": 320,
        "taught": 160,
        "updates": 20,
        "tokens": 5000,
        "greedy": greedy,
        "sampled": list(sampled),
    }


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_the_table_is_that_of_the_rows_and_on_the_page(bench):
    assert bench.TABLE.read_text() == bench.table(bench.ROWS)
    page = (ROOT / "docs" / "benchmarks.md").read_text().splitlines()
    assert set(bench.short(bench.ROWS)) <= set(page)


def test_all_rows_are_of_one_base_and_at_what_the_pilot_found_best(bench):
    rows = bench.read_rows(bench.ROWS)
    every = [row for seeds in rows.values() for row in seeds.values()]
    assert len({row["base"] for row in every}) == 1
    assert bench.best(bench.BASE) == bench.TEMPERATURE
    for arm, seeds in rows.items():
        assert len(seeds) >= 5, arm
        if arm != bench.BASE:
            assert {row["rate"] for row in seeds.values()} == {bench.best(arm)}, arm


def test_all_arms_make_as_many_attempts(bench):
    assert {options["method"] for options in bench.ARMS.values()} == set(METHODS) - {"echodistill"}
    for arm in bench.ARMS:
        config = bench.options_of(arm, 3, 2e-4, TINY_BASE)
        rollouts = config.selfdistill.num_generations
        assert config.problems.episodes * rollouts == bench.ATTEMPTS
        assert config.generation.batch_size * rollouts == bench.BATCH
        assert (config.training.lora_rate, config.training.kd_steps) == (2e-4, 1)
        assert config.episode.seed == 3
        assert config.selfdistill.temperature == bench.TEMPERATURE
    prose, own = (
        bench.options_of(arm, 0, 1e-3, TINY_BASE).selfdistill
        for arm in ("reference, prose", "reference")
    )
    assert (prose.context, prose.reference_style) == ("reference", "prose")
    assert (own.context, own.reference_style, own.objective) == ("reference", "solution", "forward")


def test_the_best_is_that_of_the_pilots_highest_average(bench, tmp_path):
    rows = [
        {"arm": "grpo", "of": rate, "right": right}
        for rate, right in ((1e-4, [1, 2, 3]), (3e-4, [8, 8, 0]), (1e-3, [2, 2, 2]))
    ]
    path = write(tmp_path / "pilot.jsonl", rows)
    assert bench.best("grpo", path) == 3e-4
    assert bench.piloted(path)["grpo"][1e-4] == pytest.approx(2 / 8)


def test_seeds_have_problems_of_their_own(bench):
    seen = [{problem.id for problem in bench.problems_of(seed)} for seed in range(5)]
    assert len(set().union(*seen)) == 5 * bench.PROBLEMS


def test_changes_are_paired_over_the_seeds_that_both_have(bench, tmp_path):
    rows = [
        row("base", 0, [0, 0, 1]),
        row("base", 1, [0, 1, 1]),
        row("base", 2, [1, 1, 1]),
        row("grpo", 0, [0, 0, 0]),
        row("grpo", 0, [1, 0, 1], sampled=(8, 8, 8)),  # the last row of an arm and seed counts
        row("grpo", 1, [1, 1, 0], sampled=(4, 4, 4)),
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    read = bench.read_rows(path)
    gain, _ = bench.change(read["grpo"], read["base"], bench.greedy)
    assert (gain.value, gain.n) == (pytest.approx((1 / 3 + 0) / 2), 2)
    line = next(x for x in bench.table(path).splitlines() if x.startswith("| grpo |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1] == "2"
    assert cells[2].startswith("66.7 (")
    assert cells[3].startswith("+16.7 (")
    # Where the base is wrong: one of two mended, one of one. Where it is right: kept, one of two.
    assert cells[5].startswith("+75.0 (")
    assert cells[6].startswith("-25.0 (")
    assert cells[7].startswith("75.0 (")
    assert cells[8].startswith("+25.0 (")
    assert cells[9:] == ["0.001", "50%", "20", "5"]


def test_comparisons_are_corrected_for_their_number(bench, tmp_path):
    rows = [
        row("base", 0, [0, 0, 0]),
        row("base", 1, [0, 0, 0]),
        row("step-critique", 0, [1, 1, 1]),
        row("step-critique", 1, [1, 1, 0]),
        row("reference", 0, [1, 1, 0]),
        row("reference", 1, [1, 0, 0]),
    ]
    found = bench.comparisons(bench.read_rows(write(tmp_path / "rows.jsonl", rows)))
    assert list(found) == [
        ("step-critique", "base"),
        ("reference", "base"),
        ("step-critique", "reference"),
    ]
    assert [x[0].value for x in found.values()] == pytest.approx([5 / 6, 1 / 2, 1 / 3])
    # With one degree of freedom t's distribution is Cauchy's. The error of a mean of three of which
    # one or two are right: variance 2 / 9, over n - 1.
    one = math.sqrt(2 / 9 / 2)
    errors = [
        max((1 - 2 / 3) / 2, one / 2),
        max((2 / 3 - 1 / 3) / 2, math.hypot(one, one) / 2),
        max(0, math.hypot(one, one) / 2),
    ]
    ps = [
        1 - 2 * math.atan(value / error) / math.pi
        for value, error in zip((5 / 6, 1 / 2, 1 / 3), errors, strict=True)
    ]
    first, second, third = sorted(ps)
    adjusted = [3 * first, max(3 * first, 2 * second), max(3 * first, 2 * second, third)]
    assert [found[pair][1] for pair in found] == pytest.approx(adjusted)


def test_two_arms_that_answer_alike_are_not_told_apart(bench, tmp_path):
    answers = {0: [1, 0, 1], 1: [1, 1, 0]}
    rows = [row(a, s, answers[s]) for a in ("base", "step-critique", "reference") for s in (0, 1)]
    found = bench.comparisons(bench.read_rows(write(tmp_path / "rows.jsonl", rows)))
    assert [(one.value, p) for one, p in found.values()] == [(0.0, 1.0)] * 3
