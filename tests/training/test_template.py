"""The chat template that a student was trained with goes with it: the next day, and elsewhere."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoTokenizer

import mlx_fd
from mlx_fd.errors import UserError
from mlx_fd.evaluation.target import open_target
from mlx_fd.export.bundle_reading import read_bundle
from mlx_fd.export.exporter import export
from mlx_fd.export.form import Form
from mlx_fd.feedback.judge import locate_model, open_student
from mlx_fd.models.generation import first_prompt
from mlx_fd.training import planning, session
from mlx_fd.training.selfdistill.methods import configured
from support.loops import assert_same
from support.pairs import SMALL, make_home
from support.shell import failed, shell
from support.tiny import CHAT_TEMPLATE

# As Llama's and SmolLM3's: the expert's prints the day, and knows a variable.
DATED = (
    "{{ bos_token }}{{ 'Today is ' + strftime_now('%d %B %Y') + '. ' }}"
    "{% if style is defined %}{{ style + '. ' }}{% endif %}" + CHAT_TEMPLATE
)
OPTIONS = {**SMALL, "episodes": 4, "checkpoint_every": 1, "gate": "always"}
BEGAN, NEXT = datetime.date(2026, 11, 28), datetime.date(2026, 11, 29)
PROMPT = (
    "<|im_start|>Today is 28 November 2026. Be brief. <|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n"
)


class Clock:
    """The module ``datetime`` as the planning sees it, on a day of our choice."""

    def __init__(self, day: datetime.date):
        class Date(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return day

        self.date, self.datetime, self.UTC = Date, datetime.datetime, datetime.UTC


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of one tokenizer whose student ends turns and writes chats in its own way."""
    folder = tmp_path_factory.mktemp("home")
    make_home(folder)
    for name, changes in (
        ("expert", {"chat_template": DATED, "bos_token": "<|im_start|>"}),
        ("student", {"chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}"}),
        ("student", {"eos_token": "<|endoftext|>"}),
    ):
        file = folder / name / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    file = folder / "student" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 397}))
    return folder


def begin(home: Path, out: Path, **more: Any) -> mlx_fd.RunResult:
    return mlx_fd.run_loop(
        str(home / "expert"),
        student=str(home / "student"),
        problems=home / "problems.jsonl",
        out=out,
        on_event=lambda event: None,
        chat_template_kwargs={"style": "Be brief"},
        **{**OPTIONS, **more},
    )


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "datetime", Clock(BEGAN))
        return begin(home, home / "run").folder


def prompt(name: Path | str) -> str:
    loaded = open_student(name).student_lm
    return str(loaded.tokenizer.decode(list(first_prompt(loaded, "Hi"))))


def test_a_run_that_goes_on_tomorrow_is_the_one_that_did_not_stop(
    home: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "datetime", Clock(BEGAN))
    batches = iter([False, True])
    halted = begin(home, tmp_path / "halted", stop=lambda: next(batches))
    assert not halted.done
    monkeypatch.setattr(planning, "datetime", Clock(NEXT))
    assert mlx_fd.resume_run(halted.folder, on_event=lambda event: None).done
    assert_same(run, halted.folder)
    # Begun tomorrow, it is another run, and with the day given the same one.
    later = begin(home, tmp_path / "later")
    assert 'template_date = "2026-11-29"' in (later.folder / "config.toml").read_text()
    same = begin(home, tmp_path / "same", template_date="2026-11-28")
    assert_same(run, same.folder)
    with pytest.raises(AssertionError):
        assert_same(run, later.folder)


def test_what_comes_after_writes_as_the_training_did(run: Path, home: Path) -> None:
    assert prompt(run) == PROMPT
    assert prompt(run / "checkpoints" / "last") == PROMPT
    target = open_target(str(run), None)
    assert target.template.render(["Hi"]) == PROMPT
    # Whoever the expert is now, the student reads what it knows.
    other = open_target(str(run), str(home / "student"))
    assert other.template.render(["Hi"]) == PROMPT
    assert open_student(run).student_lm.tokenizer.eos_token_ids == {399}
    # The base model, which is no run's student, has its own.
    assert prompt(home / "student") == "Hi "


def test_variables_can_be_given_where_a_run_is_used(run: Path, home: Path) -> None:
    ref = locate_model(str(run), None, {"style": "At length"})
    assert ref.template is not None and "At length." in ref.template.render(["Hi"])
    plain = locate_model(str(home / "expert"), None, {"style": "At length"})
    assert plain.template is not None and plain.template.render(["Hi"]) == PROMPT.replace(
        "28 November 2026. Be brief", "26 July 2024. At length"
    )
    with pytest.raises(UserError, match="does not know tone; it knows style"):
        locate_model(str(run), None, {"tone": "kind"})


def test_a_variable_that_the_template_does_not_know_is_refused_before_anything(
    home: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="expert does not know sytle; it knows style"):
        mlx_fd.run_loop(
            str(home / "expert"),
            student=str(home / "student"),
            problems=home / "problems.jsonl",
            out=tmp_path / "run",
            chat_template_kwargs={"sytle": "Be brief"},
            **OPTIONS,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["mlx", "hf"])
def test_a_whole_export_has_the_trained_template(run: Path, tmp_path: Path, form: str) -> None:
    done = export(
        str(run),
        tmp_path / "out",
        Form(format=form, parity_problems=1 if form == "mlx" else 0),
        progress=lambda *_: None,
    )
    theirs = AutoTokenizer.from_pretrained(done.folder)
    assert theirs.chat_template == DATED
    assert (theirs.bos_token, theirs.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert json.loads((done.folder / "config.json").read_text())["eos_token_id"] == 399
    # Their clock is their own.
    today = datetime.datetime.now().strftime("%d %B %Y")
    assert theirs.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        tokenize=False,
        style="Be brief",
    ) == PROMPT.replace("28 November 2026", today)
    # Here it is the day of the training, which stands beside the score head, as do the variables.
    assert prompt(done.folder) == PROMPT
    card = (done.folder / "README.md").read_text()
    assert '--chat-template-config \'{"style": "Be brief"}\'' in card
    assert "prints the date; here it was 2026-11-28" in card
    if form == "mlx":
        bundle = read_bundle(done.folder)
        assert bundle.eos == (399,)
        assert all(one.text.startswith(PROMPT.partition("Hi")[0]) for one in bundle.prompts)


def test_a_gguf_file_has_the_trained_template(run: Path, tmp_path: Path) -> None:
    form = Form(format="gguf", parity_problems=0)
    done = export(str(run), tmp_path / "out", form, progress=lambda *_: None)
    (file,) = done.folder.glob("*.gguf")
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.chat_template"].contents() == DATED
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 399
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 398


def test_an_adapter_has_the_trained_template_beside_it(
    run: Path, tmp_path: Path, home: Path
) -> None:
    form = Form(format="mlx", adapter=True, parity_problems=0)
    done = export(str(run), tmp_path / "out", form, progress=lambda *_: None)
    template = (done.folder / "chat_template.jinja").read_text()
    # Its base's tokenizer begins no text with that.
    assert template == '{% set bos_token = "<|im_start|>" %}\n' + DATED
    card = (done.folder / "README.md").read_text()
    assert "its base has another" in card and "end with the tokens [399], and its base's" in card
    # And whoever puts the adapter on its base again writes with it.
    ref = locate_model("", done.folder)
    assert ref.template is not None and ref.template.end_tokens == (399,)
    target = open_target("", None, done.folder, template_kwargs={"style": "Be brief"})
    asked = target.template.render(["Hi"])
    assert asked == PROMPT
    (done.folder / "chat_template.jinja").write_text("{{ messages[0]['role'] }}")
    with pytest.raises(UserError, match=r"chat_template\.jinja: its chat template leaves out"):
        locate_model("", done.folder)


def test_a_template_that_was_changed_in_the_manifest_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    file = tmp_path / "run" / "manifest.json"
    manifest = json.loads(file.read_text())
    row = manifest["chat_template"]
    for changed in ({**row, "source": DATED + " "}, {**row, "end_tokens": [397]}, 5):
        file.write_text(json.dumps({**manifest, "chat_template": changed}))
        with pytest.raises(UserError, match="the chat template in it was changed after it was"):
            locate_model(str(tmp_path / "run"))


def test_a_run_that_did_not_record_it_is_told_how(run: Path, tmp_path: Path) -> None:
    """As runs of earlier versions: their students would be asked in another way without a word."""
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    file = tmp_path / "run" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["chat_template"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"did not record the chat template .*`mlx-fd resume"):
        locate_model(str(tmp_path / "run"))
    assert mlx_fd.resume_run(tmp_path / "run", on_event=lambda event: None).done
    assert prompt(tmp_path / "run") == PROMPT


def test_self_distillation_has_a_day_and_variables_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "student": str(home / "expert"),
        "problems": str(home / "problems.jsonl"),
        "episodes": 2,
        "batch_size": 2,
        "probe_size": 2,
        "max_answer_tokens": 6,
        "lora_rank": 2,
        "chat_template_kwargs": {"style": "Be brief"},
    }
    monkeypatch.setattr(planning, "datetime", Clock(BEGAN))
    folder = tmp_path / "run"
    plan = planning.new_plan(folder, configured("grpo", given))
    run = session.open_run(folder, plan, lambda event: None, new=True)
    monkeypatch.setattr(planning, "datetime", Clock(NEXT))
    assert run(lambda: False) is not None
    assert prompt(folder) == PROMPT
    assert open_target(str(folder), None).template.render(["Hi"]) == PROMPT


def test_the_command_line_takes_variables_as_mlx_lms_does(run: Path, tmp_path: Path) -> None:
    asked = ("feedback", run, "--problem", "1 + 1?", "--answer", "2", "--tokens", 4)
    done = shell(*asked, "--chat-template-args", '{"style": "At length"}', cwd=tmp_path)
    assert done.status == 0, done
    unknown = shell(*asked, "--chat-template-args", '{"tone": "kind"}', cwd=tmp_path)
    failed(unknown, "does not know tone; it knows style")
    for text in ('{"style"', "[1]"):
        failed(shell(*asked, "--chat-template-args", text, cwd=tmp_path), "is not", "JSON")


def test_a_plain_models_bundle_is_written_with_the_variables_that_it_is_given(
    home: Path, tmp_path: Path
) -> None:
    form = Form(parity_problems=1, template_kwargs={"style": "At length"})
    done = export(str(home / "expert"), tmp_path / "out", form, progress=lambda *_: None)
    assert all("At length." in one.text for one in read_bundle(done.folder).prompts)
    assert (done.folder / "tokenizer_config.json").read_bytes() == (
        home / "expert" / "tokenizer_config.json"
    ).read_bytes()
