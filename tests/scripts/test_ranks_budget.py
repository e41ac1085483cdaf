"""What ranks send each other, computed: as many bytes as a student's gradient and a sample have."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_fd.config import Config
from mlx_fd.feedback.pair import open_pair
from mlx_fd.models.conversation import Conversation
from support import ROOT
from support.pairs import make_dirs, make_plan
from support.scripted import script


def test_bytes_are_those_of_a_gradient_and_a_sample(tmp_path):
    from mlx_fd.feedback.samples import read_text

    budget = script("ranks_budget")
    expert, student = make_dirs(tmp_path)
    plan = make_plan(expert, student, lora_rank=Config().models.lora_rank)
    pair = open_pair(plan)
    config = json.loads((student / "config.json").read_text())
    trained = sum(v.nbytes for _, v in tree_flatten(pair.student.trainable_parameters()))
    assert budget.gradient_bytes(config, 32, Config()) == trained
    outputs = read_text(pair, Conversation(), (1, 2, 3), (4, 5, 6, 7), plan.config.losses)
    sent = sum(array.astype(mx.float16).nbytes for array in outputs.arrays().values())
    assert budget.sample_bytes(config, 32, 4) == sent


def test_a_ring_sends_what_it_is_said_to():
    budget = script("ranks_budget")
    batch = budget.Batch(seconds=10, steps=1, gradient=8e6, samples=1e6)
    # Of four ranks each sends 3/4 of the gradient twice, and the samples of three.
    assert batch.exchange(4, (1e6, 0)) == pytest.approx(12 + 3)
    assert batch.rate(4, (1e6, 0)) == pytest.approx(4 * 10 / 25)
    assert batch.divided(4, (1e6, 0)) == pytest.approx(10 / (2.5 + 12 + 0.75))
    # From two ranks on there are 8 MB and 1 MB to send, in as many seconds; of three 10.67 and 2.
    assert batch.even((1e6, 0)) == 3 and batch.most((1e6, 0)) == 1


def test_the_page_has_what_the_script_prints(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ranks_budget.py"])
    script("ranks_budget").main()
    head, *tables = capsys.readouterr().out.strip().splitlines()
    page = (ROOT / "docs" / "several-machines.md").read_text()
    assert "\n".join(tables).strip() in page
    assert head.startswith("gradient 48.0 MB, 2 steps") and "48.0 MB" in page
