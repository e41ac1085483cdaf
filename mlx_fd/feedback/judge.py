"""The distilled student in use: scores and criticisms of answers."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_fd import runs
from mlx_fd.config import Config, read
from mlx_fd.errors import UserError
from mlx_fd.feedback.asking import derive_seed
from mlx_fd.feedback.criticism import criticisms, feedback_request, head_score, parsed
from mlx_fd.feedback.exported import head_beside, kind_of_answers, scoring
from mlx_fd.models import fingerprint
from mlx_fd.models.backend import backend
from mlx_fd.models.chat_template import ChatTemplate, fitted
from mlx_fd.models.context import Surroundings, context_length, too_long
from mlx_fd.models.conversation import Conversation, prefill, without_repeated_eos
from mlx_fd.models.directory import ADAPTER_CONFIG, blaming
from mlx_fd.models.generation import replied, said
from mlx_fd.models.loading import Loaded, check_can_think, load, with_thinking
from mlx_fd.models.resolve import resolve, why_changed
from mlx_fd.models.score_head import ScoreHead
from mlx_fd.models.storage import read_json
from mlx_fd.models.student import (
    ADAPTER_WEIGHTS,
    HEADS,
    MADE_WITH,
    Student,
    load_student,
    make_student,
    projection_width,
    read_trained,
)
from mlx_fd.models.thinking import NOT_THINKING, ThinkingOptions, switched
from mlx_fd.models.tokenizer import open_template, template_beside
from mlx_fd.models.writing import GenerateOptions, Sampling
from mlx_fd.problems.kinds import KINDS
from mlx_fd.problems.prompts import answer_prompt, feedback_prompt
from mlx_fd.runs.checked import content_digest
from mlx_fd.runs.checkpoints import check_weights
from mlx_fd.runs.manifest import trained_template
from mlx_fd.runs.records.manifest import Manifest


@dataclass(frozen=True)
class ModelRef:
    """Where a model that can be used is.

    Attributes:
        model: directory of the language model; a student's base.
        checkpoint: the student's checkpoint, ``None`` for a plain model.
        run: the run directory it belongs to.
        config: the run's configuration.
        adapter: an mlx-lm adapter of the model that belongs to no run.
        template: how chats are written for it; ``None``: as its directory says.
        thinking: whether it thinks before its feedback.
        answer_kind: of the answers that it was trained to judge.
        manifest: the run's.
        head: the score head beside an exported model, or adapter.
    """

    model: Path
    checkpoint: Path | None = None
    run: Path | None = None
    config: Config | None = None
    adapter: Path | None = None
    template: ChatTemplate | None = None
    thinking: ThinkingOptions = NOT_THINKING
    answer_kind: str = "number"
    manifest: Manifest | None = field(default=None, repr=False, compare=False)
    head: ScoreHead | None = field(default=None, repr=False)

    @property
    def scores(self) -> bool:
        """Whether a score head was trained: in the loop, if one of its losses teaches it."""
        if self.config is None or self.config.self_distils:
            # Behind a thought it would read what it has not learned on.
            return self.head is not None and not self.thinking.on
        return self.config.losses.trains_head

    @property
    def repetition_penalty(self) -> float:
        """That of its run's student; 1 for a model of no run."""
        if self.config is None:
            return 1.0 if self.head is None else self.head.repetition_penalty
        return self.config.generation.student_repetition_penalty

    @property
    def feedback_tokens(self) -> int | None:
        """The most tokens of a feedback in its run; ``None``: nothing says that."""
        if self.config is None:
            return None if self.head is None else self.head.max_tokens
        return self.config.generation.max_feedback_tokens

    @property
    def chat(self) -> ChatTemplate | None:
        """:attr:`template`, told whether the model thinks."""
        return None if self.template is None else switched(self.template, self.thinking.on)

    @property
    def adapter_folder(self) -> Path | None:
        """The folder of its adapter: a checkpoint, or an adapter of no run."""
        return self.checkpoint or self.adapter


def _checkpoint(name: str) -> Path | None:
    """The checkpoint folder that ``name`` means, or ``None`` where it is no run's."""
    folder = Path(name).expanduser()
    if runs.is_run(folder):
        folder = folder / runs.CHECKPOINTS / "best"
        if not folder.exists():
            raise UserError(
                f"{name}: this run has no checkpoint yet; mlx-fd resume {shlex.quote(name)}"
            )
    return folder if (folder / ADAPTER_WEIGHTS).is_file() else None


def adapter_base(adapter: Path) -> str:
    """The name of the model that an mlx-lm adapter belongs to, from its ``adapter_config.json``.

    Raises:
        UserError: it does not say.
    """
    name = read_json(adapter / ADAPTER_CONFIG).get("model")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{adapter / ADAPTER_CONFIG}: does not say which model this adapter belongs to; write "
            'its name or directory there, as "model"'
        )
    return name


def _locate_adapter(name: str, adapter: Path) -> ModelRef:
    """A model with an adapter on it; ``name`` is empty where the adapter says which model."""
    adapter = adapter.expanduser()
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"--adapter-path {adapter}: there is no {ADAPTER_WEIGHTS}; give the directory of an "
            "mlx-lm adapter, or a checkpoint of a run"
        )
    folder = adapter.resolve()
    if not runs.is_run(folder.parents[1]):
        base = resolve(name or adapter_base(folder))
        return _with_head_beside(
            ModelRef(base, adapter=folder, template=template_beside(folder, base)), folder
        )
    ref = _locate(str(folder))
    if name and resolve(name) != ref.model:
        raise UserError(
            f"--adapter-path {adapter}: this is a checkpoint of a run whose student is {ref.model}"
            f", not {name}; leave the model out"
        )
    return ref


def locate_model(
    name: str,
    adapter: Path | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> ModelRef:
    """A model or a student by its name, not loaded yet.

    A run's student comes with the chat template that it was trained with.

    Args:
        name: a run directory (its best checkpoint), one of its checkpoints, or a model's name.
        adapter: an mlx-lm adapter to put on the model ``name``; on the model that the adapter
            itself names where ``name`` is empty.
        template_kwargs: further variables of the chat template, beside the run's.

    Raises:
        UserError: nothing of that name, a checkpoint outside its run or with other weights than
            the run wrote, or another base model than the one that was trained.
    """
    ref = _locate(name) if adapter is None else _locate_adapter(name, adapter)
    if not template_kwargs:
        return ref
    if ref.template is None:
        template = open_template(ref.model, template_kwargs)
    else:
        template = fitted(ref.template.with_kwargs(**template_kwargs))
    return dataclasses.replace(ref, template=template)


def _locate(name: str) -> ModelRef:
    checkpoint = _checkpoint(name)
    if checkpoint is None:
        model = resolve(name)
        return _with_head_beside(ModelRef(model), model)
    checkpoint = checkpoint.resolve()
    folder = checkpoint.parents[1]
    if not runs.is_run(folder):
        raise UserError(
            f"{name}: this checkpoint is outside its run, which says what it belongs to; name a "
            f"checkpoint within a run directory (RUN/{runs.CHECKPOINTS}/NNNNNN)"
        )
    check_weights(checkpoint, (ADAPTER_WEIGHTS, HEADS))
    # First: options of another version are none of this one's.
    manifest = runs.read_manifest(folder)
    config = read(folder / runs.CONFIG)
    path = resolve(config.models.student)
    if not fingerprint.is_same(manifest.get("student", {}), path):
        why = why_changed(config.models.student, manifest.get("versions", {}))
        raise UserError(
            f"{name}: the student's base model {path} is not the one that was trained: {why}."
        )
    template = trained_template(manifest, config, folder)
    kind = manifest["problems"].get("kind", "number")
    if kind not in KINDS:
        raise UserError(
            f"{folder}: its answers are of the kind {kind!r}, which this mlx-fd does not have; it "
            "has " + ", ".join(KINDS)
        )
    return ModelRef(
        path,
        checkpoint,
        folder,
        config,
        template=template,
        thinking=student_thinking(config),
        answer_kind=kind,
        manifest=manifest,
    )


def _with_head_beside(ref: ModelRef, folder: Path) -> ModelRef:
    """With the score head in an export's folder, and what the template was given as it learned."""
    head, template = head_beside(folder), ref.template
    if head is not None and (day := head.about.get("date")):
        template = dataclasses.replace(template or open_template(ref.model), date=day)
    if head is not None and (given := head.template_kwargs):
        template = fitted((template or open_template(ref.model)).with_kwargs(**given))
    return dataclasses.replace(ref, template=template, head=head)


def student_thinking(config: Config) -> ThinkingOptions:
    """Whether a run's student thinks."""
    options = config.generation
    return ThinkingOptions(options.student_thinking == "on", options.max_thinking_tokens)


@dataclass(frozen=True)
class Judgement:
    """What a judge makes of an answer.

    Attributes:
        text: its criticism; of one whose score could not be read, all that was written.
        written_score: the score in that text, in [-1, 1]; ``None`` where none could be read.
        head_score: its score head's, in (-1, 1); ``None`` for a judge without a trained one.
        finished: whether it ended the text itself (else the token limit did).
        thought: what it thought before; empty: nothing.
    """

    text: str
    written_score: float | None
    head_score: float | None
    finished: bool
    thought: str = ""


@dataclass(frozen=True)
class Judge:
    """A student (or any model) in memory, ready to judge answers.

    Attributes:
        ref: where it came from.
        student_lm: the language model with its tokenizer.
        student: the student around it; ``None`` for a plain model.
        left_out: a sentence on why a score head that is beside it is not used; empty: none is.
    """

    ref: ModelRef
    student_lm: Loaded
    student: Student | None
    left_out: str = ""

    def judge(
        self,
        answers: Iterable[tuple[str, str]],
        *,
        max_tokens: int = 192,
        batch_size: int = 8,
        temperature: float = 0.0,
        first: int = 0,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Judgement]:
        """Judge answers to problems, several at a time.

        The judge reads each problem and answer as it did in its run. At temperature 0 a judgement
        does not depend on the others of its batch (but for the rounding of
        sums of another shape).

        Args:
            answers: (problem, answer) of each.
            max_tokens: most tokens of a criticism.
            batch_size: criticisms that are written side by side.
            temperature: of the sampling; at 0, the default, the likeliest tokens are written.
            first: place of the first answer among all that are judged; each batch draws by its
                own.
            on_token: called with the number of tokens written in each step, for progress.

        Returns:
            One judgement for each answer, in order.

        Raises:
            UserError: a problem or an answer is empty, is not UTF-8 text, or is too long for the
                model; or a limit is below 1, or the temperature below 0.
        """
        pairs = list(answers)
        for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature must be a number from 0 on, not {temperature}")
        for index, pair in enumerate(pairs):
            for name, text in zip(("problem", "answer"), pair, strict=True):
                if not text.strip():
                    raise UserError(f"answer {index} to judge: its {name} is empty")
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise UserError(
                        f"answer {index} to judge: its {name} is not UTF-8 text (at character "
                        f"{error.start})"
                    ) from None
        check_lengths(self.ref.model, pairs, max_tokens + self.ref.thinking.tokens)
        judgements: list[Judgement] = []
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            seed = derive_seed(0, first + start, "judge")
            sampling = Sampling(max_tokens, temperature, self.ref.repetition_penalty, seed)
            judgements += self._judge_batch(batch, sampling, on_token)
        return judgements

    def requests(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, ...]]:
        """All tokens before the feedback on each (problem, answer), as in the judge's training."""
        loaded = self.student_lm
        request, form = feedback_request(loaded), KINDS[self.ref.answer_kind].form
        return [
            (
                *said(
                    loaded,
                    answer_prompt(problem.strip(), form),
                    loaded.tokenizer.encode(answer.strip(), add_special_tokens=False),
                ),
                *request,
            )
            for problem, answer in pairs
        ]

    def own_request(self, prompt: Sequence[int], reply: Sequence[int]) -> tuple[int, ...]:
        """All tokens before the feedback on an answer that the judge has just given itself.

        Args:
            prompt: all tokens before the answer.
            reply: the answer's, without any thought.
        """
        said = Conversation(replied(self.student_lm, prompt, reply))
        request = feedback_request(self.student_lm)
        return (*said.tokens, *without_repeated_eos(said, request))

    def scores(self, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[float]:
        """The score head's scores after each prompt, in (-1, 1), of a judge with a trained one.

        No feedback is written where the head reads before it.

        Args:
            prompts: as :meth:`requests` and :meth:`own_request` give them.
            max_tokens: most tokens of a criticism.
        """
        student, loaded = self.student, self.student_lm
        assert student is not None
        if student.score_at == "prompt" and not self.ref.thinking.on:
            states = (prefill(loaded, Conversation(), prompt)[0] for prompt in prompts)
            return [float(student.score(hidden)) for hidden in states]
        sampling = Sampling(max_tokens, repetition_penalty=self.ref.repetition_penalty)
        written = criticisms(loaded, prompts, sampling, GenerateOptions())
        return [head_score(student, loaded, one) for one in written]

    def _judge_batch(
        self,
        pairs: Sequence[tuple[str, str]],
        sampling: Sampling,
        on_token: Callable[[int], None] | None,
    ) -> list[Judgement]:
        loaded = self.student_lm
        options = GenerateOptions(on_token=on_token)
        judgements = []
        for one in criticisms(loaded, self.requests(pairs), sampling, options):
            read, score = parsed(one.turn), None
            if self.student is not None and self.ref.scores:
                score = head_score(self.student, loaded, one)
            judgements.append(
                Judgement(read.text, read.written_score, score, one.turn.finished, one.turn.thought)
            )
        return judgements


def check_lengths(
    model: Path,
    answers: Sequence[tuple[str, str]],
    max_tokens: int,
    option: str = "max_tokens",
    name: str = "answer",
) -> None:
    """Make sure that a model can read problems and answers, and write of each; nothing is loaded.

    A model that reads beyond its context writes nonsense.

    Args:
        model: its directory.
        answers: (problem, answer) of each, UTF-8 text.
        max_tokens: most tokens of a criticism.
        option: what the user knows ``max_tokens`` as.
        name: what one of several answers is called in the message, before its index.

    Raises:
        UserError: a problem with its answer is too long; the message says which.
    """
    texts = [f"{problem.strip()}\n{answer.strip()}" for problem, answer in answers]
    prompts = answer_prompt("") + feedback_prompt()
    for index, count in too_long(texts, model, Surroundings(prompts, max_tokens, option)).items():
        where = f"{name} {index}: " if len(texts) > 1 else ""
        raise UserError(
            f"{where}problem and answer have {count} tokens, and with up to {max_tokens} tokens of "
            f"feedback do not fit into the {context_length(model)} of {model}; shorten them, or "
            f"take a smaller {option}"
        )


def adapter_hash(folder: Path, run: Config) -> str:
    """A digest of all that an adapter changes about its model, and of the heads beside it.

    Args:
        folder: the adapter's, a checkpoint for instance.
        run: the configuration of its run; the defaults where it is of none.
    """
    files = [folder / part for part in (ADAPTER_WEIGHTS, HEADS) if (folder / part).exists()]
    config = read_json(folder / ADAPTER_CONFIG)
    config.pop("model", None)
    # A run's student is made as the run's configuration has it, whatever the adapter's says.
    made = {name: getattr(run.models, name) for name in MADE_WITH}
    return content_digest([config, made, *map(fingerprint.file_hash, files)])


def open_student(
    name: str | Path | ModelRef, *, thinking: bool | None = None, max_thinking_tokens: int = 1024
) -> Judge:
    """Load a model to give feedback with.

    Args:
        name: a run directory (its best checkpoint), one of its checkpoints, or a model's name; or
            what :func:`locate_model` made of it. An exported student scores, too.
        thinking: whether it thinks before its feedback; ``None``: as in its run; a model of no run
            does not.
        max_thinking_tokens: the most tokens of a thought, where ``thinking`` is given.

    Raises:
        UserError: nothing of that name; files are missing or damaged, or do not belong together;
            or it shall think, and cannot.
    """
    backend()
    ref = name if isinstance(name, ModelRef) else locate_model(str(name))
    if thinking is not None:
        ref = dataclasses.replace(ref, thinking=ThinkingOptions(thinking, max_thinking_tokens))
    if ref.thinking.on:
        check_can_think(ref.model, ref.template or open_template(ref.model))
    if ref.adapter is not None:
        loaded = _told(load(ref.model, template=ref.template), ref)
        return with_head(ref, _with_adapter(loaded, ref.adapter))
    if ref.checkpoint is None or ref.config is None:
        return with_head(ref, _told(load(ref.model, template=ref.template), ref))
    options = ref.config.models
    loaded = _told(load(ref.model, dequantize=options.dequantize, template=ref.template), ref)
    # The projection is not used here, but load_student wants its place: as wide as it was.
    width = projection_width(ref.checkpoint)
    student = make_student(loaded.view, width, options, ref.config.episode.seed)
    load_student(student, ref.checkpoint)
    student.eval()
    return Judge(ref, dataclasses.replace(loaded, model=student.model), student)


def with_head(ref: ModelRef, loaded: Loaded) -> Judge:
    """A model of no run in memory, with the score head that is beside it.

    Raises:
        UserError: the head is another model's.
    """
    head = ref.head if ref.scores else None
    if head is None:
        return Judge(dataclasses.replace(ref, head=None), loaded, None)
    kind = kind_of_answers(head, loaded)
    if kind is None:
        why = (
            f"{ref.adapter or ref.model}: its score head learned on other prompts than this chat "
            "template writes, and is left out; there is the written score alone"
        )
        return Judge(dataclasses.replace(ref, head=None), loaded, None, why)
    return Judge(dataclasses.replace(ref, answer_kind=kind), loaded, scoring(head, loaded))


def _told(loaded: Loaded, ref: ModelRef) -> Loaded:
    """A model that thinks, or does not."""
    return with_thinking(loaded, on=ref.thinking.on, limit=ref.thinking.limit)


def _with_adapter(loaded: Loaded, adapter: Path) -> Loaded:
    """A model with an mlx-lm adapter on it."""
    from mlx_lm.tuner.utils import load_adapters

    read_trained(adapter / ADAPTER_WEIGHTS)  # is it whole, and are its numbers finite?
    with blaming(f"{adapter}: this adapter does not fit its model"):
        model = load_adapters(loaded.model, str(adapter))
    model.eval()
    return dataclasses.replace(loaded, model=model)


def give_feedback(
    student: Judge | str | Path,
    problem: str,
    answer: str,
    max_tokens: int = 192,
    temperature: float = 0.0,
) -> Judgement:
    """Judge one answer to a problem; :meth:`Judge.judge` takes many.

    Args:
        student: what :func:`open_student` gave, or what it takes; then it is loaded for this alone.
        problem: the problem's text.
        answer: the answer's text.
        max_tokens: maximum tokens of the feedback.
        temperature: of the sampling; 0 is greedy.

    Raises:
        UserError: as :func:`open_student` and :meth:`Judge.judge`.
    """
    judge = student if isinstance(student, Judge) else open_student(student)
    return judge.judge([(problem, answer)], max_tokens=max_tokens, temperature=temperature)[0]
