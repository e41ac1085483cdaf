"""Every architecture of mlx-lm that a person may bring, as a small random model.

Each is right in all that the method does with it, or refused when it is loaded; none is silently
wrong.
"""

import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_fd.config import ModelOptions
from mlx_fd.errors import UserError
from mlx_fd.feedback.pair import load_pair
from support import ROOT, sweep
from support.architectures import ARCHITECTURES, VOCAB, config_of, make_architecture
from support.draws import ALL, nightly
from support.scripted import script

# Why they are refused, in words of the message.
REFUSED = {
    "iquestloopcoder": "not run one after the other, once each",
    # What transformers makes of its config.json, without which mlx-lm opens no tokenizer.
    "gear": "the tokenizer",
}
# Their batches are not what each conversation alone is, with mlx-lm's own generator.
ALONE = {
    *("gemma2", "recurrent_gemma", "olmo_hybrid", "nemotron_h", "llama4", "bailing_moe_linear"),
    *("longcat_flash_ngram", "afm7", "baichuan_m1", "gpt_bigcode", "mamba", "jamba", "rwkv7"),
}
FAMILIES = {
    *("llama", "llama4", "mistral", "mistral3", "ministral3", "mixtral", "phi3", "smollm3"),
    *("qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe"),
    *("gemma", "gemma2", "gemma3_text", "gemma3", "gemma3n", "gemma4", "gemma4_text"),
    *("gpt_oss", "granite", "granitemoehybrid", "lfm2", "olmo2", "olmo3"),
    *("deepseek_v2", "deepseek_v3", "nemotron_h", "exaone4", "glm4"),
}


# By day a third of those that are named here, and of the rest every fifth. Some of the others are
# then opened, and their batches compared, for the documentation's table.
FIRST = [
    name
    for name in ARCHITECTURES
    if name in ALONE or name in REFUSED or config_of(name)["model_type"] in FAMILIES
]
REST = [name for name in ARCHITECTURES if name not in FIRST]
BY_DAY = [name for name in FIRST if FIRST.index(name) % 3 == 0 or name in REFUSED]
TRIED = [*FIRST, *REST] if ALL else [*BY_DAY, *REST[::5]]


@pytest.fixture(scope="module")
def documented():
    """Lines of the documentation's table, and its script."""
    found = script("make_models_table")
    page = found.PAGE.read_text(encoding="utf-8")
    return page.partition(found.BEGIN)[2].partition(found.END)[0].splitlines(), found


@pytest.mark.parametrize("name", TRIED)
def test_right_or_refused(name, documented, tmp_path):
    lines, table = documented
    options = ModelOptions(lora_rank=2)
    expert = make_architecture(tmp_path / "expert", name)
    student = make_architecture(tmp_path / "student", name, seed=2)
    try:
        pair = load_pair(expert, student, lora_rank=2)
    except UserError as error:
        assert REFUSED[name] in str(error)
        assert "\n" not in str(error)
        assert table.line(table.row_of(name, error, tmp_path / "expert")) in lines
        return
    assert name not in REFUSED
    assert table.line(table.row_of(name, pair.expert, tmp_path / "expert")) in lines
    assert pair.expert.batched == pair.student_lm.batched == (name not in ALONE)
    base = sweep.logits_of(pair.student.model, sweep.TEXT)
    # Where all logits are alike, nothing that is wrong shows.
    assert base.shape[-1] >= VOCAB
    assert 0.3 < mx.sqrt(mx.var(base, axis=-1)).min().item() < 10
    sweep.check_body(pair.student.view)
    samples = sweep.samples_of(pair)
    sweep.check_gradient(pair, samples)
    mx.clear_cache()
    mx.reset_peak_memory()
    sweep.check_generation(pair.expert)
    sweep.check_update(pair, samples)
    peak = mx.get_peak_memory()
    # Going through a graph takes a while, and the others' are the same operations.
    if name in FAMILIES and (ALL or TRIED.index(name) % 3 == 0):
        said = sweep.estimated(expert, student, options)
        assert said.total >= peak
        stored = sum(array.nbytes for array in mx.load(str(expert / "model.safetensors")).values())
        assert said.parts["expert weights"] == pytest.approx(stored, rel=0.02)
    sweep.check_export(pair, base, tmp_path, options)


def test_the_families_of_today_are_right(documented):
    assert len(FIRST) >= 45 and len(ARCHITECTURES) >= 100 and len(TRIED) >= 30
    assert {config_of(name)["model_type"] for name in ARCHITECTURES if name not in REFUSED} >= (
        FAMILIES
    )
    named = {line.split("`")[1] for line in documented[0] if line.startswith("| `")}
    assert named == {"model_type", *(config_of(name)["model_type"] for name in ARCHITECTURES)}


@pytest.mark.parametrize(
    ("row", "formats"),
    [
        ("`gemma3` | right | keys and values, window", "mlx, hf, gguf"),
        ("`qwen3_vl_moe` | right | keys and values", "mlx, hf, gguf"),
        ("`smollm3` | right | keys and values", "mlx, hf, gguf"),
        ("`llama` | right | keys and values, window", "mlx"),
        ("`kimi_vl` | right | keys and values", "mlx"),
        ("`granitemoehybrid` | right | keys and values, recurrence", "mlx"),
    ],
)
def test_the_table_says_what_published_models_can_be_exported_to(documented, row, formats):
    assert f"| {row} | {formats} |" in documented[0]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in TRIED][::5])
def test_the_table_of_the_documentation_has_those_that_are_not_tried_today(
    name, documented, tmp_path
):
    lines, table = documented
    folder = tmp_path / "model"
    assert table.line(table.row_of(name, table.opened(name, folder), folder)) in lines


@nightly
def test_the_table_of_the_documentation_is_up_to_date():
    command = [sys.executable, str(ROOT / "scripts" / "make_models_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
