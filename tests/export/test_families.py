"""Every family in every form, read back: by llama.cpp, by mlx-lm, by transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mlx_fd.models.backend import backend
from support.architectures import make_architecture
from support.draws import by_day

backend()

import mlx.core as mx  # noqa: E402

from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.export import gguf_file, hf, verify  # noqa: E402
from mlx_fd.export.exporter import export  # noqa: E402
from mlx_fd.export.form import Form  # noqa: E402
from mlx_fd.export.source import fused, open_source  # noqa: E402
from mlx_fd.models.families import COMMON, FAMILIES  # noqa: E402
from mlx_fd.models.gguf import convert  # noqa: E402
from mlx_fd.models.loading import Loaded, load  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# So short that most of the test's text lies beyond it.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [1.0 + 0.7 * i for i in range(6)],
}
# What differs from the family's configuration in tests/support/architectures.py.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases-llama3": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "rope_scaling": LLAMA3},
    ),
    "mistral": ("mistral", {"head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
    "qwen3-yarn": ("qwen3", {"rope_scaling": YARN}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": []}),
    "gemma3_text": ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "phi3": ("phi3", {"num_key_value_heads": 4}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_scaling": LONGROPE,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4}),
    "granite": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "granite-llama3": ("granite", {"rope_scaling": LLAMA3, "tie_word_embeddings": False}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss-yarn": ("gpt_oss", {"rope_scaling": {**YARN, "truncate": False}}),
    "olmo2": ("olmo2", {}),
}
NAMES = list(VARIANTS)


def make(folder: Path, variant: str, **more: Any) -> Path:
    name, options = VARIANTS[variant]
    return make_architecture(folder / "model", name, **{**options, **more})


def write(model: Path, file: Path, kind: str = "f32") -> gguf_file.Written:
    source = open_source(str(model))
    return gguf_file.write_file(source, load(source.ref.model).tokenizer, file, kind=kind)


def logits(path: Path) -> tuple[Loaded, tuple[int, ...], np.ndarray]:
    """A model, a chat in which every role speaks (hundreds of tokens), and the logits on it."""
    loaded = load(path)
    chat = verify.role_chat(loaded)
    return loaded, chat, verify.logits_of(loaded, chat)


def llama_cpp_logits(file: Path, loaded: Loaded, chat: tuple[int, ...]) -> np.ndarray:
    llama_cpp = pytest.importorskip("llama_cpp")
    engine = llama_cpp.Llama(str(file), n_ctx=512, logits_all=True, verbose=False, n_threads=1)
    text = loaded.tokenizer.decode(list(chat))
    assert tuple(engine.tokenize(text.encode(), add_bos=False, special=True)) == chat
    engine.eval(list(chat))
    return np.array(engine.scores[: len(chat) - 1])


def test_every_family_is_tested():
    assert {name for name, _ in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("variant", NAMES)
def test_llama_cpp_computes_the_same(tmp_path, variant):
    """In float32, up to llama.cpp's keys and values in float16."""
    model = make(tmp_path, variant)
    loaded, chat, ours = logits(model)
    write(model, tmp_path / "m.gguf")
    found = verify.agreement(ours, llama_cpp_logits(tmp_path / "m.gguf", loaded, chat))
    assert found.mean_kl < 1e-4 and found.worst_kl < 2e-3 and found.top1 >= 0.98
    # Logits that hardly differ from each other would agree with anything.
    assert ours.std() > 0.5


@pytest.mark.parametrize("variant", by_day(NAMES))
def test_a_gguf_file_comes_back(tmp_path, variant):
    model = make(tmp_path, variant)
    _, chat, ours = logits(model)
    write(model, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    # Gemma's norms lose the last bits of w in 1 + w.
    assert np.abs(verify.logits_of(load(tmp_path / "back"), chat) - ours).max() < 1e-3
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (model, tmp_path / "back")
    )
    name = VARIANTS[variant][0]
    assert after["model_type"] == ("llama" if name == "mistral" else name)
    for key in (*COMMON, *FAMILIES[name].keys):
        if key.option in before:
            assert after[key.option] == pytest.approx(before[key.option], rel=1e-6), key


@pytest.mark.parametrize("variant", NAMES)
def test_the_directory_of_transformers(tmp_path, variant):
    """mlx-lm gives the same logits, and transformers' configuration the same numbers."""
    from transformers import AutoConfig

    model = make(tmp_path, variant)
    loaded, chat, ours = logits(model)
    (tmp_path / "hf").mkdir()
    (tmp_path / "scratch").mkdir()
    source = open_source(str(model))
    hf.write_model(source, loaded.tokenizer, tmp_path / "hf", dtype="float32")
    back = load(hf.read_back(tmp_path / "hf", tmp_path / "scratch"))
    assert np.array_equal(verify.logits_of(back, chat), ours)
    args, config = loaded.model.args, AutoConfig.from_pretrained(tmp_path / "hf")
    family = FAMILIES[VARIANTS[variant][0]]
    assert config.architectures == [family.hf_class]
    for option in (
        *(key.option for key in (*COMMON, *family.keys)),
        "num_key_value_heads",
        "vocab_size",
    ):
        if option not in ("rope_theta", "rope_local_base_freq", "sliding_window_pattern"):
            assert getattr(config, option) == getattr(args, option, getattr(config, option)), option
    rope = config.rope_parameters
    if family.name == "gemma3_text":
        assert rope["full_attention"]["rope_theta"] == args.rope_theta
        assert rope["sliding_attention"]["rope_theta"] == args.rope_local_base_freq
        pattern = args.sliding_window_pattern
        kinds = [(i + 1) % pattern != 0 for i in range(args.num_hidden_layers)]
        assert [kind == "sliding_attention" for kind in config.layer_types] == kinds
    else:
        assert rope["rope_theta"] == args.rope_theta
        wanted = (args.rope_scaling or {}).get("rope_type") or (args.rope_scaling or {}).get("type")
        assert rope["rope_type"] == (wanted or "default")
    if variant == "phi3-longrope":
        # As published, though mlx-lm is given the short ones for texts of every length.
        assert {key: rope[key] for key in LONGROPE if key != "type"} == {
            key: value for key, value in LONGROPE.items() if key != "type"
        }
        assert not [key for key in rope if key.startswith("published")]
    if family.name == "smollm3":
        assert config.no_rope_layers == args.no_rope_layers


def test_names_of_metadata_are_the_gguf_packages_own():
    known = {
        value
        for kind in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
        for value in vars(kind).values()
        if isinstance(value, str)
    }
    for family in FAMILIES.values():
        assert family.gguf in gguf.MODEL_ARCH_NAMES.values()
        for key in (*COMMON, *family.keys):
            assert f"{{arch}}.{key.name}" in known


@pytest.mark.parametrize(
    ("variant", "options", "text"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"takes mlp_only_layers = \[\]"),
        ("qwen3_moe", {"norm_topk_prob": False}, "takes norm_topk_prob = True"),
        ("gemma3_text", {"query_pre_attn_scalar": 20}, "16 for query_pre_attn_scalar"),
        ("smollm3", {"no_rope_layer_interval": 2}, "in every fourth layer"),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "in layers 0, 2"),
        ("gemma3_text", {"rope_scaling": LLAMA3}, "of type llama3 are not written for gemma3_text"),
        ("qwen3", {"rope_scaling": LLAMA3}, "of type llama3 are not written for qwen3"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, variant, options, text):
    """By the command before the model is loaded, too."""
    model = make(tmp_path, variant, **options)
    with pytest.raises(UserError, match=text):
        write(model, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    steps: list[str] = []
    form = Form(format="gguf", parity_problems=0)
    with pytest.raises(UserError, match=text):
        export(str(model), tmp_path / "out", form, progress=lambda what, *_: steps.append(what))
    assert steps == []


@pytest.mark.parametrize(
    ("variant", "options", "text"),
    [
        ("llama", {"rope_traditional": True}, "transformers rotates the halves"),
        ("qwen2", {"rope_traditional": True}, "transformers rotates the halves"),
        (
            "llama",
            {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24},
            "transformers attends to all tokens",
        ),
    ],
)
def test_what_transformers_would_compute_otherwise_is_refused(tmp_path, variant, options, text):
    model = make(tmp_path, variant, **options)
    form = Form(format="hf", parity_problems=0)
    with pytest.raises(UserError, match=text):
        export(str(model), tmp_path / "out", form, progress=lambda *_: None)


def test_the_experts_of_gpt_oss_as_transformers_has_them(tmp_path):
    """Gate and up in turn along the outputs, inputs before outputs (its GptOssExperts)."""
    model = make(tmp_path, "gpt_oss")
    (tmp_path / "hf").mkdir()
    source = open_source(str(model))
    hf.write_model(source, load(model).tokenizer, tmp_path / "hf", dtype="float32")
    ours, theirs = (
        mx.load(str(folder / "model.safetensors")) for folder in (model, tmp_path / "hf")
    )
    before = "model.layers.1.mlp.experts"
    rng = np.random.default_rng(0)
    width = ours[f"{before}.gate_proj.weight"].shape[-1]
    x = rng.standard_normal(width).astype(np.float32)
    both = x @ np.array(theirs[f"{before}.gate_up_proj"][2]) + np.array(
        theirs[f"{before}.gate_up_proj_bias"][2]
    )
    for part, found in (("gate", both[::2]), ("up", both[1::2])):
        weight, bias = (
            np.array(ours[f"{before}.{part}_proj.{kind}"][2]) for kind in ("weight", "bias")
        )
        assert np.abs(weight @ x + bias - found).max() < 1e-5
    assert np.array_equal(theirs[f"{before}.down_proj"][1], ours[f"{before}.down_proj.weight"][1].T)
    assert not [name for name in theirs if ".experts.gate_proj" in name]


def test_experts_of_qwen3_moe_by_themselves(tmp_path):
    model = make(tmp_path, "qwen3_moe")
    (tmp_path / "hf").mkdir()
    source = open_source(str(model))
    hf.write_model(source, load(model).tokenizer, tmp_path / "hf", dtype="float32")
    ours, theirs = (
        mx.load(str(folder / "model.safetensors")) for folder in (model, tmp_path / "hf")
    )
    merged = ours["model.layers.0.mlp.switch_mlp.down_proj.weight"]
    for expert in range(merged.shape[0]):
        name = f"model.layers.0.mlp.experts.{expert}.down_proj.weight"
        assert mx.array_equal(theirs[name], merged[expert])


# What a multimodal model writes with -> the family that transformers and llama.cpp have for it.
WRAPPED = {
    **{"gemma3": "gemma3_text", "mistral3": "mistral", "qwen3_vl": "qwen3"},
    **{"qwen2_vl": "qwen2", "qwen2_untied": "qwen2"},
}
# As Qwen2.5-VL is published: without a part for the text alone.
FLAT = {
    "model_type": "qwen2_5_vl",
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]},
    "vision_config": {"depth": 2, "hidden_size": 16, "model_type": "qwen2_5_vl"},
    **{"vision_start_token_id": 3, "image_token_id": 4},
    **{"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_language_model_of_a_multimodal_one(tmp_path, name):
    """By itself, with what was learned: in both formats, read back and run."""
    from transformers import AutoConfig

    model = make_architecture(tmp_path / "model", name, **(FLAT if name == "qwen2_untied" else {}))
    base = load(model)
    inner = base.model.language_model
    matrix = inner.model.layers[1].self_attn.q_proj
    rank, lora = 2, {"num_layers": 1, "fine_tune_type": "lora"}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    keys = ["self_attn.q_proj"]
    lora["lora_parameters"] = {"rank": rank, "scale": 4.0, "dropout": 0.0, "keys": keys}
    (adapter / "adapter_config.json").write_text(json.dumps({"model": str(model), **lora}))
    at = f"language_model.model.layers.{len(inner.model.layers) - 1}.self_attn.q_proj"
    rows, columns = matrix.weight.shape
    mx.save_safetensors(
        str(adapter / "adapters.safetensors"),
        {
            f"{at}.lora_a": mx.random.normal((columns, rank), key=mx.random.key(0)) * 0.3,
            f"{at}.lora_b": mx.random.normal((rank, rows), key=mx.random.key(1)) * 0.3,
        },
    )
    source = open_source(str(model), adapter)
    chat = verify.role_chat(base)
    untrained = verify.logits_of(base, chat)
    base.model.update(fused(source.ref).parameters())
    ours = verify.logits_of(base, chat)
    assert np.abs(ours - untrained).max() > 0.1

    for folder in ("hf", "scratch"):
        (tmp_path / folder).mkdir()
    hf.check_source(source)
    hf.write_model(source, base.tokenizer, tmp_path / "hf", dtype="float32")
    back = load(hf.read_back(tmp_path / "hf", tmp_path / "scratch"))
    assert np.array_equal(verify.logits_of(back, chat), ours)
    config, family = AutoConfig.from_pretrained(tmp_path / "hf"), FAMILIES[WRAPPED[name]]
    assert (config.architectures, config.model_type) == ([family.hf_class], family.name)
    assert not any(name.startswith("language_model") for name, _ in hf_tensors(tmp_path / "hf"))
    written = (tmp_path / "hf" / "config.json").read_text()
    assert not [word for word in ("mrope", "vision", "image") if word in written]

    gguf_file.check_source(source)
    gguf_file.write_file(source, base.tokenizer, tmp_path / "m.gguf", kind="f32")
    found = verify.agreement(ours, llama_cpp_logits(tmp_path / "m.gguf", base, chat))
    assert found.mean_kl < 1e-4 and found.worst_kl < 2e-3 and found.top1 >= 0.98
    # In 8 bits, the matrix that was trained is not the base's.
    written = gguf_file.write_file(source, base.tokenizer, tmp_path / "q.gguf", kind="q8_0")
    assert written.kinds["q8_0"] > 4


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_positions_that_others_do_not_scale_are_refused(tmp_path, form):
    kind = {"rope_type": "telechat3-yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    model = make_architecture(tmp_path / "model", "llama", rope_scaling=kind)
    check = {"hf": hf.check_source, "gguf": gguf_file.check_source}[form]
    with pytest.raises(UserError, match="rotary positions of type telechat3-yarn"):
        check(open_source(str(model)))


def hf_tensors(folder):
    return mx.load(str(folder / "model.safetensors")).items()


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_the_whole_export_of_a_multimodal_model(tmp_path, kind):
    model = make_architecture(tmp_path / "model", "gemma3")
    form = Form(format=kind, parity_problems=0)
    export(str(model), tmp_path / "out", form, progress=lambda *_: None)
    assert "alone: it reads texts, and no pictures" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3n", "kimi_vl"])
def test_a_multimodal_model_of_no_family_is_refused(tmp_path, name):
    source = open_source(str(make_architecture(tmp_path / "model", name)))
    for check in (hf.check_source, gguf_file.check_source):
        with pytest.raises(UserError, match=f"this one is {name}; --format mlx"):
            check(source)
