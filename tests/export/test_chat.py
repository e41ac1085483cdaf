"""What an export says of its chat template is what its student read."""

from __future__ import annotations

import dataclasses
import json
import shlex

import pytest
from tokenizers import AddedToken

from mlx_fd.export.chat import carry_template, reply_opening, template_note
from mlx_fd.feedback.judge import ModelRef
from mlx_fd.models.chat_template import ChatTemplate
from mlx_fd.models.generation import first_prompt
from mlx_fd.models.loading import load
from mlx_fd.models.thinking import ThinkingOptions
from mlx_fd.models.tokenizer import open_template
from support.thinkers import TEMPLATES
from support.tiny import make_model_dir, make_tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_student_that_did_not_think_reads_no_open_thought(tmp_path, name):
    kind, tokenizer = TEMPLATES[name], make_tokenizer()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in kind.tokens]
    )
    make_model_dir(tmp_path, tokenizer=tokenizer, eos=kind.eos, chat_template=kind.source)
    ref, loaded = ModelRef(tmp_path, template=open_template(tmp_path)), load(tmp_path)
    text = ref.chat.render(["Hi"]) + reply_opening(ref)
    tokens = tuple(loaded.tokenizer.encode(text, add_special_tokens=False))
    assert tokens == first_prompt(loaded, "Hi")
    note = template_note(ref, tmp_path)
    assert ("append" in note) == (name in ("r1", "exaone_deep", "harmony"))
    assert ('"enable_thinking": false' in note) == ("enable_thinking" in kind.source)
    thinks = dataclasses.replace(ref, thinking=ThinkingOptions(True, 9))
    assert reply_opening(thinks) == ""
    assert "trained to think" in template_note(thinks, tmp_path)


def test_the_variables_can_be_pasted_into_a_shell(tmp_path):
    source = "{{ style }}{% for m in messages %}{{ m.content }}{% endfor %}"
    given = {"style": "don't $HOME"}
    make_model_dir(tmp_path)
    note = template_note(ModelRef(tmp_path, template=ChatTemplate(source, kwargs=given)), tmp_path)
    words = shlex.split(note.partition("with `--chat")[2].partition("`.\n")[0])
    assert json.loads(words[1]) == given


def test_an_end_that_the_template_alone_names_is_written_for_other_tools(tmp_path):
    path = make_model_dir(tmp_path)
    vocab = make_tokenizer().get_vocab()
    for name, key, value in (
        ("config.json", "eos_token_id", vocab["<|endoftext|>"]),
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
    ):
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**content, key: value}))
    template = open_template(path)
    carry_template(template, path, path)
    ends = json.loads((path / "config.json").read_text())["eos_token_id"]
    assert sorted(ends) == sorted((vocab["<|endoftext|>"], vocab["<|im_end|>"]))
    # What is the same already is left as it is.
    before = (path / "config.json").stat().st_mtime_ns
    carry_template(open_template(path), path, path)
    assert (path / "config.json").stat().st_mtime_ns == before
