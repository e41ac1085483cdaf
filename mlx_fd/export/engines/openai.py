"""Any server with OpenAI's completions interface: vLLM, SGLang, TensorRT-LLM, llama-server, ...

Prompts are sent as token ids where the server takes them, else as text with its special tokens.
The reference's continuation is read without sending it: the server continues greedily, and where
it leaves the reference, it is asked again from the reference's token on. That costs one request a
prompt and one a divergence. What a server does not say is not measured. Every exchange ends: after
:data:`SECONDS`, or so many bytes.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import ipaddress
import itertools
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_fd.errors import UserError
from mlx_fd.export.bundle import Bundle, Prompt
from mlx_fd.export.engines import TIMED_ROLE, Continuation, Timing
from mlx_fd.export.engines.address import parse_address, without_secrets
from mlx_fd.export.engines.exchange import Budget, Unusable, open_url
from mlx_fd.text import strip_control_chars

SECONDS = 300.0  # for one exchange, from the connection to the last byte of the response
_PATIENCE = (1.0, 4.0)  # seconds before the second and the third try
_LARGEST = 32 << 20  # bytes of a response, headers included
_LONGEST_WORDS = 300  # of a server's that are shown
_BUSY = (429, 502, 503, 504)
_PROBE = 8  # tokens
_MAX_REQUESTS = 8  # a prompt
_ROUNDING = 1e-3  # by which a log-probability may be above 0

# From the most telling to the least; the first that a server takes is used.
_DIALECTS: tuple[dict[str, Any], ...] = (
    {"logprobs": 20, "return_tokens_as_token_ids": True},
    {"logprobs": 20},
    {"logprobs": 5},
    {"logprobs": True, "top_logprobs": 10},
    {},
)
# Servers have defaults of their own, or take them from generation_config.json: a penalty of 1.1 is
# common. And the prompts have their first token already.
_PLAIN = {
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,
    "min_p": 0.0,
    "add_special_tokens": False,
}

Token = int | str
"""An id, or a token's text where the server has no ids."""


@dataclass(frozen=True)
class _Step:
    """One token that a server wrote: the likeliest, and its log-probabilities of the top ones."""

    chosen: Token
    logprobs: dict[Token, float]


# What reading JSON of another form than expected raises: OverflowError is int(1e999)'s.
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _token(text: Any) -> Token:
    """An id where the text is ``token_id:123``, as vLLM writes it when asked for ids."""
    if isinstance(text, int):
        return text
    name = str(text)
    digits = name.removeprefix("token_id:")
    return int(digits) if digits != name and digits.isdecimal() else name


def _steps(choice: Mapping[str, Any]) -> list[_Step]:
    """The tokens of a response, in either of the two forms that servers use.

    Raises:
        One of ``_MALFORMED``: the response is of neither form.
    """
    logprobs = choice.get("logprobs") or {}
    if "content" in logprobs:
        rows = [
            [
                (entry["id"] if isinstance(entry.get("id"), int) else entry.get("token"), logprob)
                for entry in (*(row.get("top_logprobs") or ()), row)
                if (logprob := entry.get("logprob")) is not None
            ]
            for row in logprobs["content"] or ()
        ]
    else:
        parts = (logprobs.get(name) or () for name in ("tokens", "token_logprobs", "top_logprobs"))
        rows = [
            [*(top or {}).items(), *([(token, token_logprob)] if token_logprob is not None else [])]
            for token, token_logprob, top in zip(*parts, strict=False)
        ]
    steps = [
        {_token(token): float(value) for token, value in row if math.isfinite(float(value))}
        for row in rows
    ]
    if not all(steps) or any(value > _ROUNDING for row in steps for value in row.values()):
        raise ValueError("they are not numbers up to 0")
    # Greedy: what was chosen is what is likeliest. Some servers list their tokens in any order.
    return [_Step(max(row, key=row.__getitem__), row) for row in steps]


class OpenAIEngine:
    """A model behind ``URL`` (with or without ``/v1``; ``URL#MODEL`` where there are several).

    Args:
        url: the address.
        bundle: what it is asked.
        seconds: for each exchange as a whole, tries and waits between them included.
    """

    def __init__(self, url: str, bundle: Bundle, seconds: float = SECONDS):
        self.bundle = bundle
        self.quantized: bool | None = None
        self.missing = {"peak memory": "a server does not say"}
        address = parse_address(url)
        self._root, self._seconds = address.root, seconds
        local = _is_loopback(address.host)
        self._open_url = functools.partial(open_url, through_proxy=not local)
        self._headers = {"Content-Type": "application/json"}
        self._key = os.environ.get("OPENAI_API_KEY") or ""
        if self._key:
            if address.scheme == "https" or local:
                self._headers["Authorization"] = f"Bearer {self._key}"
            else:
                self.missing["API key"] = "OPENAI_API_KEY is not sent over plain http"
        self._model = address.model or self._only_model()
        self.about = self._plainly(f"{self._root}, {self._model or 'its own model'}")
        self._answered: dict[tuple[str, int], tuple[list[_Step], int | None]] = {}
        self._plain: dict[str, Any] = {}
        self._by_ids, self._dialect = self._probe()
        self._tokenizer = self._can_tokenise()

    # ------------------------------------------------------------------------------------ requests

    def _plainly(self, text: object) -> str:
        """A server's words as they may be shown: one line, no control characters, no key."""
        plain = str(text).replace(self._key, "***") if self._key else str(text)
        return strip_control_chars(" ".join(plain.split()))[:_LONGEST_WORDS]

    @contextlib.contextmanager
    def _open(self, path: str, body: Any) -> Iterator[Any]:
        """A response under way.

        Raises:
            Unusable: the server refuses, or says too much.
            UserError: it cannot be reached, redirects, breaks off, or is not done in time; after
                three tries where trying again may help.
        """
        data = None if body is None else json.dumps(body).encode()
        where = self._root + path
        budget = Budget(where, self._seconds, _LARGEST)
        try:
            response = self._answered_by(where, data, budget)
            with response:
                yield response
        except TimeoutError as error:
            raise UserError(
                f"{where}: the server was not done within {self._seconds:g} seconds; is it busy, "
                "or another kind of server?"
            ) from error
        except (http.client.HTTPException, OSError) as error:
            raise UserError(f"{where}: the response broke off ({self._plainly(error)})") from error

    def _answered_by(self, where: str, data: bytes | None, budget: Budget) -> Any:
        """The response to the first try that gets one."""
        for wait in (*_PATIENCE, None):
            request = urllib.request.Request(where, data, self._headers)
            try:
                return self._open_url(request, budget)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code not in _BUSY or wait is None:
                        raise self._refusal(where, error) from error
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                reason = getattr(error, "reason", error)
                budget.left()  # raises where it is this exchange's time that is up
                if wait is None or isinstance(reason, ConnectionRefusedError | TimeoutError):
                    raise UserError(
                        f"{where}: the server cannot be reached ({self._plainly(reason)}); is it "
                        "running there?"
                    ) from error
            except ValueError as error:
                raise UserError(
                    f"{where}: no request can be made of this address, or of what "
                    f"OPENAI_API_KEY holds ({self._plainly(error)})"
                ) from error
            time.sleep(min(wait, budget.left()))
        raise AssertionError("the last try returns or raises")

    def _refusal(self, where: str, error: urllib.error.HTTPError) -> UserError:
        """What a server says when it says no."""
        if 300 <= error.code < 400:
            away = without_secrets(str(error.headers.get("Location")))[:_LONGEST_WORDS]
            return UserError(f"{where} redirects to {away}; name that server if you mean it")
        body = error.read(2000).decode(errors="replace")
        with contextlib.suppress(*_MALFORMED):
            inner = json.loads(body)
            detail = inner.get("error", inner.get("message", body))
            body = str(detail["message"] if isinstance(detail, dict) else detail)
        plain = self._plainly(body) or self._plainly(error.reason)
        return Unusable(f"{where} answers {error.code}: {plain}")

    def _json(self, path: str, body: Any) -> dict[str, Any]:
        try:
            with self._open(path, body) as response:
                # Without a number, as much would be allocated as the server says will come.
                value = json.loads(response.read(_LARGEST))
        except (ValueError, RecursionError) as error:
            raise Unusable(f"{self._root}{path}: the response is not JSON") from error
        if not isinstance(value, dict):
            raise Unusable(f"{self._root}{path}: the response is not a JSON object")
        return value

    def _only_model(self) -> str | None:
        try:
            rows = self._json("/v1/models", None).get("data") or []
            names = [str(row["id"]) for row in rows]
        except Unusable:
            # Some servers have one model and no list.
            return None
        except _MALFORMED as error:
            raise UserError(f"{self._root}/v1/models: the list is not OpenAI's") from error
        if len(names) > 1:
            some = self._plainly(", ".join(names[:8]))
            raise UserError(f"{self._root} serves {some}: name one as openai:URL#MODEL")
        return names[0] if names else None

    def _body(self, prompt: Any, most: int, **more: Any) -> dict[str, Any]:
        model = {"model": self._model} if self._model else {}
        greedy = {"temperature": 0, "top_p": 1.0, "frequency_penalty": 0, "presence_penalty": 0}
        return model | {"prompt": prompt, "max_tokens": most} | greedy | self._plain | more

    def _complete(self, prompt: Any, most: int, **more: Any) -> tuple[dict[str, Any], int | None]:
        """The first choice, and how many tokens the server took the prompt for."""
        response = self._json("/v1/completions", self._body(prompt, most, **more))
        try:
            choice = response["choices"][0]
            counted = (response.get("usage") or {}).get("prompt_tokens")
            return {"text": choice["text"], "logprobs": choice.get("logprobs")}, counted
        except _MALFORMED as error:
            raise Unusable(f"{self._root}: the completion is not of OpenAI's form") from error

    def _probe(self) -> tuple[bool, dict[str, Any]]:
        """Whether ids are taken as a prompt, and how log-probabilities are asked for."""
        prompt = self.bundle.prompts[0]
        failure: UserError | None = None
        for self._plain, by_ids, dialect in itertools.product(
            (_PLAIN, {}), (True, False), _DIALECTS
        ):
            try:
                request = list(prompt.tokens[:_PROBE]) if by_ids else prompt.text
                choice, counted = self._complete(request, 1, **dialect)
                if (by_ids and counted not in (len(request), None)) or (
                    dialect and not _steps(choice)
                ):
                    continue
            except Unusable as error:
                failure = error
            except _MALFORMED:
                continue
            else:
                if not dialect:
                    self.missing["KL"] = "the server gives no log-probabilities"
                if not by_ids:
                    self.missing["after a divergence"] = "the server takes no token ids"
                if not self._plain:
                    self.missing["plain sampling"] = "the server may apply penalties of its own"
                return by_ids, dialect
        raise failure or UserError(f"{self._root}: the completions cannot be read")

    def _prompt(self, prompt: Prompt, forced: int) -> Any:
        return [*prompt.tokens, *prompt.greedy[:forced]] if self._by_ids else prompt.text

    # -------------------------------------------------------------------------------- the protocol

    def _tokenise(self, text: str) -> tuple[int, ...] | None:
        """What ``/tokenize`` of vLLM, SGLang or llama-server says."""
        request = {"prompt": text, "content": text, "add_special_tokens": False}
        request |= {"add_special": False, "parse_special": True}
        model = {"model": self._model} if self._model else {}
        try:
            return tuple(int(token) for token in self._json("/tokenize", model | request)["tokens"])
        except (Unusable, *_MALFORMED):
            return None

    def _can_tokenise(self) -> bool:
        return self._tokenise("1") is not None

    def count(self, prompt: Prompt) -> tuple[bool | None, str]:
        """As the protocol says; where the server has no ``/tokenize``, tokens are only counted."""
        if self._tokenizer:
            return self._tokenise(prompt.text) == prompt.tokens, "ids"
        if self._by_ids:
            _, counted = self._complete(prompt.text, 1)
        else:
            counted = self._steps_after(prompt, 0)[1]
        return (None if counted is None else counted == len(prompt.tokens)), "counts"

    def _steps_after(self, prompt: Prompt, forced: int) -> tuple[list[_Step], int | None]:
        key = prompt.text, forced
        if key not in self._answered:
            most = len(prompt.greedy) - forced
            choice, counted = self._complete(self._prompt(prompt, forced), most, **self._dialect)
            try:
                steps = _steps(choice) if self._dialect else self._as_text(prompt, choice["text"])
            except _MALFORMED as error:
                raise UserError(
                    f"{self._root}: its log-probabilities cannot be read ({self._plainly(error)})"
                ) from error
            self._answered[key] = steps[:most], counted
        return self._answered[key]

    def _as_text(self, prompt: Prompt, text: str) -> list[_Step]:
        """The reference's tokens as far as a text is theirs, and then one that is none."""
        written = "".join(text.split())
        steps: list[_Step] = []
        read = ""
        for token in prompt.greedy:
            read += "".join(self.bundle.pieces.get(token, "").split())
            if token not in self.bundle.eos and not written.startswith(read):
                return [*steps, _Step("", {})]
            steps.append(_Step(token, {}))
        return steps

    def score_continuation(self, prompt: Prompt) -> Continuation:
        """As the protocol says; of the prompt itself nothing is read.

        Raises:
            UserError: the server fails.
        """
        timing = self._timed(prompt) if prompt.role == TIMED_ROLE else None
        pieces = self.bundle.pieces
        length, forced, agreed, whole = len(prompt.greedy), 0, 0, True
        rows, top, logprobs, following = [], [], [], []
        for _ in range(_MAX_REQUESTS):
            steps, _ = self._steps_after(prompt, forced)
            # A server that ends the turn may leave the end token out.
            ended = len(steps) < length - forced
            for step in [*steps, *([_Step(-1, {})] if ended else [])]:
                row, wanted = len(prompt.tokens) - 1 + forced - prompt.begin, prompt.greedy[forced]
                unseen = step.chosen == -1 and wanted in self.bundle.eos
                same = unseen or step.chosen in (wanted, pieces[wanted])
                rows.append(row)
                # The reference's own likeliest; its continuation may be a tie away from it.
                best = int(prompt.top_ids[row, 0])
                top.append(unseen or step.chosen in (best, pieces[best]))
                logprobs.append(self._known(step, prompt.top_ids[row].tolist()))
                following.append(self._known(step, [wanted])[0])
                forced += 1
                if not same:
                    whole = False
                    break
                agreed += whole
            if forced == length or not self._by_ids:
                break
        return Continuation(
            agreed=agreed,
            rows=np.array(rows, np.int64),
            logprobs=np.array(logprobs, np.float64).reshape(len(rows), -1),
            top=np.array(top, np.bool_),
            next_logprobs=np.array(following, np.float64),
            timing=timing,
        )

    def _known(self, step: _Step, ids: Sequence[int]) -> list[float]:
        """Log-probabilities of tokens; NaN where not said, or where two tokens look the same."""
        texts = [self.bundle.pieces.get(token, "") for token in ids]
        return [
            step.logprobs.get(token, step.logprobs.get(text, math.nan))
            if text and texts.count(text) == 1
            else step.logprobs.get(token, math.nan)
            for token, text in zip(ids, texts, strict=True)
        ]

    def _timed(self, prompt: Prompt) -> Timing | None:
        """A streamed continuation's times; ``None`` where the server does not stream."""
        request = self._body(
            self._prompt(prompt, 0),
            len(prompt.greedy),
            stream=True,
            stream_options={"include_usage": True},
        )
        begin = time.perf_counter()
        first = last = 0.0
        chunks, counted = 0, None
        try:
            with self._open("/v1/completions", request) as response:
                for line in response:
                    if not line.startswith(b"data:") or b"[DONE]" in line:
                        continue
                    chunk = json.loads(line[5:])
                    if (chunk.get("usage") or {}).get("completion_tokens"):
                        counted = int(chunk["usage"]["completion_tokens"])
                    if any(choice.get("text") for choice in chunk.get("choices") or ()):
                        last = time.perf_counter()
                        first = first or last
                        chunks += 1
        except (Unusable, *_MALFORMED):
            chunks = 0
        if not chunks:
            self.missing["speed"] = "the server does not stream"
            return None
        return Timing(len(prompt.tokens), first - begin, last - first, counted or chunks)

    def answer(self, text: str, most: int) -> str:
        """As the protocol says."""
        tokens = self._tokenise(text) if self._by_ids and self._tokenizer else None
        return str(self._complete(list(tokens) if tokens else text, most)[0]["text"]).strip()

    def peak_memory(self) -> int | None:
        """Unknown."""
        return None
