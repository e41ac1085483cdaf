"""The score head where mlx-fd is not: in exports, in a GGUF file's metadata, in the examples."""

import dataclasses
import importlib.util
import json
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_fd.models.backend import backend
from support import ROOT, trained

backend()

import mlx.core as mx  # noqa: E402

from mlx_fd.cli.app import cli  # noqa: E402
from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.export.card import SCORE_EXAMPLE  # noqa: E402
from mlx_fd.export.exporter import export  # noqa: E402
from mlx_fd.export.form import Form  # noqa: E402
from mlx_fd.export.score_head import score_head  # noqa: E402
from mlx_fd.feedback.exported import kind_of_answers  # noqa: E402
from mlx_fd.feedback.judge import give_feedback, locate_model, open_student  # noqa: E402
from mlx_fd.models.gguf import convert  # noqa: E402
from mlx_fd.models.resolve import resolve  # noqa: E402
from mlx_fd.models.score_head import KEY, ScoreHead  # noqa: E402
from support.gguf_files import write_gguf  # noqa: E402

PROBLEM = "Leo starts with 47 books. Eva gives Leo 2 books. How many books are left?"
ANSWER = "Step 1: <<47+2=49>>49\n#### 49"


@pytest.fixture(scope="module", params=["prompt", "own"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return trained.make_run(folder / "run", "tiny-student", score_at=request.param)


def exported(run, folder=None, **form):
    folder = folder or run.parent / form["format"]
    export(str(run), folder, Form(parity_problems=0, **form), progress=lambda *_: None)
    return folder


def ran(*command):
    done = CliRunner().invoke(cli, list(map(str, command)), catch_exceptions=False)
    assert done.exit_code == 0
    return done


def said(*command):
    return ran(*command).stdout


def printed(script, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    capsys.readouterr()
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    return float(capsys.readouterr().out)


def wanted(run):
    score = give_feedback(str(run), PROBLEM, ANSWER, 192).head_score
    assert abs(score) > 0.01
    return score


def test_in_mlx_lm(run, monkeypatch, capsys):
    folder = exported(run, format="mlx")
    score = printed("score_mlx.py", monkeypatch, capsys, folder, f" {PROBLEM}\n", ANSWER)
    assert score == pytest.approx(wanted(run), abs=3e-4)


@pytest.mark.parametrize("adapter", [False, True])
def test_in_mlx_fd_as_in_its_run(run, adapter, tmp_path):
    """On a second machine there is the export alone."""
    dtype = None if adapter else "float32"
    folder = exported(run, tmp_path / "student", format="mlx", adapter=adapter, dtype=dtype)
    named = ["--adapter-path", folder] if adapter else [folder]
    asked = ["--problem", PROBLEM, "--answer", ANSWER, "--json"]
    here, there = (json.loads(said("feedback", *one, *asked)) for one in (named, [run]))
    assert here == {**there, "head_score": pytest.approx(there["head_score"], abs=1e-5)}
    file, out = tmp_path / "answers.jsonl", tmp_path / "judged.jsonl"
    file.write_text(json.dumps({"problem": PROBLEM, "answer": ANSWER}) + "\n")
    said("feedback", *named, "--problems", file, "--out", out)
    assert json.loads(out.read_text())["head_score"] == here["head_score"]


@pytest.mark.parametrize("adapter", [False, True])
def test_a_template_prints_the_date_and_the_variables_of_the_training(adapter, tmp_path):
    model = shutil.copytree(resolve("tiny-student"), tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    before = "{{ strftime_now('%d %b %Y') }} {{ style }} "
    settings["chat_template"] = before + settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    given = {"template_date": "2025-03-04", "chat_template_kwargs": {"style": "Be brief"}}
    run = trained.make_run(tmp_path / "run", model, score_at="own", **given)
    exported(run, tmp_path / "student", format="mlx", adapter=adapter)
    ref = locate_model("", tmp_path / "student") if adapter else tmp_path / "student"
    there, here = (
        open_student(one).judge([(PROBLEM, ANSWER)], max_tokens=16)[0] for one in (run, ref)
    )
    assert here.head_score == pytest.approx(there.head_score, abs=1e-3)
    file = tmp_path / "student" / "score_head.safetensors"
    arrays, about = mx.load(str(file), return_metadata=True)
    mx.eval(arrays)
    assert about["before"].startswith("04 Mar 2025 Be brief ")
    assert (about["date"], about["template_kwargs"]) == ("2025-03-04", '{"style": "Be brief"}')
    mx.save_safetensors(str(file), arrays, metadata={**about, "date": "04 Mar"})
    with pytest.raises(UserError, match="no score head"):
        locate_model("", tmp_path / "student") if adapter else open_student(ref)


def test_an_export_that_is_exported_again_keeps_its_head(run, tmp_path):
    first = exported(run, tmp_path / "first", format="mlx")
    exported(first, tmp_path / "again", format="hf")
    heads = [
        mx.load(str(folder / "score_head.safetensors"), return_metadata=True)
        for folder in (first, tmp_path / "again")
    ]
    assert heads[0][1] == heads[1][1]
    assert np.array_equal(np.array(heads[0][0]["weight"]), np.array(heads[1][0]["weight"]))
    assert "score_head.safetensors` is a linear head" in (tmp_path / "again/README.md").read_text()


def test_the_prompts_beside_a_head_say_which_answers_it_judges(run):
    judge = open_student(str(run))
    for kind in ("number", "choice", "code"):
        ref = dataclasses.replace(judge.ref, answer_kind=kind)
        assert kind_of_answers(score_head(ref, judge.student_lm), judge.student_lm) == kind


def test_a_head_that_is_not_this_models_is_refused(run, tmp_path):
    folder = exported(run, tmp_path / "student", format="mlx")
    file = folder / "score_head.safetensors"
    arrays, about = mx.load(str(file), return_metadata=True)
    mx.eval(arrays)  # before the file is written over

    def refused(says, weight=arrays["weight"], **changes):
        given = {**about, **changes}
        mx.save_safetensors(str(file), {**arrays, "weight": weight}, metadata=given)
        with pytest.raises(UserError, match=says):
            open_student(folder)

    refused("hidden states of 5 numbers", weight=mx.zeros((1, 5)))
    refused("not finite", weight=arrays["weight"] * mx.inf)
    refused("is no score head", weight=mx.zeros(5))
    for name, value in (
        *(("score_at", "nowhere"), ("max_tokens", "none"), ("max_tokens", "0")),
        *(("repetition_penalty", "0"), ("repetition_penalty", "nan"), ("score_at", "")),
        *(("template_kwargs", "{"), ("template_kwargs", "[]")),
    ):
        refused("is no score head", **{name: value})
    mx.save_safetensors(str(file), arrays, metadata={**about, "between": " and then "})
    # Of other prompts than it learned on it says nothing.
    judge = open_student(folder)
    assert judge.judge([(PROBLEM, ANSWER)], max_tokens=8)[0].head_score is None
    assert "learned on other prompts" in judge.left_out
    asked = ("--problem", PROBLEM, "--answer", ANSWER, "--tokens", "8")
    assert "its score head learned on other prompts" in ran("feedback", folder, *asked).stderr
    file.write_bytes(b"")
    with pytest.raises(UserError, match="score_head"):
        open_student(folder)
    file.unlink()
    assert open_student(folder).judge([(PROBLEM, ANSWER)], max_tokens=8)[0].head_score is None


def test_what_the_students_penalty_made_of_its_feedback(tmp_path, monkeypatch, capsys):
    """The head reads a feedback that is written with a repetition penalty, prompt included."""
    run = trained.make_run(
        tmp_path / "run",
        "tiny-student",
        score_at="own",
        max_feedback_tokens=24,
        student_repetition_penalty=1.3,
    )
    ref = locate_model(str(run))
    changed = dataclasses.replace(ref.config.generation, student_repetition_penalty=1.0)
    plain = dataclasses.replace(ref, config=dataclasses.replace(ref.config, generation=changed))
    problem, answer = "Tom has 3 apples and buys 5. How many?", "3 + 5 = 9. #### 9"
    score, without = (
        give_feedback(open_student(one), problem, answer, 24).head_score for one in (ref, plain)
    )
    assert abs(score - without) > 0.02
    folder = exported(run, format="mlx")
    found = [printed("score_mlx.py", monkeypatch, capsys, folder, problem, answer)]
    folders = [folder]
    if importlib.util.find_spec("llama_cpp"):
        folder = exported(run, format="gguf", gguf_type="f32")
        file = folder / "model-f32.gguf"
        found.append(printed("score_gguf.py", monkeypatch, capsys, file, problem, answer))
        folders.append(folder)
        convert(file, tmp_path / "back")
        _, about = mx.load(str(tmp_path / "back" / "score_head.safetensors"), return_metadata=True)
        assert about["repetition_penalty"] == "1.3"
    for folder in folders:
        card = (folder / "README.md").read_text()
        monkeypatch.chdir(folder)
        exec(re.search(r"```python\n(import .*?)```", card, re.DOTALL)[1], {})
        found.append(float(capsys.readouterr().out))
    assert found == pytest.approx([score] * len(found), abs=5e-3)


def test_in_llama_cpp_and_back(run, monkeypatch, capsys):
    pytest.importorskip("llama_cpp")
    file = exported(run, format="gguf", gguf_type="f32") / "model-f32.gguf"
    score = printed("score_gguf.py", monkeypatch, capsys, file, PROBLEM, f"{ANSWER}\n")
    # llama.cpp keeps keys and values in float16.
    assert score == pytest.approx(wanted(run), abs=5e-3)
    # The file that an export has beside the model is what an import writes.
    convert(file, run.parent / "back")
    both = [
        mx.load(str(folder / "score_head.safetensors"), return_metadata=True)
        for folder in (file.parent, run.parent / "back")
    ]
    (ours, about), (back, about_back) = both
    assert about == about_back
    assert about["score_at"] in ("prompt", "own")
    for part in ("weight", "bias"):
        assert np.array_equal(np.array(ours[part]), np.array(back[part]))
    heads = mx.load(str(run / "checkpoints" / "best" / "heads.safetensors"))
    assert np.array_equal(np.array(back["weight"]), np.array(heads["score_head.weight"]))
    score = printed("score_mlx.py", monkeypatch, capsys, run.parent / "back", PROBLEM, ANSWER)
    assert score == pytest.approx(wanted(run), abs=3e-4)


@pytest.mark.parametrize("ends", [[401, 402], [401, 5, 6, 402]])
def test_in_llama_cpp_where_a_turn_ends_with_another_token_than_eos(
    tmp_path, monkeypatch, capsys, ends
):
    """The tiny student ends its turns with 402; with four ends GGUF has no name for that one."""
    pytest.importorskip("llama_cpp")
    model = shutil.copytree(resolve("tiny-student"), tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|pad|>"}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    run = trained.make_run(tmp_path / "run", model, score_at="own")
    file = exported(run, format="gguf", gguf_type="f32") / "model-f32.gguf"
    score = printed("score_gguf.py", monkeypatch, capsys, file, PROBLEM, ANSWER)
    assert score == pytest.approx(wanted(run), abs=5e-3)
    code = re.search(
        r"```python\n(import llama_cpp.*?)```", (file.parent / "README.md").read_text(), re.DOTALL
    )[1]
    names = {}
    exec(SCORE_EXAMPLE.partition("\n")[0], names)
    monkeypatch.chdir(file.parent)
    exec(code, {})
    score = float(capsys.readouterr().out)
    found = give_feedback(str(run), names["problem"], names["answer"], 192).head_score
    assert score == pytest.approx(found, abs=5e-3)


def given(**change):
    head = ScoreHead(np.ones((1, 64), np.float32), np.zeros(1, np.float32), {"score_at": "prompt"})
    values = {**head.metadata(), **{f"{KEY}.{name}": value for name, value in change.items()}}
    kinds = {list: "array", float: "float32", str: "string", int: "uint32"}
    return {key: (value, kinds[type(value)]) for key, value in values.items()}


def test_a_file_without_a_head_has_none_and_one_with_texts_missing_is_read(tmp_path):
    write_gguf(tmp_path / "plain.gguf")
    convert(tmp_path / "plain.gguf", tmp_path / "plain")
    assert not (tmp_path / "plain" / "score_head.safetensors").exists()
    write_gguf(tmp_path / "head.gguf", change=given())
    convert(tmp_path / "head.gguf", tmp_path / "head")
    arrays, about = mx.load(str(tmp_path / "head" / "score_head.safetensors"), return_metadata=True)
    assert {name: array.shape for name, array in arrays.items()} == {
        "weight": (1, 64),
        "bias": (1,),
    }
    assert about == {"format": "mlx", "score_at": "prompt"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": [1.0] * 63}, "is no head of this model: 64 finite numbers"),
        ({"weight": [1.0] * 63 + [float("nan")]}, "is no head of this model"),
        ({"weight": ["a"] * 64}, "is no head of this model"),
        ({"weight": "a"}, f"{KEY}.weight has an unexpected type"),
        ({"bias": float("inf")}, "is no head of this model"),
        ({"bias": 1}, f"{KEY}.bias has an unexpected type"),
        ({"score_at": 3}, f"{KEY}.score_at has an unexpected type"),
    ],
)
def test_a_damaged_head_is_refused_by_its_key(tmp_path, change, says):
    write_gguf(tmp_path / "m.gguf", change=given(**change))
    with pytest.raises(UserError, match=says):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
