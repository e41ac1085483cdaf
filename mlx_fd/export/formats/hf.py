"""The directory of Hugging Face transformers, or an adapter of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_fd.export.formats import ExportFormat, OnSteps, load_or_add, register_format

if TYPE_CHECKING:
    from mlx_fd.export.form import Form
    from mlx_fd.export.source import Source
    from mlx_fd.models.loading import Loaded
    from mlx_fd.models.student import Student


def check(source: Source, form: Form) -> None:
    """Whether transformers, or PEFT, has a place for it."""
    from mlx_fd.export import hf, peft

    if form.adapter:
        peft.check_source(source)
    else:
        hf.check_source(source)


def write(source: Source, live: Loaded, folder: Path, form: Form, on_steps: OnSteps) -> None:
    """Write the model, or its adapter alone."""
    from mlx_fd.export import hf, peft

    if form.adapter:
        peft.write_adapter(source, folder, base_model=form.base_model)
    else:
        hf.write_model(source, live.tokenizer, folder, dtype=form.dtype)


def convert_back(folder: Path, scratch: Path, form: Form) -> Path:
    """Where mlx-lm finds the model."""
    from mlx_fd.export.hf import read_back

    return folder if form.adapter else read_back(folder, scratch)


def load_back(source: Source, folder: Path, form: Form) -> Loaded:
    """The model, or its base with the adapter."""
    from mlx_fd.export import peft

    return load_or_add(source, folder, form, peft.put_adapter)


def use(source: Source, form: Form) -> str:
    """With transformers, and PEFT for an adapter."""
    from mlx_fd.export.card import how_to_base, named_base, text_alone
    from mlx_fd.export.hf import mlx_opens
    from mlx_fd.export.peft import transformers_opens_base

    if not form.adapter:
        too = '\n    mlx_lm.generate --model . --prompt "..."      # mlx-lm opens it too\n'
        return (
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")\n'
            'tokenizer = AutoTokenizer.from_pretrained(".")\n'
            "```\n" + (too if mlx_opens(source) else "") + text_alone(source)
        )
    opens = transformers_opens_base(source)
    base = form.base_model or (named_base(source) if opens else "BASE")
    return (
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(base, ".")\n'
        "```\n\n"
        f"The adapter was trained on `{source.base}`; on weights of another precision it is an "
        "approximation.\n"
        + ("" if opens else "transformers cannot open that one's weights, which MLX quantised.\n")
        + how_to_base(source, base, "hf")
    )


def score_code(source: Source, form: Form, student: Student) -> str:
    """With mlx-lm, which opens whole models of this format."""
    from mlx_fd.export.card import mlx_score_code
    from mlx_fd.export.hf import mlx_opens

    if form.adapter or not mlx_opens(source):
        return ""
    return mlx_score_code(source, form, student)


register_format(
    ExportFormat(
        name="hf",
        help="for Hugging Face transformers",
        order=20,
        write=write,
        check=check,
        convert_back=convert_back,
        load_back=load_back,
        use=use,
        score_code=score_code,
        library=lambda form: "peft" if form.adapter else "transformers",
        options=frozenset({"adapter", "dtype", "base_model"}),
        rounds=lambda form: not form.adapter and form.dtype != "float32",
    )
)
