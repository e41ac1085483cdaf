import contextlib
import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest

from mlx_fd import __version__
from mlx_fd.config import Config, override, preset, read, to_toml
from mlx_fd.errors import UserError
from mlx_fd.models.aliases import ALIASES
from mlx_fd.problems import load as load_problems
from mlx_fd.runs.manifest import (
    backend_settings,
    changed_options,
    check_same,
    flat_options,
    versions,
)
from mlx_fd.runs.plan import (
    check_out,
    check_run_memory,
    make_plan,
    sample_of_problems,
    with_absolute_names,
)
from mlx_fd.training.planning import new_plan
from support import ROOT
from support.architectures import make_architecture
from support.manifests import config, manifest
from support.tiny import make_model_dir


def test_the_default_student_is_named():
    for alias, what in ALIASES.items():
        assert with_absolute_names(config(expert=alias)).models.student == what.student
    with pytest.raises(UserError, match="no default student"):
        with_absolute_names(config(expert="someone/model"))
    with pytest.raises(UserError, match=r"Did you mean qwen2\.5-7b-4bit"):
        with_absolute_names(config(expert="qwen2.5-7b-4bits"))


def test_names_are_made_absolute_once(tmp_path, monkeypatch):
    """Paths become whole, names stay, and what is settled stays as it is in any folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "gsm8k", "someone/model"):
        (tmp_path / name).mkdir(parents=True)
    found = with_absolute_names(config(expert="./mine/:layers=3", student="someone/else"))
    assert found.models.expert == f"{tmp_path}/mine:layers=3"
    assert found.models.student == "someone/else"
    assert found.problems.problems == "gsm8k"
    local = with_absolute_names(
        config(expert="someone/model", student="mine", problems="mine/../mine")
    )
    assert local.models.expert == f"{tmp_path}/someone/model"
    assert local.problems.problems == f"{tmp_path}/mine"
    monkeypatch.chdir("/")
    (tmp_path / "c.toml").write_text(to_toml(local))
    assert with_absolute_names(read(tmp_path / "c.toml")) == local


def test_solutions_fill_larger_micro_batches(tmp_path):
    """An update on feedback and solutions has up to two samples of each problem."""
    path = make_model_dir(tmp_path / "m")

    def needed(**changes) -> float:
        sizes = {"batch_size": 2, "max_answer_tokens": 400_000, "max_feedback_tokens": 50}
        with pytest.raises(UserError, match="this run needs up to") as error:
            check_run_memory(path, path, ["1 + 1?"] * 9, config(**sizes, **changes))
        return float(re.search(r"up to ([0-9.]+) GiB", str(error.value))[1])

    assert needed(micro_batch=4, solutions=False) == needed(micro_batch=2, solutions=False)
    assert needed(micro_batch=4, solutions=True) > needed(micro_batch=2, solutions=True)
    assert needed(micro_batch=8, solutions=True) == needed(micro_batch=4, solutions=True)


def test_attention_that_cannot_be_compared_is_refused_before_anything_is_loaded(tmp_path):
    makers = {"qwen3": "qwen3", "gpt_oss": "gpt_oss", "hybrid": "qwen3_next"}
    made = {name: make_architecture(tmp_path / name, kind) for name, kind in makers.items()}

    def plan(expert, student, **options):
        names = {"expert": str(made[expert]), "student": str(made[student])}
        sizes = {"batch_size": 1, "max_answer_tokens": 8, "max_feedback_tokens": 8}
        return make_plan(config(**names, **sizes, **options))

    for pair in (("qwen3", "gpt_oss"), ("gpt_oss", "qwen3")):
        with pytest.raises(UserError, match=r"block 0 of .*gpt_oss has attention sinks.*leave it"):
            plan(*pair, losses=("lm", "attention"))
        assert plan(*pair, losses=("lm",)).expert_path == made[pair[0]]
    with pytest.raises(UserError, match=r"block 0 of .*hybrid has no attention"):
        plan("qwen3", "hybrid", losses=("lm", "attention"))
    # Its last block is one that attends, and it alone is compared.
    last = plan("hybrid", "qwen3", losses=("lm", "attention"), hidden_layers="last")
    assert last.student_path == made["qwen3"]


def test_options_in_the_manifest_survive_json():
    options = flat_options(config(scales=(1.0, 2.0, 3.0, 4.0)))
    assert json.loads(json.dumps(options)) == options
    assert options["scales"] == [1.0, 2.0, 3.0, 4.0] and options["batch_size"] == 8
    assert len(options) == sum(
        len(dataclasses.fields(getattr(Config(), item.name))) for item in dataclasses.fields(Config)
    )


def test_the_same_run_raises_no_doubt(tmp_path):
    assert check_same(manifest(), manifest(), tmp_path) == []


@pytest.mark.parametrize("part", ["expert", "student", "problems"])
def test_other_content_is_refused(part, tmp_path):
    new = manifest()
    new[part] = {"name": "another", "sha256": "4"}
    with pytest.raises(UserError, match=f"began with another {part}"):
        check_same(manifest(), new, tmp_path)
    new[part]["sha256"] = manifest()[part]["sha256"]
    assert check_same(manifest(), new, tmp_path) == []


@pytest.mark.parametrize("name", ["tiny", "tiny-student:layers=1"])
def test_an_embedded_model_of_another_version_is_named(name, tmp_path):
    old, new = manifest(), manifest()
    old["versions"]["mlx-fd"] = "0.1.0"
    old["student"]["name"] = new["student"]["name"] = name
    new["student"]["sha256"] = "4"
    with pytest.raises(UserError, match=r"ships other weights under that name.* 0\.1\.0") as found:
        check_same(old, new, tmp_path)
    assert __version__ in str(found.value) and "Bring the old one" not in str(found.value)
    # Another model in its place is another matter.
    new["student"]["name"] = "/my/model"
    with pytest.raises(UserError, match="Bring the old one back"):
        check_same(old, new, tmp_path)


def test_the_version_is_one_and_is_written_down():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert versions()["mlx-fd"] == __version__ == project["project"]["version"]
    old, new = manifest(), manifest()
    old["versions"]["mlx-fd"], new["versions"]["mlx-fd"] = "0.1.0", __version__
    [doubt] = check_same(old, new, Path("run"))
    assert doubt.startswith(f"mlx-fd was 0.1.0, is {__version__}: the run goes on")


def test_other_versions_are_doubtful(tmp_path):
    new = manifest()
    new["versions"]["mlx"] = "0.40"
    new["backend"]["device"] = "metal"
    found = check_same(manifest(), new, tmp_path)
    assert [text.split(":")[0] for text in found] == [
        "mlx was 0.32.4, is 0.40",
        "device was cpu, is metal",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 4), ("lora_rate", 0.5), ("losses", ("lm",)), ("seed", 1), ("sequential", True)],
)
def test_other_options_are_refused(name, value, tmp_path):
    with pytest.raises(UserError, match=rf"config\.toml: {name} was .* --out ANOTHER"):
        check_same(manifest(), manifest(**{name: value}), tmp_path)


def test_what_does_not_matter_may_change(tmp_path):
    new = manifest(micro_batch=1, grad_checkpoint=True, checkpoint_every=9, keep_checkpoints=9)
    assert check_same(manifest(), new, tmp_path) == []
    moved = manifest(expert="/moved/expert", student="/moved/student", problems="/moved/p.jsonl")
    assert check_same(manifest(), moved, tmp_path) == []


def test_a_run_of_a_version_with_fewer_options_is_not_resumed(tmp_path):
    """What that version did need not be what an option's default does now."""
    old = manifest()
    del old["options"]["replay"], old["options"]["lr_schedule"]
    with pytest.raises(UserError, match=r"older mlx-fd, which had no lr_schedule.*--continue"):
        check_same(old, manifest(), tmp_path)
    # Only a loop's student is gone on with.
    for teacher, command in (("base", "self-distill"), ("expert", "distil")):
        old["options"].update(method="x", self_teacher=teacher)
        with pytest.raises(UserError, match="had no lr_schedule") as found:
            check_same(old, manifest(), tmp_path / "my run")
        assert f"new run: mlx-fd {command} --config '{tmp_path}/my run/config.toml'" in str(
            found.value
        )


def test_a_run_of_a_version_without_drafts_is_resumed(tmp_path):
    """It had none; and whether there is one changes no text."""
    old = manifest()
    del old["options"]["speculate"]
    assert check_same(old, manifest(), tmp_path) == []
    assert check_same(old, manifest(speculate=4), tmp_path) == []
    assert changed_options(old, manifest(speculate=4)) == [
        "config.toml was changed: speculate was 0, is 4"
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "batch_size is 8: add sequential, or set batch_size to 1"),
        (
            {"batch_size": 1, "batching": "continuous"},
            "batching = continuous writes several: use batching = lockstep",
        ),
    ],
)
def test_a_draft_is_for_texts_that_are_written_one_by_one(changes, says):
    with pytest.raises(UserError, match=f"speculate = 4 is for texts .*{says}"):
        make_plan(override(Config(), {"speculate": 4, **changes}, "test"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_disagreement": 0.02}, r"needs 286 verdicts, .* has 304 episodes, 272 of them"),
        ({"max_disagreement": 0.02, "episodes": 328}, None),
        ({"max_disagreement": 0.02, "gate": "always"}, None),
        ({"episodes": 8}, None),
    ],
)
def test_trust_that_no_look_can_grant_is_named(changes, says, tmp_path):
    options = {"episodes": 304, "batch_size": 8, "exam_size": 0, **changes}
    notes = new_plan(tmp_path / "run", override(preset("tiny"), options, "test")).notes
    assert [bool(re.search(says or "verdicts", note)) for note in notes] == [True] * bool(says)


@pytest.mark.parametrize("window", [0, 54, 55])
def test_a_window_below_the_fewest_verdicts_is_refused(window, tmp_path):
    given = override(preset("tiny"), {"audit_window": window, "exam_size": 0}, "test")
    with contextlib.ExitStack() as stack:
        if window == 54:
            says = "audit_window is 54, .* 0.1 trust needs 55 verdicts: give at least 55"
            stack.enter_context(pytest.raises(UserError, match=says))
        new_plan(tmp_path / "run", given)


def test_a_run_grows_where_its_last_batch_was_full(tmp_path):
    alike = {"lr_schedule": "constant", "gate": "always"}
    old = manifest(episodes=16, **alike)
    assert check_same(old, manifest(episodes=20, **alike), tmp_path) == []
    with pytest.raises(UserError, match="episodes was 20"):
        check_same(manifest(episodes=20, **alike), manifest(episodes=24, **alike), tmp_path)
    # What rates and trust were depends on how long the run was to be.
    for name, value in (("lr_schedule", "linear"), ("gate", "ema")):
        with pytest.raises(UserError, match="episodes was 16"):
            old, new = (manifest(episodes=n, **{**alike, name: value}) for n in (16, 24))
            check_same(old, new, tmp_path)
    longer = {"gate": "ema", "max_disagreement": 0.0, "lr_schedule": "constant"}
    assert check_same(*(manifest(episodes=n, **longer) for n in (16, 24)), tmp_path) == []


@pytest.mark.parametrize("content", [[], {}, {"expert": None}, "text"])
def test_a_harmed_manifest_is_explained(content, tmp_path):
    with pytest.raises(UserError, match="not what mlx-fd wrote"):
        check_same(content, manifest(), tmp_path)


def test_out_is_checked_without_being_made(tmp_path):
    check_out(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty")
    (tmp_path / "empty" / "file").touch()
    with pytest.raises(UserError, match="something in this folder"):
        check_out(tmp_path / "empty")
    with pytest.raises(UserError, match="is a file"):
        check_out(tmp_path / "empty" / "file" / "run")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="leads nowhere"):
        check_out(tmp_path / "link")


@pytest.mark.parametrize(
    "name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"]
)
def test_other_numbers_of_threads_are_said(name, monkeypatch, tmp_path):
    monkeypatch.delenv(name, raising=False)
    old, new = manifest(), manifest()
    old["backend"] = backend_settings()
    monkeypatch.setenv(name, "3")
    new["backend"] = backend_settings()
    [doubt] = check_same(old, new, tmp_path)
    assert "is 3: " in doubt and "its last digits may differ" in doubt
    # What an older version did not write down cannot be compared.
    old["backend"] = {key: old["backend"][key] for key in ("device", "blas", "threads")}
    assert len(check_same(old, new, tmp_path)) == (name == "OPENBLAS_NUM_THREADS")


def test_another_number_of_cores_is_said(tmp_path):
    old, new = manifest(), manifest()
    old["backend"], new["backend"] = backend_settings(), backend_settings()
    old["backend"]["cores"] += 1
    [doubt] = check_same(old, new, tmp_path)
    assert doubt.startswith(f"cores was {old['backend']['cores']}, is ")


def test_options_that_may_be_changed_are_said():
    assert changed_options(manifest(), manifest()) == []
    [said] = changed_options(manifest(), manifest(micro_batch=1, checkpoint_every=9))
    assert "checkpoint_every was 4, is 9" in said and "micro_batch was" in said


def test_how_a_file_was_read_is_shown_with_its_first_problems(tmp_path):
    path = tmp_path / "cities.jsonl"
    row = '{{"question": "Which city {}?", "choices": ["Rome", "Paris"], "answer": 1}}\n'
    path.write_text("".join(row.format(n) for n in range(9)))
    problems = load_problems(str(path)).problems
    first, *examples = sample_of_problems(str(path), problems)
    assert first == (
        f"answers of {path}: one of the choices that the question lists, by letter (choice)"
    )
    assert examples == [f"  Which city {n}? A. Rome B. Paris -> B" for n in range(3)]
    assert sample_of_problems("gsm8k", problems) == []
