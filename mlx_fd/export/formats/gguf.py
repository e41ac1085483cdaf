"""One GGUF file, for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_fd.errors import UserError
from mlx_fd.export.formats import ExportFormat, OnSteps, register_format

if TYPE_CHECKING:
    from mlx_fd.export.form import Form
    from mlx_fd.export.gguf_file import Written
    from mlx_fd.export.source import Source
    from mlx_fd.models.loading import Loaded
    from mlx_fd.models.student import Student

_ON_A_GPU = """\
With an NVIDIA GPU llama.cpp is built for it:

    pip install "mlx-fd[cuda]"
    CMAKE_ARGS="-DGGML_CUDA=on" pip install llama-cpp-python
    mlx-fd compare . --engine llama.cpp
"""


def check(source: Source, form: Form) -> None:
    """Whether llama.cpp has the model's architecture and tokenizer."""
    from mlx_fd.export.gguf_file import check_source

    check_source(source)


def write(source: Source, live: Loaded, folder: Path, form: Form, on_steps: OnSteps) -> Written:
    """Write the file."""
    from mlx_fd.export import gguf_file
    from mlx_fd.export.score_head import score_head

    head = score_head(source.ref, live)
    return gguf_file.write_file(
        source,
        live.tokenizer,
        folder / gguf_file.file_name(form.gguf_type),
        kind=form.gguf_type,
        further={} if head is None else head.metadata(),
        progress=on_steps,
    )


def convert_back(folder: Path, scratch: Path, form: Form) -> Path:
    """The file as a directory of mlx-lm."""
    from mlx_fd.export.gguf_file import file_name
    from mlx_fd.models.gguf import convert

    convert(folder / file_name(form.gguf_type), scratch / "model")
    return scratch / "model"


def load_back(source: Source, folder: Path, form: Form) -> Loaded:
    """What the file was converted to.

    Raises:
        UserError: its tokenizer splits text otherwise than the model's.
    """
    from mlx_fd.export.verify import role_chat
    from mlx_fd.models.loading import load
    from mlx_fd.models.tokenizer import open_tokenizer

    back = load(folder)
    tokenizer, _ = open_tokenizer(source.ref.model, back.config)
    text = tokenizer.decode(list(role_chat(back)))
    ours, read_back = (
        one.encode(text, add_special_tokens=False) for one in (tokenizer, back.tokenizer)
    )
    if ours != read_back:
        raise UserError(
            "--format gguf: the tokenizer that the file holds splits text otherwise than the "
            "model's; --format mlx and --format hf keep any tokenizer"
        )
    return back


def use(source: Source, form: Form) -> str:
    """With llama.cpp."""
    from mlx_fd.export.card import text_alone
    from mlx_fd.export.gguf_file import file_name

    name = file_name(form.gguf_type)
    run = f'    llama-cli -m {name} -p "..."      # or: llama-server -m {name}\n'
    head = "\nThe score head is in the file, too: `mlx_fd.score_head.*` of its metadata.\n"
    return run + text_alone(source) + (head if source.ref.scores else "")


def score_code(source: Source, form: Form, student: Student) -> str:
    """With llama.cpp."""
    from mlx_fd.export.card import SCORE_EXAMPLE
    from mlx_fd.export.gguf_file import file_name
    from mlx_fd.models.score_head import SCORE_HEAD

    # The ids themselves: llama.cpp knows three, and takes others by their text.
    penalised = source.ref.repetition_penalty != 1
    rule = """\
def penalise(seen, logits):
    seen, penalty = np.unique(seen), float(about["repetition_penalty"])
    logits[seen] *= np.where(logits[seen] < 0, penalty, 1 / penalty)
    return logits
"""
    given = "ids, temp=0.0, repeat_penalty=1.0" + ", logits_processor=[penalise]" * penalised
    written = f"""\
{rule if penalised else ""}\
ends, reply = {set(_ends(source))}, []
for token in llm.generate({given}):
    reply.append(token)
    if token in ends or len(reply) == int(about["max_tokens"]):
        break
ids += reply[:-1]
"""
    return f"""\
import llama_cpp, numpy as np
from safetensors import safe_open
llm = llama_cpp.Llama("{file_name(form.gguf_type)}", n_ctx=4096, embedding=True, verbose=False,
                      pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE)
with safe_open("{SCORE_HEAD}", "np") as file:
    about, head = file.metadata(), {{name: file.get_tensor(name) for name in ("weight", "bias")}}
{SCORE_EXAMPLE}\
ids = llm.tokenize(text.encode(), add_bos=False, special=True)
{written if student.scores_at_end else ""}\
llm.reset()
llm.eval(ids)
hidden = np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_ith(llm.ctx, -1), (llm.n_embd(),))
print(np.tanh(head["weight"] @ hidden + head["bias"]).item())  # from -1, harmful, to 1, excellent
"""


def _ends(source: Source) -> tuple[int, ...]:
    """The tokens that end the model's turns."""
    from mlx_fd.models.tokenizer import open_tokenizer, read_end_tokens

    template, model = source.ref.template, source.ref.model
    if template is not None and template.end_tokens:
        return template.end_tokens
    tokenizer, _ = open_tokenizer(model, read_end_tokens(model))
    return tuple(sorted(tokenizer.eos_token_ids))


register_format(
    ExportFormat(
        name="gguf",
        help="for llama.cpp",
        order=30,
        write=write,
        check=check,
        convert_back=convert_back,
        load_back=load_back,
        use=use,
        score_code=score_code,
        library=lambda form: "gguf",
        options=frozenset({"gguf_type"}),
        instead={
            "adapter": "a GGUF file holds the whole model",
            "dtype": "for gguf choose --gguf-type f16, bf16 or f32",
            "q_bits": "for gguf choose --gguf-type q8_0, q4_1 or q4_0",
        },
        rounds=lambda form: form.gguf_type != "f32",
        install='pip install "mlx-fd[llama-cpp]"  # on Linux: "mlx-fd[cpu,llama-cpp]"',
        on_a_gpu=_ON_A_GPU,
    )
)
