"""How to hold an export against its parity bundle: the text in its model card."""

from __future__ import annotations

_ON_A_GPU = """\
With an NVIDIA GPU this directory and one package are all it takes; the last line checks mlx-fd's
own CUDA kernels there:

    pip install "mlx-fd[cuda]"      # CUDA 13; "mlx-fd[cuda12]" for CUDA 12
    mlx-fd compare . --engine mlx
    mlx-fd doctor --kernels
"""

_LLAMA_CPP = """\
With an NVIDIA GPU llama.cpp is built for it:

    pip install "mlx-fd[cuda]"
    CMAKE_ARGS="-DGGML_CUDA=on" pip install llama-cpp-python
    mlx-fd compare . --engine llama.cpp
"""

_SERVER = """\
A server that has loaded {what} (vLLM, SGLang, TensorRT-LLM, llama-server, ...) is compared from any
machine:

    mlx-fd compare . --engine openai:http://HOST:PORT
"""


def how_to_compare(form: str, *, adapter: bool) -> str:
    """The commands that compare an export, as Markdown.

    Args:
        form: the export's format, ``mlx``, ``hf`` or ``gguf``.
        adapter: whether it is the adapter alone, which only a server puts on its base.
    """
    begin = (
        "`parity/` holds what the student said where it was trained: prompts of every role, its "
        "continuations, its log-probabilities, its answers to problems. "
    )
    server = _SERVER.format(what="base and adapter" if adapter else "these weights")
    if adapter:
        return begin + server
    install = "pip install mlx-fd               # on Linux: mlx-fd[cpu]"
    if form == "gguf":
        install = 'pip install "mlx-fd[llama-cpp]"  # on Linux: "mlx-fd[cpu,llama-cpp]"'
    first = f"One command runs it on whatever is here:\n\n    {install}\n    mlx-fd compare .\n"
    return "\n".join([begin + first, _LLAMA_CPP if form == "gguf" else _ON_A_GPU, server])
