"""The text of a reply while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.generate import TextStateMachine

from mlx_fd.models.loading import Loaded

_SAID, _THOUGHT = "said", "thought"


class ReplyText:
    """Tokens in, text out: whole characters, up to a stop text, without thoughts.

    What may yet become a stop text or the mark of a thought is held back until it is known.
    """

    def __init__(self, loaded: Loaded, stops: Sequence[str], *, raw: bool = False):
        """A reply of which nothing is written yet.

        Args:
            loaded: who writes.
            stops: texts before which the reply ends, none of them empty.
            raw: whether no thought is looked for: it is one.
        """
        self._detokenizer = loaded.tokenizer.detokenizer
        edges: list[tuple[str, str | None]] = [(text, None) for text in stops]
        transitions: dict[str, list[tuple[str, str | None]]] = {_SAID: edges}
        family = loaded.thinking.family if loaded.thinking and not raw else None
        if family is not None:
            edges.append((family.start, _THOUGHT))
            transitions[_THOUGHT] = [(family.end, _SAID)]
            edges += ((mark, _SAID) for mark in (family.starts_reply, *family.around) if mark)
        self._state: Any = TextStateMachine(
            {name: found for name, found in transitions.items() if found}
        ).make_state(_SAID)

    @property
    def stopped(self) -> bool:
        """Whether a stop text came."""
        return self._state[0] is None

    def add(self, token: int) -> str:
        """What can be shown after one more token."""
        self._detokenizer.add_token(token)
        return self._shown(self._detokenizer.last_segment)

    def end(self) -> str:
        """What was held back, at the reply's end."""
        self._detokenizer.finalize()
        shown = self._shown(self._detokenizer.last_segment)
        if self.stopped:
            return shown
        self._state, rest, state = TextStateMachine.flush(self._state)
        return shown + (rest if state == _SAID else "")

    def _shown(self, text: str) -> str:
        if self.stopped or not text:
            return ""
        self._state, segments = TextStateMachine.split(self._state, text)
        return "".join(part for state, part in segments if state == _SAID)
