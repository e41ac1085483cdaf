"""Models that think and say what a test wants, with the chat templates of the families that think.

The templates are short forms of the published ones: what stands around messages, thoughts and
replies is theirs. The model is none: its state is the tokens that it has read, so that it notices
every token that should not have been left there, or left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from tokenizers import AddedToken

from mlx_fd.models.loading import Loaded, with_thinking
from mlx_fd.models.published_config import read_config
from mlx_fd.models.tokenizer import open_tokenizer, template_of
from mlx_fd.problems.thoughts import FAMILIES
from support.tiny import make_model_dir, make_tokenizer

_CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
{% if m.role == 'assistant' %}HISTORY{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}GENERATION{% endif %}"""
_STRIPPED = "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
_OFF = "{% if enable_thinking is defined and enable_thinking is false %}"


def _chatml(history: str, generation: str) -> str:
    return _CHATML.replace("HISTORY", history).replace("GENERATION", generation)


@dataclass(frozen=True)
class Template:
    """A family's chat template and its tokens."""

    source: str
    tokens: tuple[str, ...]
    eos: str = "<|im_end|>"
    family: str = "think"
    odd: bool = False


TEMPLATES = {
    # Thinks if it is not told otherwise, and opens its thoughts itself.
    "qwen3": Template(
        _chatml(_STRIPPED, _OFF + "{{ '<think>\n\n</think>\n\n' }}{% endif %}"),
        ("<think>", "</think>"),
    ),
    "qwen3.5": Template(
        _chatml(
            _STRIPPED,
            _OFF + "{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}",
        ),
        ("<think>", "</think>"),
    ),
    # Opens a thought whatever it is told.
    "r1": Template(
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
        "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        ("<think>", "</think>", "<|User|>", "<|Assistant|>"),
    ),
    # An empty thought stays in the history.
    "nemotron3": Template(
        _chatml(
            "{{ '<think></think>' + m.content.split('</think>')[-1] }}",
            _OFF + "{{ '<think></think>' }}{% else %}{{ '<think>\n' }}{% endif %}",
        ),
        ("<think>", "</think>"),
    ),
    # Opens a thought whatever it is told; its marks are no one else's.
    "exaone_deep": Template(
        "{% for m in messages %}{{ '[|' + m.role + '|]' }}{{ m.content.split('</thought>')[-1] }}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]<thought>\n' }}{% endif %}",
        ("<thought>", "</thought>", "<think>", "</think>"),
        family="exaone",
    ),
    # Its tokens alone say that it thinks.
    "kimi_vl": Template(
        _chatml("{{ m.content }}", ""), ("\u25c1think\u25b7", "\u25c1/think\u25b7"), family="kimi"
    ),
    # Says nothing of thoughts at all.
    "mistral": Template(
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}",
        ("[THINK]", "[/THINK]", "[INST]", "[/INST]"),
        family="mistral",
    ),
    # Ends a reply in another way than it ends a turn of the history.
    "harmony": Template(
        "{{ '<|start|>system<|message|>Valid channels: analysis, final.<|end|>' }}"
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% else %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
        "{# <|channel|>analysis<|message|> is dropped #}",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        eos="<|return|>",
        family="harmony",
    ),
    # Writes a chat's beginning anew in each turn, so that nobody knows where a thought may stand.
    "odd": Template(
        "{{ messages | length }}" + _chatml(_STRIPPED, ""), ("<think>", "</think>"), odd=True
    ),
    # Is told to think at the chat's beginning.
    "gemma4": Template(
        "{% if enable_thinking is defined and enable_thinking %}"
        "{{ '<|turn>system\n<|think|>\n<turn|>\n' }}{% endif %}{% for m in messages %}"
        "{{ '<|turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
        "{{ m.content.split('<channel|>')[-1] | trim }}{{ '<turn|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}",
        ("<|channel>", "<channel|>", "<|turn>", "<turn|>", "<|think|>"),
        eos="<turn|>",
        family="gemma4",
    ),
}


@dataclass(frozen=True)
class Line:
    """What a model thinks and says to a message.

    Attributes:
        says: the reply; a thought in it begins and ends with its family's marks.
        thinks: the thought.
        ends: whether the thought ends; else the model goes on with its last word for ever.
        stops: whether it ends its whole turn where the thought would end.
    """

    says: str
    thinks: str = ""
    ends: bool = True
    stops: bool = False


class Scripted(nn.Module):
    """Says what a function of all that it has read makes of it.

    Args:
        wants: from the text read so far to the texts that it would like to go on with, the one it
            likes best first.
        tokenizer: mlx-lm's wrapper.
    """

    def __init__(self, wants: Callable[[str], tuple[str, ...]], tokenizer: Any):
        super().__init__()
        self._wants, self._tokenizer = wants, tokenizer

    @property
    def layers(self) -> list[nn.Module]:
        """One block, for the cache."""
        return [nn.Identity()]

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Logits [B, L, V], right at the last place."""
        given = (inputs + 1).astype(mx.float32)[:, None, :, None]
        seen, _ = cache[0].update_and_fetch(given, given)
        paddings = getattr(cache[0], "left_padding", mx.zeros(len(inputs), dtype=mx.int32))
        last = mx.zeros((len(inputs), len(self._tokenizer)))
        for index, (row, padding) in enumerate(
            zip(seen[:, 0, :, 0].tolist(), paddings.tolist(), strict=True)
        ):
            text = self._tokenizer.decode([int(value) - 1 for value in row[int(padding) :]])
            for liking, said in enumerate(reversed(self._wants(text)), start=1):
                first = self._tokenizer.encode(said, add_special_tokens=False)[0]
                last[index, first] = 10.0 * liking
        before = mx.zeros((len(inputs), inputs.shape[1] - 1, last.shape[-1]))
        return mx.concatenate([before, last[:, None]], axis=1)


def tokens_in(cache: Any) -> list[int]:
    """The tokens that a scripted model's cache holds."""
    keys = cache[0].keys[0, 0, : cache[0].offset, 0]
    return [int(value) - 1 for value in keys.tolist()]


def scripted(
    folder: Path, name: str, script: dict[str, Line], *, on: bool, limit: int = 40
) -> Loaded:
    """A model of a family that follows a script.

    Args:
        folder: an empty one, for its files.
        name: of the template.
        script: lines by the user's message.
        on: whether it is told to think.
        limit: the most tokens of a thought.
    """
    kind = TEMPLATES[name]
    family = next(one for one in FAMILIES if one.name == kind.family)
    whole = make_tokenizer()
    whole.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in kind.tokens])
    sizes = {"hidden": 8, "layers": 1, "heads": 1, "kv_heads": 1, "intermediate": 8}
    make_model_dir(folder, tokenizer=whole, eos=kind.eos, chat_template=kind.source, **sizes)
    config = read_config(folder)
    tokenizer, vocab = open_tokenizer(folder, config)

    def wants(text: str) -> tuple[str, ...]:
        message = max(script, key=text.rfind)
        line, written = script[message], text[text.rfind(message) :]
        _, begun, thought = written.partition(family.start)
        if begun and family.end not in thought:
            so_far = thought.lstrip("\n")
            if line.thinks.startswith(so_far) and line.thinks != so_far:
                return (line.thinks[len(so_far) :],)
            return ((kind.eos if line.stops else family.end) if line.ends else " and",)
        rest = thought.partition(family.end)[2] if begun else written
        said = next((k for k in range(len(line.says), 0, -1) if rest.endswith(line.says[:k])), 0)
        says = line.says[said:] or kind.eos
        at_reply = family.starts_reply and family.starts_reply in written
        opens = line.thinks and not begun and not said and not at_reply
        return (family.open, says) if opens else (says,)

    loaded = Loaded(
        model=Scripted(wants, tokenizer),
        view=None,
        tokenizer=tokenizer,
        config=config,
        path=folder,
        dtype=mx.float32,
        vocab=vocab,
        template=template_of(tokenizer, folder),
    )
    return with_thinking(loaded, on=on, limit=limit)


def random_thinkers(folder: Path) -> tuple[Path, Path]:
    """Directories of an expert and a student with Qwen3's template, and random weights."""
    kind, tokenizer = TEMPLATES["qwen3"], make_tokenizer()
    marks = [AddedToken(mark, special=True, normalized=False) for mark in kind.tokens]
    tokenizer.add_special_tokens(marks)
    sizes = {"hidden": 16, "heads": 2, "kv_heads": 1, "intermediate": 32, "layers": 2}
    more = {**sizes, "tokenizer": tokenizer, "chat_template": kind.source}
    return make_model_dir(folder / "expert", **more), make_model_dir(
        folder / "student", seed=1, **more
    )
