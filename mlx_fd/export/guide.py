"""How to hold an export against its parity bundle: the text in its model card."""

from __future__ import annotations

from mlx_fd.registry import FORMATS

_SERVER = """\
A server that has loaded {what} (vLLM, SGLang, TensorRT-LLM, llama-server, ...) is compared from any
machine:

    mlx-fd compare . --engine openai:http://HOST:PORT
"""


def how_to_compare(form: str, *, adapter: bool) -> str:
    """The commands that compare an export, as Markdown.

    Args:
        form: the export's format.
        adapter: whether it is the adapter alone, which only a server puts on its base.
    """
    begin = (
        "`parity/` holds what the student said where it was trained: prompts of every role, its "
        "continuations, its log-probabilities, its answers to problems. "
    )
    server = _SERVER.format(what="base and adapter" if adapter else "these weights")
    if adapter:
        return begin + server
    chosen = FORMATS[form]
    first = (
        f"One command runs it on whatever is here:\n\n    {chosen.install}\n    mlx-fd compare .\n"
    )
    return "\n".join([begin + first, chosen.on_a_gpu, server])
