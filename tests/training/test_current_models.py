"""Whole runs of the families that people bring: two episodes, stopped and resumed, and after."""

from __future__ import annotations

import json
import sys

import pytest

from mlx_fd import cli
from mlx_fd.config import Config, override
from mlx_fd.errors import UserError
from mlx_fd.runs.plan import make_plan
from support.architectures import make_architecture
from support.draws import ALL
from support.loops import assert_same, start

# By day those whose caches differ most: recurrent states, windows with sinks.
FAMILIES = ("qwen3_5", "gpt_oss", *(("gemma3", "granite", "qwen3_moe") if ALL else ()))
OPTIONS = {
    "episodes": 2,
    "batch_size": 1,
    "max_answer_tokens": 6,
    "max_feedback_tokens": 6,
    "max_merge_tokens": 5,
    "probe_size": 1,
    "checkpoint_every": 1,
    "kd_steps": 1,
    "lora_rank": 2,
    "lora_rate": 1e-2,
}


@pytest.fixture
def mlx_fd(monkeypatch, capsys):
    """Run a command in this process that has to succeed; what it wrote to standard output."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["mlx-fd", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out

    return call


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_goes_through_and_is_the_same_when_it_is_resumed(name, mlx_fd, tmp_path):
    problems = tmp_path / "problems.jsonl"
    rows = [
        {"question": f"Tom has {n} apples and buys {n + 1}. How many?", "answer": str(2 * n + 1)}
        for n in range(8)
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {
        "expert": str(make_architecture(tmp_path / "expert", name)),
        "student": str(make_architecture(tmp_path / "student", name, seed=2)),
        "problems": str(problems),
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [
        text
        for key, value in {**names, **OPTIONS}.items()
        for text in (f"--{key.replace('_', '-')}", value)
    ]
    mlx_fd("loop", "--out", whole, *flags)
    answers = iter([False, True])
    plan = make_plan(override(Config(), {**names, **OPTIONS}, "test"))
    start(stopped, plan, stop=lambda: next(answers))
    mlx_fd("resume", stopped)
    assert_same(whole, stopped)

    mlx_fd("export", whole, "--out", tmp_path / "exported", "--no-parity")
    asked = ("--problem", rows[0]["question"], "--answer", "#### 3", "--tokens", 6, "--json")
    judged, again = (
        json.loads(mlx_fd("feedback", model, *asked)) for model in (whole, tmp_path / "exported")
    )
    assert judged["feedback"] == again["feedback"]
    assert -1 <= judged["head_score"] <= 1


def test_a_model_that_cannot_be_distilled_is_refused_before_its_memory_is_asked_for(tmp_path):
    folder = make_architecture(tmp_path / "model", "iquestloopcoder")
    names = {"expert": str(folder), "student": str(folder), "problems": "gsm8k"}
    with pytest.raises(UserError, match=f"{folder}: .*not run one after the other"):
        make_plan(override(Config(), {**names, **OPTIONS}, "test"))
