"""Which pairs of models may learn from each other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from mlx_fd.errors import UserError
from mlx_fd.models.pairing import check_pair
from mlx_fd.models.tokenizer import open_template
from mlx_fd.models.tokenizer_file import read_tokenizer
from support import tiny
from support.thinkers import TEMPLATES


def write_config(path: Path, **entries: object) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    more = {"model_type": "llama", "num_attention_heads": 1, "rms_norm_eps": 1e-5}
    (path / "config.json").write_text(json.dumps({**more, **sizes, **entries}))


def model_files(path: Path, tokenizer: Tokenizer, vocab_size: int, **kwargs: Any) -> Path:
    """A model directory as far as pairing looks: no weights."""
    tiny.write_tokenizer(path, tokenizer, **kwargs)
    eos = tokenizer.token_to_id("<|im_end|>")
    write_config(path, vocab_size=vocab_size, eos_token_id=eos)
    return path


def changed(change: Callable[[dict[str, Any]], None], size: int = 400) -> Tokenizer:
    content = json.loads(tiny.make_tokenizer(size).to_str())
    change(content)
    return Tokenizer.from_str(json.dumps(content))


def differ(expert: Path, student: Path, how: str) -> None:
    """Each reads the text in its own tokens, and the user is told why, once."""
    pairing = check_pair(expert, student)
    assert pairing.shared_vocab == 0
    (warning,) = pairing.warnings
    assert re.search(rf"have different tokenizers \(.*{how}.*\): each reads the same text", warning)


def test_padding_is_not_a_difference(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer(400)
    expert = model_files(tmp_path / "e", tokenizer, 152064)
    student = model_files(tmp_path / "s", tokenizer, 151936)
    pairing = check_pair(expert, student)
    assert (pairing.shared_vocab, pairing.expert_vocab, pairing.student_vocab) == (
        400,
        152064,
        151936,
    )
    assert pairing.warnings == ()


def test_a_changed_token_is_named(tmp_path: Path) -> None:
    expert = model_files(tmp_path / "e", tiny.make_tokenizer(), 400)

    def rename(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["@@"] = vocabulary.pop("!")

    student = model_files(tmp_path / "s", changed(rename), 400)
    number = tiny.make_tokenizer().token_to_id("!")
    differ(expert, student, f"token {number} is '!' for the expert and '@@'")


def test_same_strings_in_another_order(tmp_path: Path) -> None:
    expert = model_files(tmp_path / "e", tiny.make_tokenizer(), 400)

    def swap(content: dict[str, Any]) -> None:
        v = content["model"]["vocab"]
        v["!"], v["#"] = v["#"], v["!"]

    differ(expert, model_files(tmp_path / "s", changed(swap), 400), "token 0 is '!' for the expert")


def test_added_tokens_count(tmp_path: Path) -> None:
    expert = model_files(tmp_path / "e", tiny.make_tokenizer(), 512)
    other = changed(lambda content: content["added_tokens"][-1].update(content="<|other|>"))
    student = model_files(tmp_path / "s", other, 512, eos="<|other|>")
    differ(expert, student, r"token 399 is '<\|im_end\|>' .* '<\|other\|>'")
    more = tiny.make_tokenizer()
    more.add_special_tokens([AddedToken("<tool>", special=True), AddedToken("<x>", special=True)])
    longer = model_files(tmp_path / "more", more, 512)
    for pair in ((expert, longer), (longer, expert)):
        pairing = check_pair(*pair)
        assert pairing.shared_vocab == 400
        assert any("the first 400" in warning for warning in pairing.warnings)


@pytest.mark.parametrize(
    ("tokens", "template", "eos", "named"),
    [
        (("<think>", "</think>"), TEMPLATES["qwen3"].source, "<|im_end|>", "400, '<think>'"),
        # No chat has them, but thoughts would.
        (("<think>", "</think>"), tiny.CHAT_TEMPLATE, "<|im_end|>", "400, '<think>'"),
        (("<tool>", "<end>"), tiny.CHAT_TEMPLATE, "<end>", "401, '<end>'"),
        (
            ("<end>",),
            tiny.CHAT_TEMPLATE.replace("<|im_end|>", "<end>"),
            "<|endoftext|>",
            "400, '<end>'",
        ),
        (("<tool>", "<x>"), tiny.CHAT_TEMPLATE, "<|im_end|>", ""),
    ],
)
def test_one_model_has_tokens_that_chats_need(
    tmp_path: Path, tokens: tuple[str, ...], template: str, eos: str, named: str
) -> None:
    """As Qwen3 has for thoughts and Qwen2.5 has not; and as a fine-tuned Llama has for turns."""
    more = tiny.make_tokenizer()
    more.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    longer = model_files(tmp_path / "longer", more, 512, eos=eos, chat_template=template)
    write_config(longer, vocab_size=512, eos_token_id=more.token_to_id(eos))
    # It has no row for what is not its own.
    plain = model_files(tmp_path / "plain", tiny.make_tokenizer(), 400)
    trained = open_template(longer)
    if named:
        differ(longer, plain, f"chats of the expert need token {named}, which only the expert has")
        pairing = check_pair(plain, longer, trained=trained)
        assert f"chats of the student need token {named}" in pairing.difference
        assert (pairing.shared_vocab, pairing.expert_template) == (0, open_template(plain))
    else:
        assert check_pair(longer, plain).shared_vocab == 400
        assert check_pair(plain, longer, trained=trained).shared_vocab == 400
    # A student's further tokens are in no chat that its expert writes.
    assert check_pair(plain, longer).shared_vocab == 400


def test_splitting_is_compared(tmp_path: Path) -> None:
    expert = model_files(tmp_path / "e", tiny.make_tokenizer(), 400)
    other = tiny.make_tokenizer()
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    differ(expert, model_files(tmp_path / "s", other, 400), "becomes .* for the student")


def test_merges_are_compared(tmp_path: Path) -> None:
    expert = model_files(tmp_path / "e", tiny.make_tokenizer(), 400)
    other = changed(lambda content: content["model"]["merges"].reverse())
    differ(expert, model_files(tmp_path / "s", other, 400), "becomes .* for the student")


def test_fewer_rows_than_tokens(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer(400)
    good = model_files(tmp_path / "good", tokenizer, 400)
    short = model_files(tmp_path / "short", tokenizer, 399)
    for pair in ((good, short), (short, good)):
        with pytest.raises(UserError, match="short has 400 tokens but only 399 rows"):
            check_pair(*pair)


def test_chat_templates(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    good = model_files(tmp_path / "good", tokenizer, 400)
    base = model_files(tmp_path / "base", tokenizer, 400, chat_template=None)
    with pytest.raises(UserError, match=r"the expert .*base has no chat template: an Instruct"):
        check_pair(base, good)
    with pytest.raises(UserError, match=r"the student .*base has no chat template"):
        check_pair(good, base)
    (base / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    assert check_pair(good, base).warnings == ()
    (base / "chat_template.jinja").unlink()
    other = tiny.CHAT_TEMPLATE.replace("im_start", "im_begin")
    (base / "chat_template.json").write_text(json.dumps({"chat_template": other}))
    (warning,) = check_pair(good, base).warnings
    assert "different chat templates; the expert's is used for both" in warning
    assert check_pair(base, good).template.source == other


def test_end_tokens(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    good = model_files(tmp_path / "good", tokenizer, 400)
    base = model_files(tmp_path / "base", tokenizer, 400, eos="<|endoftext|>")
    write_config(base, vocab_size=400, eos_token_id=397)
    (warning,) = check_pair(good, base).warnings
    assert "[399] for the expert, [397, 399] for the student" in warning
    # generation_config.json counts for more than config.json, as in mlx-lm.
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [399, 397]}))
    (good / "generation_config.json").write_text(json.dumps({"eos_token_id": [397, 399]}))
    assert check_pair(good, base).warnings == ()


def test_damaged_files(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    good = model_files(tmp_path / "good", tokenizer, 400)
    bad = model_files(tmp_path / "bad", tokenizer, 400)
    (bad / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no model_type"):
        check_pair(good, bad)
    write_config(bad, vocab_size=400)
    (bad / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"bad cannot be loaded .*tokenizer\.json"):
        check_pair(good, bad)
    (bad / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        check_pair(good, bad)
    tokenizer.save(str(bad / "tokenizer.json"))
    (bad / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer in .*bad cannot be loaded"):
        check_pair(good, bad)


@pytest.mark.model
def test_smollm2(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny.smollm2(tmp_path_factory)
    assert check_pair(path, path).shared_vocab == 49152
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (other / name).write_bytes((path / name).read_bytes())
    content = json.loads((path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    # A token that no merge makes: only the comparison of the strings can find it.
    vocabulary["a new token"] = vocabulary.pop("<jupyter_code>")
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in vocabulary]
    (other / "tokenizer.json").write_text(json.dumps(content))
    differ(path, other, "'<jupyter_code>' for the expert and 'a new token'")


def test_what_a_fine_tuning_left_on_cuts_and_fills_no_text(tmp_path: Path) -> None:
    """A text that is too long for the model would be counted as short as that."""
    path = tiny.make_model_dir(tmp_path / "model")
    text = "How many apples? " * 20
    wanted = read_tokenizer(path).encode(text).ids
    assert len(wanted) > 90
    file = path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(file))
    assert len(tokenizer.encode(text).ids) == 64
    assert read_tokenizer(path).encode(text).ids == wanted
