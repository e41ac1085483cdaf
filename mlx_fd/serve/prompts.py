"""What the models read of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlx_fd.errors import UserError
from mlx_fd.feedback.criticism import feedback_request
from mlx_fd.models.generation import messages_prompt
from mlx_fd.models.thinking import Thinking
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.serve.errors import ApiError, bad
from mlx_fd.serve.limits import Limits
from mlx_fd.serve.models import CASCADE, EXPERT, STUDENT, Served
from mlx_fd.serve.schema import ChatRequest, CompletionRequest
from mlx_fd.serve.speaking import thinking_tokens
from mlx_fd.serve.switching import switched


@dataclass(frozen=True)
class Asked:
    """A request in tokens.

    Attributes:
        prompts: all tokens before the reply, of each model that may be asked.
        problem: whether the question was put in the form of the student's training.
        thinking: in a chat, how each of them thinks before it replies; ``None``: it cannot.
        thinks_otherwise: whether one thinks otherwise than the server has it.
    """

    prompts: dict[str, tuple[int, ...]]
    problem: bool = False
    thinking: Mapping[str, Thinking | None] = field(default_factory=dict)
    thinks_otherwise: bool = False

    @property
    def chat(self) -> bool:
        """Whether it is a chat, in which a model may think before it replies."""
        return bool(self.thinking)


def who_may_answer(served: Served, model: str) -> tuple[str, ...]:
    """The models behind a name.

    Raises:
        ApiError: there is none of that name.
    """
    if model not in served.names:
        raise ApiError(
            404,
            f"The model '{model:.64}' does not exist here; there are {', '.join(served.names)}.",
            code="model_not_found",
            param="model",
        )
    if model != CASCADE:
        return (model,)
    return (STUDENT, EXPERT) if served.expert is not None else (STUDENT,)


def ask_chat(
    served: Served, request: ChatRequest, limits: Limits, *, verbatim: bool, judges: bool
) -> Asked:
    """A chat in tokens.

    A student was trained on problems that are asked for in one form ("Solve step by step ..."). So
    a chat of a single question is put in that form, unless it is to be taken verbatim.

    Args:
        served: the models.
        request: what was asked.
        limits: of the server.
        verbatim: what holds where the request does not say.
        judges: whether in a cascade the student's score head reads its answer.

    Raises:
        ApiError: the models cannot read it.
    """
    models, messages = who_may_answer(served, request.common.model), request.messages
    as_it_is = verbatim if request.verbatim is None else request.verbatim
    problem = served.form is not None and not as_it_is and len(messages) == 1
    if problem and served.form is not None:
        [(role, text)] = messages
        end = served.form.end
        if not end or not text.rstrip().endswith(end):
            messages = ((role, answer_prompt(text, served.form)),)
    prompts, thinking, otherwise = {}, dict[str, Thinking | None](), False
    for who in models:
        usual = served.model(who)
        loaded = switched(usual, who, request.switch)
        thinking[who], asked = loaded.thinking, (loaded.thinking, loaded.template)
        otherwise = otherwise or asked != (usual.thinking, usual.template)
        try:
            prompts[who] = messages_prompt(loaded, messages)
        except UserError as error:
            raise bad(str(error), "messages") from None
    written = request.common.sampling.max_tokens
    if request.common.model == CASCADE and judges:
        written += _judging(served)
    return _fitting(served, Asked(prompts, problem, thinking, otherwise), written, limits)


def _judging(served: Served) -> int:
    """Tokens after the student's answer, with which it judges that."""
    tokens = served.judge.ref.feedback_tokens
    assert tokens is not None  # known of all that have a score head
    return len(feedback_request(served.student)) + tokens


def ask_completion(served: Served, request: CompletionRequest, limits: Limits) -> Asked:
    """A text to be written on in tokens; errors as :func:`ask_chat`."""
    model = request.common.model
    who_may_answer(served, model)
    if model == CASCADE:
        raise bad(
            "The cascade judges answers in a chat: ask /v1/chat/completions, or name the model "
            "'student' or 'expert'.",
            "model",
        )
    tokens = tuple(served.model(model).tokenizer.encode(request.prompt))
    if not tokens:
        raise bad("'prompt' has no tokens.", "prompt")
    asked = Asked({model: tokens})
    return _fitting(served, asked, request.common.sampling.max_tokens, limits)


def ask_feedback(
    served: Served, items: tuple[tuple[str, str], ...], max_tokens: int, limits: Limits
) -> list[tuple[int, ...]]:
    """All tokens before the feedback on each (problem, answer); errors as :func:`ask_chat`."""
    found = served.judge.requests(items)
    for prompt in found:
        asked = Asked({STUDENT: prompt}, thinking={STUDENT: served.student.thinking})
        _fitting(served, asked, max_tokens, limits)
    return found


def _fitting(served: Served, asked: Asked, max_tokens: int, limits: Limits) -> Asked:
    """Refuse what is longer than a model reads, or than the server allows."""
    for who, prompt in asked.prompts.items():
        context = served.context[who]
        room = limits.prompt_tokens
        thought = thinking_tokens(asked.thinking.get(who))
        if context is not None:
            room = min(room, context - max_tokens - thought)
        if len(prompt) > room:
            of_thought = f" and {thought} of a thought" if thought else ""
            raise bad(
                f"The prompt has {len(prompt)} tokens, and with up to {max_tokens} tokens of reply"
                f"{of_thought} the {who} reads at most {max(room, 0)} here; shorten it, or take a "
                "smaller max_tokens.",
                "messages",
                code="context_length_exceeded",
            )
    return asked
