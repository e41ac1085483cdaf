"""Whether a model thinks before its reply, where a request says so.

vLLM's and SGLang's clients send ``chat_template_kwargs`` with a switch (``enable_thinking``),
OpenAI's a ``reasoning_effort``. A template that knows the one need not know the other.
"""

from __future__ import annotations

import dataclasses

from mlx_fd.errors import UserError
from mlx_fd.models.chat_template import THINKING_SWITCHES
from mlx_fd.models.loading import Loaded, with_thinking
from mlx_fd.serve.errors import bad
from mlx_fd.serve.schema import EFFORT, KWARGS, Switch


def switched(loaded: Loaded, who: str, switch: Switch) -> Loaded:
    """A model that thinks as a request wants it to.

    Args:
        loaded: as the server has it.
        who: what the request calls it.
        switch: what the request says.

    Raises:
        ApiError: its chat template does not understand that.
    """
    if switch.on is None:
        return loaded
    param = EFFORT if switch.by_effort else KWARGS
    known = loaded.thinking
    if known is None:
        raise bad(f"The {who} does not think; leave '{param}' out.", param)
    if switch.effort:
        if not loaded.template.knows(EFFORT):
            raise bad(
                f"The {who}'s chat template knows no '{EFFORT}'; leave it out, or turn thinking on "
                f"or off with '{KWARGS}': {{'{THINKING_SWITCHES[0]}': true or false}}.",
                EFFORT,
            )
        template = loaded.template.with_kwargs(**{EFFORT: switch.effort})
        loaded = dataclasses.replace(loaded, template=template)
    try:
        found = with_thinking(loaded, on=switch.on, limit=known.limit)
    except UserError:
        found = None
    if found is None or found.thinking is None or not found.thinking.anchor:
        how = "on" if switch.on else "off"
        raise bad(
            f"The {who}'s chat template does not let a request turn thinking {how}; leave "
            f"'{param}' out.",
            param,
        )
    return found
