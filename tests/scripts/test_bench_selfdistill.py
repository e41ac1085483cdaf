"""The self-distillation bench: rows, table and page belong together, its statistics are right."""

import json
import math

import numpy as np
import pytest

from mlx_fd.models.loading import load
from mlx_fd.models.resolve import resolve
from mlx_fd.training.selfdistill.methods import METHODS
from support import ROOT
from support.scripted import script


@pytest.fixture(scope="module")
def bench():
    return script("bench_selfdistill")


@pytest.fixture
def three(bench, monkeypatch):
    """The bench with three problems a seed."""
    monkeypatch.setattr(bench, "PROBLEMS", 3)
    return bench


def row(arm, seed, right, chosen=None, tokens=5000):
    return {
        "arm": arm,
        "seed": seed,
        "attempts": 640,
        "taught": 320,
        "updates": 40,
        "tokens": tokens,
        "right": right,
        "majority": [1.0, 0.5, 0.0],
        "judged": "101",
        "solved": "110",
        "noisy": {f"{kind} {level}": "100" for kind, level in (("typed", 0.15),
                                                              ("transcribed", 0.15))},
        "drift": [0.002, 0.001],
        **({"chosen_by": chosen} if chosen else {}),
    }  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_the_table_is_that_of_the_rows_and_on_the_page(bench):
    text = bench.TABLE.read_text()
    assert text == bench.table(bench.ROWS)
    page = (ROOT / "docs" / "benchmarks.md").read_text().splitlines()
    assert set(bench.short(bench.ROWS)) <= set(page)


def test_every_arm_is_a_method_and_all_make_as_many_attempts(bench):
    assert {options["method"] for options in bench.ARMS.values()} == set(METHODS)
    for arm in bench.ARMS:
        config = bench.options_of(arm, 3, 2e-4)
        attempts = config.problems.episodes * config.selfdistill.num_generations
        assert attempts == bench.ATTEMPTS
        assert config.generation.batch_size * config.selfdistill.num_generations == bench.BATCH
        assert (config.training.lora_rate, config.training.kd_steps) == (2e-4, 1)
        assert config.episode.seed == 3
    critic = bench.options_of("step-critique, tiny as critic", 0, 1e-3).selfdistill
    assert (critic.context, critic.critic, critic.critic_sees) == (
        "step-critique",
        "tiny",
        "problem",
    )
    assert bench.options_of("forward KL, reference", 0, 1e-3).selfdistill.objective == "forward"


def test_every_row_was_learned_at_the_rate_that_the_pilot_found_best(bench, tmp_path):
    rows = [
        {"arm": "grpo", "rate": rate, "right": right}
        for rate, right in ((1e-4, [1, 2, 3]), (3e-4, [9, 9, 0]), (1e-3, [2, 2, 2]))
    ]
    path = write(tmp_path / "pilot.jsonl", rows)
    assert bench.rate_of("grpo", path) == 3e-4
    assert bench.piloted(path)["grpo"][1e-4] == pytest.approx(2 / 12)
    for arm, seeds in bench.read_rows(bench.ROWS).items():
        if arm != bench.BASE:
            assert {row["rate"] for row in seeds.values()} == {bench.rate_of(arm)}, arm
            assert sorted(seeds) == [0, 1, 2]


def test_seeds_have_problems_of_their_own(bench):
    seen = [{problem.id for problem in bench.problems_of(seed)[1]} for seed in range(3)]
    assert [len(ids) for ids in seen] == [bench.PROBLEMS] * 3
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]


def test_changes_are_paired_over_the_seeds_that_both_have(three, tmp_path):
    rows = three.read_rows(
        write(
            tmp_path / "rows.jsonl",
            [
                row("base", 0, [0, 6, 12], chosen=[0, 3, 4]),
                row("base", 1, [6, 6, 6], chosen=[12, 12, 12]),
                row("grpo", 0, [0, 0, 0]),
                row("grpo", 0, [6, 6, 12]),  # the last row of an arm and seed counts
            ],
        )
    )
    gain, _ = three.change(rows["grpo"], rows["base"], three.average)
    assert (gain.value, gain.n) == (pytest.approx(1 / 6), 1)
    rare, _ = three.change(
        rows["grpo"], rows["base"], three.average, lambda seed: [True, True, False]
    )
    assert rare.value == pytest.approx(0.25)
    assert three.passed(rows["base"][0]) == [0.0, 1.0, 1.0]
    text = three.table(tmp_path / "rows.jsonl")
    line = next(x for x in text.splitlines() if x.startswith("| grpo |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[2].startswith("66.7 (")
    assert cells[3].startswith("+16.7 (")
    # Of the three problems two were solved at most three times of twelve: 0 -> 6 and 6 -> 6.
    assert cells[6].startswith("+25.0 (")
    assert cells[10] == "2.0 / 1.0"
    assert cells[11:] == ["50%", "40", "5"]


def test_orderings_are_corrected_for_their_number(three, tmp_path):
    rows = [
        row("base", 0, [0, 0, 0], chosen=[0, 0, 0]),
        row("grpo", 0, [1, 1, 1]),
        row("grpo", 1, [1, 2, 1]),
        row("step-critique", 0, [12, 11, 12]),
        row("step-critique", 1, [12, 11, 11]),
        row("forward KL, reference", 0, [6, 6, 7]),
        row("forward KL, reference", 1, [7, 7, 7]),
    ]
    found = three.orderings(three.read_rows(write(tmp_path / "rows.jsonl", rows)))
    assert [item[:2] for item in found] == [
        ("step-critique", "forward KL, reference"),
        ("forward KL, reference", "grpo"),
        ("step-critique", "grpo"),
    ]
    assert found[0][3].value == pytest.approx((16 + 13) / 72)
    # With one degree of freedom t's distribution is Cauchy's. The two differences of the second are
    # nearer to each other than three problems of each could make sure.
    spreads = (
        (16 + 13) / 72 / (3 / 72),
        (16 + 17) / 72 / (math.sqrt(2) / 72),
        (32 + 30) / 72 / (2 / 72),
    )
    first, second, third = (1 - 2 * math.atan(t) / math.pi for t in spreads)
    adjusted = [max(first, 2 * second, 3 * third), max(2 * second, 3 * third), 3 * third]
    assert [item[4] for item in found] == pytest.approx(adjusted)


def test_numbers_and_operators_are_reasoning(bench):
    for piece in ("7", "+", "=", "-", "*", "42"):
        assert bench.is_reasoning(piece)
    for piece in ("Step 1: <<", ">>", "\n#### ", "<|end|>", "", "a"):
        assert not bench.is_reasoning(piece)


def test_a_model_does_not_drift_from_itself_and_does_from_another(bench):
    base, other = load(resolve("tiny-base")), load(resolve("tiny-base"))
    exercises, _ = bench.problems_of(0)
    assert np.allclose(bench.drift(base, base, exercises[:4]), 0, atol=1e-6)
    norm = other.model.model.norm
    norm.weight = norm.weight * 0.5
    style, reasoning = bench.drift(other, base, exercises[:4])
    assert style > 0.001
    assert reasoning > 0.001
