"""Model directories that break something, on purpose or not: each is refused in a sentence.

Every directory is opened as the command line opens it. It either works, or ends in a UserError
that names the directory, quickly and in little memory; nothing else is ever raised.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_fd.config import Config, override
from mlx_fd.errors import UserError
from mlx_fd.feedback.pair import open_pair
from mlx_fd.models import template_sandbox
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt, followup_prompt, generate
from mlx_fd.models.loading import load
from mlx_fd.models.resolve import resolve
from mlx_fd.models.writing import Sampling
from mlx_fd.runs.plan import make_plan
from support import ROOT, tiny

_SECONDS = 40  # of a slow, busy machine; most take a tenth of a second
_BYTES = 400 << 20
Break = Callable[[Path], Any]
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with all files that a directory may have."""
    path = tiny.make_model_dir(tmp_path_factory.mktemp("sound") / "m")
    end = json.loads((path / "config.json").read_text())["eos_token_id"]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    names = list(mx.load(str(path / "model.safetensors")))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def use(path: Path) -> str:
    """Open a directory as ``mlx-fd loop`` does, and let it say something."""
    given = {"expert": str(path), "student": str(path), "problems": "arithmetic"}
    sizes = {"episodes": 2, "batch_size": 1, "max_answer_tokens": 8, "max_feedback_tokens": 8}
    plan = make_plan(override(Config(), {**given, **sizes, "probe_size": 1}, "test"))
    loaded = open_pair(plan).expert
    prompt = first_prompt(loaded, "What is 1 + 2?")
    followup_prompt(loaded, "Is that right?")
    return generate(loaded, [Conversation()], [prompt], Sampling(2))[0].text


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails where the block takes too long or too much memory."""

    def late(number: int, frame: Any) -> None:
        # Nothing in between may catch it.
        raise BaseException(f"not done after {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < _BYTES >> 10


# ------------------------------------------------------------------------------- ways to break one


def entry(file: str, **changes: Any) -> Break:
    """Other entries in a JSON file; ``...`` takes one out."""

    def apply(path: Path) -> None:
        content = json.loads((path / file).read_text())
        content.update(changes)
        kept = {key: value for key, value in content.items() if value is not ...}
        (path / file).write_text(json.dumps(kept))

    return apply


def content(file: str, data: bytes | str) -> Break:
    """Another content of a file."""
    raw = data.encode() if isinstance(data, str) else data
    return lambda path: (path / file).write_bytes(raw)


def cut(file: str, share: float) -> Break:
    def apply(path: Path) -> None:
        data = (path / file).read_bytes()
        (path / file).write_bytes(data[: int(share * len(data))])

    return apply


def instead(file: str, make: Callable[[Path], Any]) -> Break:
    """Something else where a file was."""

    def apply(path: Path) -> None:
        (path / file).unlink(missing_ok=True)
        make(path / file)

    return apply


def template(source: str) -> Break:
    return entry("tokenizer_config.json", chat_template=source)


def listening(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)  # the whole path may be too long for a socket
    before = Path.cwd()
    os.fchdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)
        os.close(folder)


def weights(change: Callable[[dict[str, mx.array]], Any]) -> Break:
    def apply(path: Path) -> None:
        arrays = dict(mx.load(str(path / "model.safetensors")))
        change(arrays)
        mx.eval(arrays)
        mx.save_safetensors(str(path / "model.safetensors"), arrays)

    return apply


def one(name: str, array: Callable[[mx.array], mx.array]) -> Break:
    return weights(lambda arrays: arrays.update({name: array(arrays[name])}))


def with_nan(array: mx.array) -> mx.array:
    values = np.array(array)
    values.reshape(-1)[-1] = np.nan
    return mx.array(values)


def header(change: Callable[[dict[str, Any]], Any]) -> Break:
    """Another safetensors header before the same data."""

    def apply(path: Path) -> None:
        file = path / "model.safetensors"
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        found = json.loads(data[8 : 8 + length])
        change(found)
        raw = json.dumps(found).encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    return apply


def vocabulary(change: Callable[[dict[str, Any]], Any]) -> Break:
    def apply(path: Path) -> None:
        found = json.loads((path / "tokenizer.json").read_text())
        change(found)
        (path / "tokenizer.json").write_text(json.dumps(found))

    return apply


_DEEP = "[" * 100_000 + "]" * 100_000
_NORM, _UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
_EMBEDDING = "model.embed_tokens.weight"
_BAD_CONFIGS: dict[str, dict[str, Any]] = {
    "no model_type": {"model_type": ...},
    "unknown model_type": {"model_type": "no_such"},
    "model_type is a list": {"model_type": ["llama"]},
    "model_type is a module of mlx-lm's": {"model_type": "base"},
    "model_type leads elsewhere": {"model_type": "../../os"},
    "no hidden_size": {"hidden_size": ...},
    "hidden_size null": {"hidden_size": None},
    "hidden_size text": {"hidden_size": "64"},
    "hidden_size list": {"hidden_size": [64]},
    "hidden_size true": {"hidden_size": True},
    "hidden_size fraction": {"hidden_size": 64.5},
    "hidden_size 0": {"hidden_size": 0},
    "hidden_size negative": {"hidden_size": -64},
    "hidden_size huge": {"hidden_size": 1 << 40},
    "hidden_size another": {"hidden_size": 128},
    "no num_hidden_layers": {"num_hidden_layers": ...},
    "num_hidden_layers 1e9": {"num_hidden_layers": 10**9},
    "num_hidden_layers as 1e9": {"num_hidden_layers": 1e9},
    "num_hidden_layers one more": {"num_hidden_layers": 3},
    "num_hidden_layers one less": {"num_hidden_layers": 1},
    "num_hidden_layers null": {"num_hidden_layers": None},
    "no vocab_size": {"vocab_size": ...},
    "vocab_size null": {"vocab_size": None},
    "vocab_size huge": {"vocab_size": 10**12},
    "vocab_size large": {"vocab_size": 10**7},
    "vocab_size less than tokens": {"vocab_size": 10},
    "num_attention_heads 0": {"num_attention_heads": 0},
    "num_attention_heads 1e9": {"num_attention_heads": 10**9},
    "num_attention_heads no divisor": {"num_attention_heads": 7},
    "num_attention_heads null": {"num_attention_heads": None},
    "num_key_value_heads 0": {"num_key_value_heads": 0},
    "num_key_value_heads dict": {"num_key_value_heads": {}},
    "head_dim odd": {"head_dim": 15},
    "head_dim huge": {"head_dim": 1 << 50},
    "no intermediate_size": {"intermediate_size": ...},
    "intermediate_size huge": {"intermediate_size": 1 << 23},
    "rms_norm_eps text": {"rms_norm_eps": "small"},
    "rms_norm_eps null": {"rms_norm_eps": None},
    "rope_theta text": {"rope_theta": "x"},
    "rope_theta list": {"rope_theta": [1]},
    "rope_theta 0": {"rope_theta": 0},
    "rope_scaling list": {"rope_scaling": [1, 2]},
    "rope_scaling unknown": {"rope_scaling": {"type": "no_such", "factor": 2}},
    "rope_scaling empty": {"rope_scaling": {}},
    "rope_scaling of text": {"rope_scaling": {"type": "linear", "factor": "two"}},
    "max_position_embeddings text": {"max_position_embeddings": "many"},
    "max_position_embeddings huge": {"max_position_embeddings": 10**18},
    "layer_types short": {"layer_types": ["full_attention"]},
    "layer_types a number": {"layer_types": 5},
    "quantization text": {"quantization": "4bit"},
    "quantization list": {"quantization": [4, 64]},
    "quantization empty": {"quantization": {}},
    "quantization text bits": {"quantization": {"bits": "x", "group_size": 32}},
    "quantization of nothing": {"quantization": {"bits": 0, "group_size": 0}},
    "quantization of a layer": {
        "quantization": {"bits": 4, "group_size": 32, "model.layers.0.mlp.up_proj": "x"}
    },
    "quantization of dense weights": {
        "quantization": {
            **{"bits": 4, "group_size": 32},
            "model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 32},
        }
    },
    "quantization_config text": {"quantization_config": "awq"},
    "quantization_config unknown": {"quantization_config": {"quant_method": "no_such"}},
    "quantization_config awq": {"quantization_config": {"quant_method": "awq"}},
    "eos_token_id text": {"eos_token_id": "<|im_end|>"},
    "eos_token_id negative": {"eos_token_id": -1},
    "eos_token_id nested": {"eos_token_id": [[1]]},
    "eos_token_id dict": {"eos_token_id": {"a": 1}},
    "eos_token_id true": {"eos_token_id": True},
    "eos_token_id huge": {"eos_token_id": 10**15},
    "tie_word_embeddings text": {"tie_word_embeddings": "no"},
    "tie_word_embeddings false": {"tie_word_embeddings": False},
    "attention_bias": {"attention_bias": True},
    "architectures a number": {"architectures": 5},
    "text_config text": {"text_config": "x"},
    "text_config huge": {"text_config": {"num_hidden_layers": 10**9}},
    "model_file": {"model_file": "evil.py"},
    "mlx_fd text": {"mlx_fd": "x"},
    "mlx_fd without layers": {"mlx_fd": {"source": "/x"}},
    "mlx_fd odd layers": {"mlx_fd": {"source": "/x", "layers": ["a"]}},
    "num_experts 1e9": {"model_type": "mixtral", "num_local_experts": 10**9},
    "another architecture": {"model_type": "gemma2"},
    "no text model": {"model_type": "bert"},
}
_REFUSED: dict[str, Break] = {
    "weights twice": lambda p: (p / "model.fp16.safetensors").write_bytes(
        (p / "model.safetensors").read_bytes()
    ),
    **{f"a directory for {name}": instead(name, Path.mkdir) for name in _FILES},
    **{f"a FIFO for {name}": instead(name, os.mkfifo) for name in _FILES},
    "a FIFO for generation_config.json": instead("generation_config.json", os.mkfifo),
    "a FIFO for a template": instead("chat_template.jinja", os.mkfifo),
    "a FIFO for a second file of weights": instead("model-2.safetensors", os.mkfifo),
    "a FIFO for added_tokens.json": instead("added_tokens.json", os.mkfifo),
    "a socket for config.json": instead("config.json", listening),
    "a device for config.json": instead("config.json", lambda p: p.symlink_to("/dev/zero")),
    "a device for weights": instead("model.safetensors", lambda p: p.symlink_to("/dev/zero")),
    "a dead link for weights": instead("model.safetensors", lambda p: p.symlink_to("nowhere")),
    "a link to itself": instead("config.json", lambda p: p.symlink_to(p)),
    **{f"empty {name}": content(name, b"") for name in _FILES},
    **{f"half of {name}": cut(name, 0.5) for name in _FILES},
    **{
        f"no {name}": lambda p, n=name: (p / n).unlink() for name in _FILES if "_config" not in name
    },
    **{f"no UTF-8 in {name}": content(name, b'{"a": "\xff\xfe"}') for name in _FILES[:3]},
    **{f"deep {name}": content(name, _DEEP) for name in _FILES[:3]},
    "deep dict in config.json": content("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000),
    "config.json is a list": content("config.json", "[]"),
    "config.json is null": content("config.json", "null"),
    "config.json is huge": lambda p: os.truncate(p / "config.json", 1 << 33),
    "a key twice": lambda p: (p / "config.json").write_text(
        (p / "config.json").read_text().replace("{", '{"hidden_size": 8,', 1)
    ),
    "a number of 5000 digits": lambda p: (p / "config.json").write_text(
        (p / "config.json").read_text().replace('"vocab_size": ', '"vocab_size": ' + "9" * 5000)
    ),
    "generation_config.json is a list": content("generation_config.json", "[]"),
    "generation_config.json is damaged": content("generation_config.json", "{"),
    "an odd end token": entry("generation_config.json", eos_token_id="x"),
    "the index is a list": content("model.safetensors.index.json", "[]"),
    "the index has no map": content("model.safetensors.index.json", "{}"),
    "the index names a lost file": content(
        "model.safetensors.index.json", '{"weight_map": {"a": "model-7.safetensors"}}'
    ),
    "weights cut at the header": cut("model.safetensors", 0.001),
    "weights cut at the end": cut("model.safetensors", 0.9999),
    "weights with more after": lambda p: (p / "model.safetensors").write_bytes(
        (p / "model.safetensors").read_bytes() + b"x"
    ),
    "a header of 2^63 bytes": content("model.safetensors", struct.pack("<Q", 1 << 63) + b"{}"),
    "a header of noise": content("model.safetensors", struct.pack("<Q", 8) + b"\xff" * 16),
    "no tensors": content("model.safetensors", struct.pack("<Q", 2) + b"{}"),
    "weights of another format": content("model.safetensors", b"PK\x03\x04" * 100),
    "an unknown type": header(lambda h: h[_NORM].update(dtype="F99")),
    "a type of another size": header(lambda h: h[_NORM].update(dtype="F64")),
    "a negative shape": header(lambda h: h[_NORM].update(shape=[-64])),
    "a huge shape": header(lambda h: h[_NORM].update(shape=[1 << 62, 1 << 62])),
    "a shape of text": header(lambda h: h[_NORM].update(shape="x")),
    "overlapping tensors": header(lambda h: h[_NORM].update(data_offsets=[0, 256])),
    "a tensor beyond the end": header(lambda h: h[_NORM].update(data_offsets=[1 << 40, 1 << 41])),
    "a tensor without a place": header(lambda h: h[_NORM].pop("data_offsets")),
    "a tensor that is a list": header(lambda h: h.update({_NORM: []})),
    "a tensor missing": weights(lambda arrays: arrays.pop(_NORM)),
    "a layer missing": weights(
        lambda arrays: [arrays.pop(name) for name in list(arrays) if "layers.1" in name]
    ),
    "a tensor too many": weights(lambda arrays: arrays.update(extra=mx.zeros((3,)))),
    "a tensor of another shape": one(_UP, lambda array: array[:5]),
    "a tensor of another rank": one(_NORM, lambda array: array[None]),
    "whole numbers for weights": one(_UP, lambda array: array.astype(mx.int32)),
    "NaN in a norm": one(_NORM, with_nan),
    "NaN in one row of the embedding": one(_EMBEDDING, with_nan),
    "infinity": one(_UP, lambda array: array * mx.inf),
    "a template with an error": template("{% for message in %}"),
    "a template without an end": template("{% if messages %}"),
    "a template with an unknown filter": template("{{ messages | no_such_filter }}"),
    "a template with an unknown tag": template("{% no_such_tag %}"),
    "a template that refuses": template("{{ raise_exception('no') }}"),
    "a template that divides by 0": template("{{ 1 / 0 }}"),
    "a template that needs more": template("{{ tools[0].name }}"),
    "a template that reaches out": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "a template that recurses": template("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
    "a template that is a number": template(5),  # type: ignore[arg-type]
    "a template that is a dict": template({"default": 5}),  # type: ignore[arg-type]
    "a template that runs for ever": template(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a template that writes 1 GB": template(
        "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}"
    ),
    "a template that writes 8 GB at once": template("{{ 'x' * 8589934592 }}"),
    "a template that doubles": template(
        "{% set n = namespace(s='x') %}"
        "{% for a in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}"
    ),
    "a template with a huge power": template("{{ (10 ** (10 ** 9)) % 7 }}"),
    "a template that widens": template("{{ 'x'.ljust(9999999999) }}"),
    "a template of 2 MB": template("x" * (2 << 20)),
    "a template that leaves out the answer": template("{{ messages[-1].content }}"),
    "a template of no UTF-8": content("chat_template.jinja", b"\xff{{ messages }}"),
    "no vocabulary": vocabulary(lambda t: t["model"].update(vocab={})),
    "a vocabulary that is a list": vocabulary(lambda t: t["model"].update(vocab=[1, 2])),
    "negative tokens": vocabulary(lambda t: t["model"]["vocab"].update({"!": -5})),
    "tokens beyond the embedding": vocabulary(lambda t: t["model"]["vocab"].update({"zzz": 999})),
    "tokens far beyond": vocabulary(lambda t: t["model"]["vocab"].update({"zzz": (1 << 32) - 1})),
    "merges of nothing": vocabulary(lambda t: t["model"].update(merges=[["no", "such"]])),
    "an unknown kind of tokenizer": vocabulary(lambda t: t["model"].update(type="no_such")),
    "an unknown pre-tokenizer": vocabulary(lambda t: t.update(pre_tokenizer={"type": "no_such"})),
    "a damaged expression": vocabulary(
        lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(")
    ),
    "an unknown chat_template_type": entry("tokenizer_config.json", chat_template_type="no_such"),
    "an unknown tool_parser_type": entry("tokenizer_config.json", tool_parser_type="no_such"),
    "a tokenizer_class that is a list": entry("tokenizer_config.json", tokenizer_class=[1]),
    "tokenizer_config.json is a list": content("tokenizer_config.json", "[]"),
    "added_tokens.json is damaged": content("added_tokens.json", "{"),
    "special_tokens_map.json is damaged": content("special_tokens_map.json", "\xff"),
}
# Odd, and it depends on the versions of the libraries whether it matters.
_ODD: dict[str, Break] = {
    **{f"config: {name}": entry("config.json", **given) for name, given in _BAD_CONFIGS.items()},
    "no tokenizer_config.json": lambda p: (p / "tokenizer_config.json").unlink(),
    "an unknown tokenizer_class": entry("tokenizer_config.json", tokenizer_class="NoSuch"),
    "an odd eos_token": entry("tokenizer_config.json", eos_token=5),
    "an eos_token that is no token": entry("tokenizer_config.json", eos_token="<none>"),
    "a broken surrogate": entry("tokenizer_config.json", eos_token="\ud800"),
    "model_max_length text": entry("tokenizer_config.json", model_max_length="x"),
    "an auto_map of nothing": entry("tokenizer_config.json", auto_map={}),
    "an auto_map that is a number": entry("tokenizer_config.json", auto_map=5),
    "an end token beyond the vocabulary": entry("generation_config.json", eos_token_id=5000),
    "added tokens of another kind": vocabulary(lambda t: t.update(added_tokens=5)),
    "an added token of another id": vocabulary(lambda t: t["added_tokens"][0].update(id=7)),
    "no decoder": vocabulary(lambda t: t.update(decoder=None)),
    "a second file of weights": lambda p: shutil.copy(
        p / "model.safetensors", p / "model-2.safetensors"
    ),
    "a template in the other file": content("chat_template.json", '{"chat_template": 5}'),
    "tokens in two files": content("added_tokens.json", '{"zzz": 399}'),
    "metadata of another kind": header(lambda h: h.update(__metadata__=5)),
    "a FIFO that nobody reads": instead("README.md", os.mkfifo),
    "a link to a regular file": lambda p: (
        shutil.move(p / "config.json", p / "blob"),
        (p / "config.json").symlink_to("blob"),
    ),
}


def broken(sound: Path, to: Path, change: Break) -> Path:
    shutil.copytree(sound, to / "m")
    change(to / "m")
    return to / "m"


def test_a_sound_directory_works(sound: Path) -> None:
    with bounded():
        assert isinstance(use(sound), str)


@pytest.mark.parametrize("name", _REFUSED)
def test_it_is_refused_in_a_sentence(
    name: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = broken(sound, tmp_path, _REFUSED[name])
    if name.startswith("a template"):
        monkeypatch.setattr(template_sandbox, "_SECONDS", 1.0)  # instead of 5
    with bounded(), pytest.raises(UserError) as refused:
        use(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("name", _ODD)
def test_it_works_or_is_refused_in_a_sentence(name: str, sound: Path, tmp_path: Path) -> None:
    path = broken(sound, tmp_path, _ODD[name])
    with bounded():
        try:
            use(path)
        except UserError as error:
            assert str(path) in str(error)


# Sizes that no weights have: nothing of that size may be made, so only the sentence is looked for.
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 3000),
        ("hidden_size", 1 << 20),
        ("vocab_size", 1 << 40),
        ("vocab_size", 10**7),
        ("num_attention_heads", 10**9),
        ("num_local_experts", 10**9),
    ],
)
def test_an_absurd_size_is_refused_before_anything_is_made(
    name: str, value: int, sound: Path, tmp_path: Path
) -> None:
    path = broken(sound, tmp_path, entry("config.json", **{name: value}))
    for opened in (lambda: resolve(str(path)), lambda: load(path)):
        begin = time.monotonic()
        with pytest.raises(UserError, match=rf"config\.json: .*{name}"):
            opened()
        assert time.monotonic() - begin < 2


def test_a_template_that_goes_wrong_later_has_a_deadline(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said may lead a template elsewhere than where it was tried."""
    for bad in (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    ):
        source = (
            "{% if 'magic' in messages[-1].content %}" + bad + "{% endif %}" + tiny.CHAT_TEMPLATE
        )
        loaded = load(broken(sound, tmp_path / str(len(bad)), template(source)))
        before = sys.gettrace()
        assert first_prompt(loaded, "What is 1 + 2?")
        monkeypatch.setattr(template_sandbox, "_SECONDS", 1.0)  # instead of 5
        with bounded(), pytest.raises(UserError, match="more time or memory") as refused:
            first_prompt(loaded, "magic")
        assert str(loaded.path) in str(refused.value)
        assert sys.gettrace() is before


_ASKS_NOTHING = """
import sys
from mlx_fd.models.backend import backend
backend()
sys.path.insert(0, {tests!r})
from models.test_hostile_models import use
from mlx_fd.errors import UserError
from pathlib import Path
for path in sys.argv[1:]:
    try:
        print("WORKS", use(Path(path)) is not None)
    except UserError as error:
        print("REFUSED", error)
"""
_NAMES_CODE = (
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}}),
    (
        "tokenizer_config.json",
        {
            "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
            "tokenizer_class": "EvilTokenizer",
        },
    ),
    ("tokenizer_config.json", {"auto_map": ["evil.Tokenizer", "evil.Tokenizer"]}),
    ("config.json", {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}),
    ("config.json", {"auto_map": {"AutoConfig": "evil.Config", "AutoTokenizer": "evil.T"}}),
    ("config.json", {"model_file": "evil.py"}),
)


def test_no_code_of_a_directory_is_run_whatever_is_answered(sound: Path, tmp_path: Path) -> None:
    paths = []
    for number, (where, extra) in enumerate(_NAMES_CODE):
        (tmp_path / str(number)).mkdir()
        paths.append(broken(sound, tmp_path / str(number), entry(where, **extra)))
        (paths[-1] / "evil.py").write_text(
            f"open({str(tmp_path / f'ran {number}')!r}, 'w').close()\n"
            "from transformers import PretrainedConfig as Config\n"
            "from transformers import PreTrainedTokenizerFast as Tokenizer\n"
        )
    done = subprocess.run(
        [sys.executable, "-c", _ASKS_NOTHING.format(tests=str(ROOT / "tests")), *map(str, paths)],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "MLX_FD_CACHE": str(tmp_path / "c")},
        input="y\n" * 1000,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert list(tmp_path.glob("ran *")) == []
    assert done.returncode == 0, done.stderr
    said = [line.split()[0] for line in done.stdout.splitlines()]
    assert len([word for word in said if word in ("WORKS", "REFUSED")]) == len(paths)
    assert "[y/N]" not in done.stdout + done.stderr
