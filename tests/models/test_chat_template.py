"""How chats are written: the shapes of published templates, and what is refused before loading."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as reference
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mlx_fd.errors import UserError
from mlx_fd.models import template_sandbox
from mlx_fd.models.chat_template import DEFAULT_DATE, ChatTemplate, check_conversation, fitted
from mlx_fd.models.context import Surroundings, too_long
from mlx_fd.models.generation import first_prompt, followup_prompt
from mlx_fd.models.loading import load
from mlx_fd.models.pairing import check_pair
from mlx_fd.models.tokenizer import open_template
from support import tiny

# As OpenBLAS does on a machine with 128 processors, with a stack for each of them.
HUNGRY = """
#include <sys/mman.h>
__attribute__((constructor)) static void take(void) {
    mmap(0, 2ul << 30, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = ("How many?", "It is 8.", "Sure?")

# In the shapes of the published ones.
QWEN = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a careful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday Date: " + date_string + "\\n\\n<|eot|>" }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}\
{% endif %}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate') }}{% endif %}\
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
MISTRAL = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}
    {%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""
GENERATION = """\
{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}\
{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}
{% if message.content == 'no' %}{% break %}{% endif %}{% endfor %}{{ {'a': '<'} | tojson }}
{{ dict(a=1) }}"""
PARTS = """\
{% for message in messages %}{{ message.role }}:{% for part in message.content %}\
{% if part.type == 'text' %}{{ ' ' + part.text }}{% endif %}{% endfor %}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
NEEDS_SYSTEM = """\
{% if messages[0].role != 'system' %}{{ raise_exception('A system message is needed') }}\
{% endif %}{{ 'SYSTEM ' + messages[0].content + '\n' }}{% for message in messages[1:] %}\
{{ message.role + ' ' + message.content + '\n' }}{% endfor %}"""
PUBLISHED = {
    "qwen": QWEN,
    "llama": LLAMA,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "generation": GENERATION,
    "chatml": tiny.CHAT_TEMPLATE,
    "parts": PARTS,
    "needs system": NEEDS_SYSTEM,
}


def made(source: str, **given: Any) -> ChatTemplate:
    return fitted(ChatTemplate(source, TOKENS, owner="here", **given))


def messages(turns: tuple[str, ...], template: ChatTemplate) -> list[dict[str, Any]]:
    """The messages that a template is to be given, put down by hand."""
    said = [(("user", "assistant")[index % 2], text) for index, text in enumerate(turns)]
    if template.system:
        said.insert(0, ("system", ""))
    if template.parts:
        return [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in said]
    return [{"role": r, "content": t} for r, t in said]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("turns", [CHAT[:1], CHAT])
def test_a_chat_is_written_as_transformers_writes_it(
    name: str, turns: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2026, 11, 28)

    monkeypatch.setattr(reference, "datetime", Clock)
    template = made(PUBLISHED[name], date="2026-11-28")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny.make_tokenizer(), **TOKENS)
    assert template.render(turns) == tokenizer.apply_chat_template(
        messages(turns, template),
        chat_template=template.source,
        add_generation_prompt=True,
        tokenize=False,
    )
    check_conversation(template)


def test_a_message_is_handed_over_in_the_form_that_the_template_takes() -> None:
    forms = {name: made(source) for name, source in PUBLISHED.items()}
    assert [name for name, form in forms.items() if form.parts] == ["parts"]
    assert [name for name, form in forms.items() if form.system] == ["needs system"]
    assert forms["parts"].render(CHAT) == (
        "user: How many?assistant: It is 8.user: Sure?assistant:"
    )
    assert forms["needs system"].render(CHAT[:1]) == "SYSTEM \nuser How many?\n"


def test_the_date_is_the_runs_and_not_the_clocks() -> None:
    assert "Today Date: 28 Nov 2026" in made(LLAMA, date="2026-11-28").render(CHAT)
    assert "Today Date: 26 Jul 2024" in made(LLAMA).render(CHAT)
    given = made(LLAMA, date="2026-11-28", kwargs={"date_string": "1 May 1999"})
    assert "Today Date: 1 May 1999" in given.render(CHAT)


def test_a_digest_covers_what_decides_and_no_more() -> None:
    base = made(LLAMA)
    assert base.digest() == made(LLAMA, date=DEFAULT_DATE).digest()
    others = [
        made(LLAMA, date="2026-11-28"),
        made(LLAMA, kwargs={"date_string": "now"}),
        made(LLAMA + " "),
        fitted(ChatTemplate(LLAMA, {"bos_token": "<b>"})),
        made(LLAMA, end_tokens=(7,)),
    ]
    assert len({base.digest(), *(one.digest() for one in others)}) == 6
    # A date that is not printed decides nothing.
    assert made(QWEN, date="2026-11-28").digest() == made(QWEN).digest()


def test_a_template_that_prints_no_date_is_tried_once_for_all_days() -> None:
    tried = template_sandbox._keeps_limits.cache_info
    for source, times in ((QWEN, 0), (LLAMA, 1)):
        made(source, date="2026-11-27")
        before = tried().misses
        made(source, date="2026-11-26")
        assert tried().misses == before + times


def test_variables_are_those_that_the_template_takes() -> None:
    thinking = made(QWEN)
    assert thinking.knows("enable_thinking") and not thinking.knows("content")
    silent = thinking.with_kwargs(enable_thinking=False)
    assert silent.render(CHAT) == thinking.render(CHAT) + "<think>\n\n</think>\n\n"
    assert thinking.kwargs == {}
    with pytest.raises(UserError, match="does not know enable_thinkng; it knows enable_thinking"):
        made(QWEN, kwargs={"enable_thinkng": False})
    with pytest.raises(UserError, match="does not know x; it knows no further variables"):
        made(tiny.CHAT_TEMPLATE, kwargs={"x": 1})
    for name in ("messages", "tools", "add_generation_prompt", "strftime_now"):
        with pytest.raises(UserError, match=f"{name} is set by mlx-fd itself"):
            made(QWEN, kwargs={name: 1})
    with pytest.raises(UserError, match="'no name' is no name"):
        made(QWEN, kwargs={"no name": 1})


LOSES = {
    "all that the user says": "{{ messages | length }}",
    "capitals": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "JSON": "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    "one line": "{% for m in messages %}{{ m.content.replace('\n', ' ') }}{% endfor %}",
    "a list": "{{ messages }}",
}


@pytest.mark.parametrize("name", LOSES)
def test_a_template_that_loses_or_changes_what_is_said_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="here: its chat template leaves out or changes what the"):
        made(LOSES[name])


FORGETS = {
    "user": "{{ messages[-1].content }}",
    "the oldest": "{% for m in messages[-4:] %}{{ m.content }}{% endfor %}",
    "assistant": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "all but the last reply": (
        "{% for m in messages %}{% if m.role == 'user' or loop.revindex == 2 %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", FORGETS)
def test_a_template_that_forgets_is_refused_for_a_conversation(name: str) -> None:
    template = made(FORGETS[name])  # one question can be put with it
    with pytest.raises(UserError, match="said in an earlier turn, so that no conversation can go"):
        check_conversation(template)


def test_thoughts_may_be_left_out_of_history() -> None:
    template = made(QWEN)
    check_conversation(template)
    assert "hm" not in template.render(["How many?", "<think>\nhm\n</think>\n\n8", "Sure?"])


# ---------------------------------------------------------------------------------- where it stands


def directory(path: Path, **settings: Any) -> Path:
    tiny.make_model_dir(path, chat_template=None)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return path


def test_the_places_of_a_template(tmp_path: Path) -> None:
    path = directory(tmp_path / "m")
    with pytest.raises(UserError, match="has no chat template: an Instruct model is needed"):
        open_template(path)
    (path / "chat_template.json").write_text(json.dumps({"chat_template": GEMMA}))
    assert open_template(path).source == GEMMA
    # What mlx-lm would not find is found, and read as it is written.
    loaded = load(path)
    assert loaded.tokenizer.decode(list(first_prompt(loaded, "Hi"))).startswith(
        "<start_of_turn>user\nHi"
    )
    assert loaded.tokenizer.chat_template == GEMMA
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": MISTRAL}]
    assert open_template(directory(tmp_path / "list", chat_template=named)).source == MISTRAL
    (tmp_path / "list" / "chat_template.jinja").write_text(QWEN)
    assert open_template(tmp_path / "list").source == QWEN
    only_tools = directory(tmp_path / "tools", chat_template=named[:1])
    with pytest.raises(
        UserError, match=r'several chat templates \(tool_use\) and none is named "d'
    ):
        open_template(only_tools)


def test_a_template_that_is_code_is_refused(tmp_path: Path) -> None:
    path = directory(tmp_path / "m", chat_template_type="deepseek_v32")
    with pytest.raises(UserError, match=r"written by code \(deepseek_v32\), and a template"):
        load(path)


def test_what_a_template_names_are_the_tokens_that_are_used(tmp_path: Path) -> None:
    """Not only what tokenizer_config.json says: transformers fills in, and mlx-lm ends turns."""
    path = directory(tmp_path / "m", chat_template=MISTRAL, bos_token="<|im_start|>")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [397, 399]}))
    template = open_template(path)
    assert template.special_tokens["bos_token"] == "<|im_start|>"
    assert template.end_tokens == (397, 399)
    loaded = load(path)
    asked = [*first_prompt(loaded, "Hi"), *loaded.tokenizer.encode(" 8"), 399]
    follow = list(followup_prompt(loaded, "Sure?"))
    assert follow[0] == 399  # the end of the turn that is over
    assert loaded.tokenizer.decode(asked) == "<|im_start|>[INST] Hi[/INST] 8<|im_end|>"
    assert loaded.tokenizer.decode(follow) == "<|im_end|>[INST] Sure?[/INST]"


# -------------------------------------------------------------------- tokenizers as they are used


def test_a_token_of_another_file_is_one_that_can_be_drawn(tmp_path: Path) -> None:
    """tokenizer.json has 397 tokens; what ends a turn is in tokenizer_config.json alone."""
    content = json.loads(tiny.make_tokenizer().to_str())
    added = content["added_tokens"]
    content["added_tokens"] = added[:1]
    short = Tokenizer.from_str(json.dumps(content))
    path = tiny.make_model_dir(tmp_path / "m", tokenizer=short, vocab_size=416)
    file = path / "tokenizer_config.json"
    decoder = {
        str(one["id"]): {"content": one["content"], "special": True, "normalized": False}
        for one in added
    }
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "added_tokens_decoder": decoder}))
    loaded = load(path)
    assert loaded.vocab == 400
    assert loaded.template.end_tokens == (399,)
    whole = tiny.make_model_dir(tmp_path / "whole", vocab_size=416)
    assert check_pair(whole, path).shared_vocab == 400


def test_added_tokens_are_compared_where_they_stand_in_a_text(tmp_path: Path) -> None:
    other = tiny.make_tokenizer()
    content = json.loads(other.to_str())
    content["added_tokens"][1]["rstrip"] = True
    changed = Tokenizer.from_str(json.dumps(content))
    expert = tiny.make_model_dir(tmp_path / "e")
    student = tiny.make_model_dir(tmp_path / "s", tokenizer=changed)
    pairing = check_pair(expert, student)
    assert pairing.shared_vocab == 0
    assert "('is <|im_start|> it' becomes" in pairing.warnings[0]


def test_a_token_that_one_reads_as_text_is_a_difference(tmp_path: Path) -> None:
    """One vocabulary: to one tokenizer.json a token is like any other, and no merge makes it."""
    content = json.loads(tiny.make_tokenizer().to_str())
    taken = content["added_tokens"].pop(0)
    content["model"]["vocab"][taken["content"]] = taken["id"]
    plain = Tokenizer.from_str(json.dumps(content))
    expert = tiny.make_model_dir(tmp_path / "e")
    student = tiny.make_model_dir(tmp_path / "s", tokenizer=plain)
    # As it is used it is a special token there too: tokenizer_config.json says so.
    assert check_pair(expert, student).warnings == ()
    file = student / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    pairing = check_pair(expert, student)
    assert pairing.shared_vocab == 0
    assert "('is <|endoftext|> it' becomes" in pairing.warnings[0]


def test_a_pair_is_told_what_its_conversations_need(tmp_path: Path) -> None:
    expert = tiny.make_model_dir(tmp_path / "e", chat_template=FORGETS["the oldest"])
    student = tiny.make_model_dir(tmp_path / "s")
    with pytest.raises(UserError, match="no conversation can go on"):
        check_pair(expert, student)
    # The student's own template is not used.
    pairing = check_pair(student, expert, date="2026-11-28")
    assert pairing.template.source == tiny.CHAT_TEMPLATE
    assert pairing.template.date == "2026-11-28"


def test_what_a_template_says_of_itself_takes_room_in_the_context(tmp_path: Path) -> None:
    """A long system prompt of the template's own: problems beside it may no longer fit."""
    rules = "Be careful with every number. " * 8
    path = tiny.make_model_dir(
        tmp_path / "long", chat_template="{{ '" + rules + "' }}" + tiny.CHAT_TEMPLATE
    )
    texts = ["How many apples?", "How many apples does Tom have now? " * 4]
    loaded = load(path)
    read = len([*first_prompt(loaded, texts[1]), *followup_prompt(loaded, "?")])
    file = path / "config.json"
    config = json.loads(file.read_text())
    for context, expected in ((100 + read - 4, [1]), (100 + read + 4, [])):
        file.write_text(json.dumps({**config, "max_position_embeddings": context}))
        assert list(too_long(texts, path, Surroundings("", 100))) == expected


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("gcc") is None, reason="needs gcc"
)
def test_a_blas_with_many_threads_does_not_stand_in_for_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process had no room to try anything, and its end was taken for a yes."""
    (tmp_path / "hungry.c").write_text(HUNGRY)
    library = tmp_path / "hungry.so"
    subprocess.run(["gcc", "-shared", "-o", library, tmp_path / "hungry.c"], check=True)
    monkeypatch.setenv("MLX_FD_BLAS", str(library))
    variables = [{"messages": [{"content": "hi"}]}]
    template_sandbox.check_limits("{{ messages[0].content * 2 }}", variables, DEFAULT_DATE, "it")
    with pytest.raises(template_sandbox.TooMuch, match="more time or memory"):
        template_sandbox.check_limits(
            "{{ messages[0].content * 3000000000 }}", variables, DEFAULT_DATE, "it"
        )


def test_a_template_is_not_rendered_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match="that tries chat templates ended with status 1"):
        template_sandbox.check_limits("{{ 'untried' }}", [{}], DEFAULT_DATE, "it")
