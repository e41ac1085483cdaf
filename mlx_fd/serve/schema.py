"""What requests may say, checked field by field; what is not understood is refused."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_fd.config.fields import MAX_SEED
from mlx_fd.models.chat_template import THINKING_SWITCHES
from mlx_fd.models.writing import Sampling
from mlx_fd.serve.errors import ApiError, bad
from mlx_fd.serve.limits import Limits
from mlx_fd.serve.models import STUDENT

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
KWARGS, EFFORT = "chat_template_kwargs", "reasoning_effort"
_NO_EFFORT = "none"
_EFFORTS = (_NO_EFFORT, "minimal", "low", "medium", "high")
_MOST_STOPS, _LONGEST_STOP = 4, 256
_MOST_MESSAGES = 1024
# Fields that change nothing here, with the values that mean so.
_IGNORED: Mapping[str, Callable[[Any], bool]] = {
    "user": lambda value: isinstance(value, str),
    "safety_identifier": lambda value: isinstance(value, str),
    "prompt_cache_key": lambda value: isinstance(value, str),
    "metadata": lambda value: isinstance(value, dict),
    "service_tier": lambda value: value in ("auto", "default"),
    "store": lambda value: value is False,
    "n": lambda value: value == 1 and value is not True,
    "best_of": lambda value: value == 1 and value is not True,
    "echo": lambda value: value is False,
    "suffix": lambda value: value == "",
    "logprobs": lambda value: value is False,
    "top_logprobs": lambda value: value == 0 and value is not False,
    "presence_penalty": lambda value: value == 0 and value is not False,
    "frequency_penalty": lambda value: value == 0 and value is not False,
    "logit_bias": lambda value: value == {},
    "response_format": lambda value: value == {"type": "text"},
    "parallel_tool_calls": lambda value: isinstance(value, bool),
    "tools": lambda value: value == [],
    "functions": lambda value: value == [],
    "tool_choice": lambda value: value in ("none", "auto"),
    "function_call": lambda value: value in ("none", "auto"),
    "modalities": lambda value: value == ["text"],
}
_UNSUPPORTED = {
    "tools": "tools are not supported: the models write text only; leave 'tools' out",
    "functions": "functions are not supported: the models write text only; leave 'functions' out",
    "tool_choice": "tools are not supported: the models write text only; leave 'tool_choice' out",
    "function_call": "functions are not supported: the models write text only",
    "logprobs": "logprobs are not supported; leave 'logprobs' out",
    "top_logprobs": "logprobs are not supported; leave 'top_logprobs' out",
    "n": "one request has one reply: n must be 1; send the request again for another",
    "response_format": "only the response_format {'type': 'text'} is supported",
}


@dataclass(frozen=True)
class Common:
    """What every request for a text says.

    Attributes:
        model: who is asked.
        sampling: how to draw.
        stops: texts before which the reply ends.
        stream: whether the reply comes piece by piece.
        usage: whether a stream ends with what it took.
    """

    model: str
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    usage: bool


@dataclass(frozen=True)
class Switch:
    """Whether the models shall think before a reply.

    Attributes:
        on: whether they shall; ``None``: as the server has it.
        effort: how much, as a template of gpt-oss's kind is told it; empty: it is not said.
        by_effort: whether ``reasoning_effort`` says so.
    """

    on: bool | None = None
    effort: str = ""
    by_effort: bool = False


AS_SERVED = Switch()


@dataclass(frozen=True)
class ChatRequest:
    """``POST /v1/chat/completions``.

    Attributes:
        common: what every request says.
        messages: (role, text) of each, the last a user's.
        verbatim: whether a problem is asked in its own words alone; ``None``: as the server does.
        switch: whether the models think.
    """

    common: Common
    messages: tuple[tuple[str, str], ...]
    verbatim: bool | None
    switch: Switch = AS_SERVED


@dataclass(frozen=True)
class CompletionRequest:
    """``POST /v1/completions``: a text that is written on, without a chat around it."""

    common: Common
    prompt: str


@dataclass(frozen=True)
class FeedbackRequest:
    """``POST /v1/feedback``.

    Attributes:
        items: (problem, answer) of each.
        several: whether they came as a list.
        sampling: of the feedback's text.
        text: whether the feedback is to be written.
    """

    items: tuple[tuple[str, str], ...]
    several: bool
    sampling: Sampling
    text: bool


class Fields:
    """A JSON object that is read field by field; what is left over is refused."""

    def __init__(self, content: Any, where: str = ""):
        if not isinstance(content, dict):
            what = where or "The body"
            raise bad(f"{what} must be a JSON object, not {_kind(content)}.", where or None)
        self._left = dict(content)
        self._where = f"{where}." if where else ""

    def take(self, name: str) -> Any:
        """A field's value; ``None`` where it is not there or null."""
        return self._left.pop(name, None)

    def text(self, name: str, *, empty: bool = False) -> str:
        """A field that must be there and is a text."""
        return checked_text(self.take(name), self._where + name, empty=empty)

    def flag(self, name: str) -> bool | None:
        """A field that is true or false."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise bad(f"'{self._where}{name}' must be true or false, not {_shown(value)}.", name)
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        """A field that is a number."""
        value = self.take(name)
        if value is None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:  # refuses NaN, too
            raise bad(
                f"'{self._where}{name}' must be a number from {least:g} to {most:g}, not "
                f"{_shown(value)}.",
                name,
            )
        return float(value)

    def count(self, name: str, least: int, most: int, default: int | None) -> int | None:
        """A field that is a whole number."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise bad(
                f"'{self._where}{name}' must be a whole number from {least} to {most}, not "
                f"{_shown(value)}.",
                name,
            )
        return value

    def end(self) -> None:
        """Refuse what was not read; of the body itself, not what changes nothing here.

        There clients send fields that are not set as null, those that other servers know too.
        """
        for name, value in self._left.items():
            if self._where:
                raise self._unknown(name)
            if value is None or (name in _IGNORED and _IGNORED[name](value)):
                continue
            if name in _UNSUPPORTED or name in _IGNORED:
                message = _UNSUPPORTED.get(
                    name, f"this value of '{name}' is not supported; leave it out"
                )
                raise bad(
                    message[0].upper() + message[1:] + ".", name, code="unsupported_parameter"
                )
            raise self._unknown(name)

    def _unknown(self, name: str) -> ApiError:
        return bad(
            f"Unrecognized request argument supplied: {self._where}{name:.64}",
            name[:64],
            code="unknown_parameter",
        )


def parse_json(body: bytes) -> Any:
    """A request's body.

    Raises:
        ApiError: it is no JSON, has what JSON has not, such as NaN, or a field twice.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:  # nobody knows which one is meant
                raise bad(f"The body has '{name:.64}' twice in one object.", name[:64])
            found[name] = value
        return found

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise bad(f"The body is not JSON in UTF-8: {reason:.160}.", code="invalid_json") from None


def checked_text(value: Any, name: str, *, empty: bool = False) -> str:
    """A text that can be written down.

    Raises:
        ApiError: it is none, is empty though it must not be, or has halves of characters.
    """
    if not isinstance(value, str):
        missing = value is None
        raise bad(
            f"Missing required parameter: '{name}'."
            if missing
            else f"'{name}' must be a text, not {_kind(value)}.",
            name,
            code="missing_required_parameter" if missing else None,
        )
    if not empty and not value.strip():
        raise bad(f"'{name}' is empty.", name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad(f"'{name}' is not UTF-8 text (at character {error.start}).", name) from None
    return value


def chat_request(content: Any, limits: Limits, default_tokens: int) -> ChatRequest:
    """Read a chat request.

    Args:
        content: the body's JSON.
        limits: of the server.
        default_tokens: the most tokens of a reply, where the request does not say.

    Raises:
        ApiError: it cannot be read, or asks for what there is not.
    """
    fields = Fields(content)
    common = _common(fields, limits, default_tokens)
    messages = _messages(fields.take("messages"))
    ours = fields.take("mlx_fd")
    verbatim = None
    if ours is not None:
        own = Fields(ours, "mlx_fd")
        verbatim = own.flag("verbatim")
        own.end()
    switch = _switch(fields)
    fields.end()
    return ChatRequest(common, messages, verbatim, switch)


def _switch(fields: Fields) -> Switch:
    """What a chat's request says of thinking, in vLLM's way or in OpenAI's."""
    kwargs, effort = fields.take(KWARGS), fields.take(EFFORT)
    said = set[bool]()
    if kwargs is not None:
        own = Fields(kwargs, KWARGS)
        said = {flag for name in THINKING_SWITCHES if (flag := own.flag(name)) is not None}
        own.end()
    if effort is not None:
        if effort not in _EFFORTS:
            raise bad(f"'{EFFORT}' must be one of {', '.join(_EFFORTS)}.", EFFORT)
        said.add(effort != _NO_EFFORT)
    if len(said) > 1:
        raise bad("The request says both that the models think and that they do not.", KWARGS)
    if not said:
        return AS_SERVED
    level = "" if effort in (None, _NO_EFFORT) else effort
    return Switch(said.pop(), level, by_effort=kwargs is None)


def completion_request(content: Any, limits: Limits, default_tokens: int) -> CompletionRequest:
    """Read a completion request; arguments and errors as :func:`chat_request`."""
    fields = Fields(content)
    common = _common(fields, limits, default_tokens)
    prompt = fields.take("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        [prompt] = prompt
    if isinstance(prompt, list):
        raise bad("'prompt' must be one text; send several requests for several.", "prompt")
    text = checked_text(prompt, "prompt")
    fields.end()
    return CompletionRequest(common, text)


def feedback_request(content: Any, limits: Limits, default_tokens: int) -> FeedbackRequest:
    """Read a request for feedback; arguments and errors as :func:`chat_request`."""
    fields = Fields(content)
    listed = fields.take("items")
    items: tuple[tuple[str, str], ...]
    if listed is None:
        items = ((fields.text("problem"), fields.text("answer")),)
    else:
        if not isinstance(listed, list) or not 1 <= len(listed) <= limits.most:
            raise bad(
                f"'items' must be a list of 1 to {limits.most} objects with 'problem' and "
                "'answer'.",
                "items",
            )
        found = []
        for place, one in enumerate(listed):
            item = Fields(one, f"items[{place}]")
            found.append((item.text("problem"), item.text("answer")))
            item.end()
        items = tuple(found)
    tokens = fields.count("max_tokens", 1, limits.max_tokens, None)
    temperature = fields.number("temperature", 0, 2, 0)
    seed = fields.count("seed", 0, MAX_SEED, None)
    text = fields.flag("text")
    if fields.take("model") not in (None, STUDENT):
        raise bad(f"Feedback is the {STUDENT}'s; leave 'model' out.", "model")
    fields.end()
    sampling = Sampling(
        tokens or default_tokens, temperature, seed=_drawn_seed() if seed is None else seed
    )
    return FeedbackRequest(items, listed is not None, sampling, text is not False)


def _common(fields: Fields, limits: Limits, default_tokens: int) -> Common:
    model = fields.text("model")
    old = fields.count("max_tokens", 1, limits.max_tokens, None)
    new = fields.count("max_completion_tokens", 1, limits.max_tokens, None)
    if None not in (old, new) and old != new:
        raise bad(
            f"'max_tokens' is {old} and 'max_completion_tokens' is {new}: they mean the same; "
            "leave one out.",
            "max_tokens",
        )
    seed = fields.count("seed", -(2**63), 2**63 - 1, None)
    sampling = Sampling(
        max_tokens=new or old or min(default_tokens, limits.max_tokens),
        temperature=fields.number("temperature", 0, 2, 0),
        top_p=fields.number("top_p", 0, 1, 1),
        top_k=fields.count("top_k", 0, 1 << 20, 0) or 0,
        repetition_penalty=fields.number("repetition_penalty", 0.01, 10, 1),
        seed=_drawn_seed() if seed is None else seed % (MAX_SEED + 1),
    )
    if not sampling.top_p:
        raise bad("'top_p' must be above 0.", "top_p")
    stream = fields.flag("stream") or False
    options = fields.take("stream_options")
    usage = False
    if options is not None:
        if not stream:
            raise bad("'stream_options' is only for 'stream': true.", "stream_options")
        own = Fields(options, "stream_options")
        usage = own.flag("include_usage") or False
        own.flag("include_obfuscation")
        own.end()
    return Common(model, sampling, _stops(fields.take("stop")), stream, usage)


def _drawn_seed() -> int:
    return secrets.randbelow(MAX_SEED + 1)


def _stops(value: Any) -> tuple[str, ...]:
    listed = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or len(listed) > _MOST_STOPS:
        raise bad(f"'stop' must be a text, or a list of up to {_MOST_STOPS}.", "stop")
    stops = tuple(checked_text(one, "stop", empty=True) for one in listed)
    if any(not 1 <= len(one) <= _LONGEST_STOP for one in stops):
        raise bad(f"Each 'stop' must have 1 to {_LONGEST_STOP} characters.", "stop")
    return stops


def _messages(value: Any) -> tuple[tuple[str, str], ...]:
    if value is None:
        raise bad(
            "Missing required parameter: 'messages'.",
            "messages",
            code="missing_required_parameter",
        )
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST_MESSAGES:
        raise bad(f"'messages' must be a list of 1 to {_MOST_MESSAGES} messages.", "messages")
    found = []
    for place, one in enumerate(value):
        where = f"messages[{place}]"
        fields = Fields(one, where)
        role = fields.take("role")
        if role in ("tool", "function"):
            raise bad(
                "Tools are not supported: the models write text only.",
                f"{where}.role",
                code="unsupported_parameter",
            )
        if not isinstance(role, str) or role not in _ROLES:
            raise bad(f"'{where}.role' must be one of {', '.join(_ROLES)}.", f"{where}.role")
        if fields.take("tool_calls") or fields.take("function_call"):
            raise bad(
                "Tools are not supported: the models write text only.",
                f"{where}.tool_calls",
                code="unsupported_parameter",
            )
        # Of earlier replies; templates leave out what was thought before them.
        for name in ("name", "refusal", "audio", "annotations", "mlx_fd", "reasoning_content"):
            fields.take(name)
        text = _content(fields.take("content"), f"{where}.content")
        if _ROLES[role] == "user" and not text.strip():
            raise bad(f"'{where}.content' is empty.", f"{where}.content")
        fields.end()
        found.append((_ROLES[role], text))
    if found[-1][0] != "user":
        raise bad("The last message must be the user's.", "messages")
    return tuple(found)


def _content(value: Any, where: str) -> str:
    """A message's text, which may come in parts."""
    if not isinstance(value, list):
        return checked_text(value, where, empty=True)
    texts = []
    for place, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise bad(
                f"'{where}': only parts of the type 'text' are supported.",
                where,
                code="unsupported_content",
            )
        fields = Fields(part, f"{where}[{place}]")
        fields.take("type")
        # A hint for servers that are paid for each token they read.
        fields.take("cache_control")
        texts.append(fields.text("text", empty=True))
        fields.end()
    return "\n".join(texts)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


def _shown(value: Any) -> str:
    return f"{value!r:.40}" if isinstance(value, int | float | str) else _kind(value)


__all__ = [
    "ApiError",
    "ChatRequest",
    "CompletionRequest",
    "FeedbackRequest",
    "chat_request",
    "completion_request",
    "feedback_request",
    "parse_json",
]
