"""From a configuration to the models and problems of a run, with every check on the way.

What can fail fails here, before a long download or a loaded model: names, problems, tokenizers,
memory. Everything slow or large comes after everything that can be wrong.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd import problems as problem_sets
from mlx_fd import runs
from mlx_fd.config import Config, GenerationOptions, LossOptions, override, preset, read
from mlx_fd.config.fields import CONTINUOUS
from mlx_fd.errors import UserError
from mlx_fd.models import fingerprint, ranks
from mlx_fd.models.aliases import ALIASES
from mlx_fd.models.chat_template import ChatTemplate
from mlx_fd.models.resolve import default_student, parse_name, resolve
from mlx_fd.problems import Problem, ProblemSet, execution
from mlx_fd.problems.kinds import KINDS, are_graded
from mlx_fd.problems.sources import SOURCES
from mlx_fd.registry import CONTEXTS
from mlx_fd.runs.manifest import manifest_of
from mlx_fd.runs.records.manifest import Manifest
from mlx_fd.runs.unused import check_used

if TYPE_CHECKING:
    from mlx_fd.models.chat_template import ChatTemplate
    from mlx_fd.models.memory import Memory, Workload


@dataclass(frozen=True)
class Plan:
    """A run that passed every check; nothing large is loaded yet.

    Attributes:
        config: the configuration, with the student's name filled in.
        expert_path: the expert's directory.
        student_path: the student's directory.
        vocab: tokens the two share; 0: they have different tokenizers.
        template: how chats are written for both, and for the student ever after.
        probe: held-out problems.
        problems: the run's problems, in order.
        manifest: what ``manifest.json`` holds.
        notes: what the user should know of the pair.
        expert_template: how chats are written for the expert, where the tokenizers differ and
            ``template`` is the student's alone.
        memory: most bytes that the run needs; 0 where nobody has asked.
        warm_up: the problems of the warm-up, in order; empty: there is none.
        learned: digests of the questions that the student learned from in earlier runs.
    """

    config: Config
    expert_path: Path
    student_path: Path
    vocab: int
    template: ChatTemplate
    probe: tuple[Problem, ...]
    problems: tuple[Problem, ...]
    manifest: Manifest
    notes: tuple[str, ...]
    expert_template: ChatTemplate | None = None
    memory: int = 0
    warm_up: tuple[Problem, ...] = ()
    learned: frozenset[str] = frozenset()


def configuration(
    preset_name: str | None,
    file: Path | None,
    given: Mapping[str, Any],
    where: str,
    earlier: Config | None = None,
) -> Config:
    """Defaults, then the preset, then the file, then what was given.

    Args:
        preset_name: ``None``: no preset, but that of the embedded pair where it is named.
        file: a TOML file.
        given: option name to value; ``None`` where it was not given.
        where: named in errors as what gave the options.
        earlier: what stands in the place of the defaults; no model brings its preset then.

    Raises:
        UserError: an unknown preset or option, or a value that will not do.
    """
    changes = {name: value for name, value in given.items() if value is not None}
    if changes.get("allow_code_execution"):
        # Said here and now; what a file says of it allows nothing.
        execution.allow()

    def over(config: Config) -> Config:
        if file is not None:
            config = read(file, config)
        return override(config, changes, where)

    config = over(preset(preset_name, earlier) if preset_name else earlier or Config())
    expert = ALIASES.get(config.models.expert)
    if expert and expert.preset and not preset_name and earlier is None:
        # It knows no other problems than those of its preset.
        config = over(preset(expert.preset))
    check_used(config, changes, where)
    return config


def make_plan(config: Config) -> Plan:
    """Check everything a run needs.

    Raises:
        UserError: a name, file, pair of models or amount of memory that will not do.
    """
    config = with_absolute_names(config)
    _check_alone(config.generation)
    # Problems first: a model may be a download of hours.
    drawn = draw_problems(config)
    _check_gold(config, (*drawn.probe, *drawn.problems))
    gold = _gold_note(config, (*drawn.probe, *drawn.problems))
    expert_path = resolve(config.models.expert)
    student_path = resolve(config.models.student)

    fingerprint.prefetch(expert_path, student_path)

    from mlx_fd.models.loading import check_can_think
    from mlx_fd.models.pairing import check_pair
    from mlx_fd.models.speculative import check_draft

    options = config.models
    pairing = check_pair(
        expert_path,
        student_path,
        kwargs=options.chat_template_kwargs,
        date=options.template_date,
    )
    if not pairing.shared_vocab:
        _check_two_tokenizers(config)
    if config.generation.speculate:
        check_draft(expert_path, student_path)
    if config.generation.thought_tokens:  # both have the expert's tokens and template
        check_can_think(expert_path, pairing.template)
    drawn, notes = without_long(drawn, (expert_path, student_path), config)
    if config.losses.needs_attention:
        _check_attention(expert_path, student_path, config.losses)
    questions = [problem.question for problem in drawn.every]
    memory = check_run_memory(
        expert_path, student_path, questions, config, pairing.expert_template or pairing.template
    )
    vocab = pairing.shared_vocab
    return Plan(
        config=config,
        expert_path=expert_path,
        student_path=student_path,
        vocab=vocab,
        template=pairing.template,
        probe=drawn.probe,
        problems=drawn.problems,
        manifest=manifest_of(
            config, expert_path, student_path, drawn.source, vocab, pairing.template
        ),
        notes=(*pairing.warnings, *notes, *filter(None, (memory.note, gold))),
        expert_template=pairing.expert_template,
        memory=memory.total,
        warm_up=drawn.warm_up,
    )


@dataclass(frozen=True)
class Drawn:
    """The problems of a run.

    Attributes:
        source: all that could be read, from which they were drawn.
        probe: held-out problems.
        problems: the run's problems, in order.
        warm_up: the warm-up's, in order.
    """

    source: ProblemSet
    probe: tuple[Problem, ...]
    problems: tuple[Problem, ...]
    warm_up: tuple[Problem, ...] = ()

    @property
    def every(self) -> tuple[Problem, ...]:
        """All that the run reads."""
        return (*self.probe, *self.problems, *self.warm_up)


def draw_problems(config: Config) -> Drawn:
    """Read the problems that a configuration names, and draw the run's.

    Raises:
        UserError: they cannot be read, there are too few, or it is a test split.
    """
    options = config.problems
    problem_sets.check_split(options.split, options.train_on_test)
    source = problem_sets.load(
        options.problems,
        options.split,
        skip_bad_rows=options.skip_bad_rows,
        kind=options.answer_kind,
        columns=options.columns,
    )
    return Drawn(source, *_drawn_from(source, config))


def _drawn_from(
    source: ProblemSet, config: Config
) -> tuple[tuple[Problem, ...], tuple[Problem, ...], tuple[Problem, ...]]:
    episode = config.episode
    return problem_sets.probe_and_train(
        source,
        episode.probe_size,
        config.problems.episodes,
        episode.seed,
        episode.warm_up_problems,
    )


def without_long(
    drawn: Drawn, paths: Sequence[Path], config: Config, *, with_solutions: bool = False
) -> tuple[Drawn, tuple[str, ...]]:
    """The problems that every model can read, drawn again where some had to be left out.

    Args:
        drawn: of :func:`draw_problems`.
        paths: the models' directories.
        config: the most tokens of answers and feedback, and whether bad rows may be left out.
        with_solutions: a problem's solution is read with it.

    Returns:
        The problems, and what to tell the user of those that are left out.

    Raises:
        UserError: problems are too long, and not to be left out, or too few are left.
    """
    from mlx_fd.models.context import fitting

    source, skip = drawn.source, config.problems.skip_bad_rows
    used = source
    if not skip:
        used = dataclasses.replace(source, problems=drawn.every)
    fits, notes = fitting(used, paths, config, skip=skip, with_solutions=with_solutions)
    if notes:
        drawn = Drawn(source, *_drawn_from(fits, config))
    if source.problems[0].kind == "code":
        notes = (*notes, execution.isolation_note())
    return drawn, (*notes, *source.notes)


def with_absolute_names(config: Config) -> Config:
    """The configuration that means the same wherever and whenever it is read again.

    The default student is named, and files and directories of this machine get their whole path.
    """
    models, source = config.models, config.problems.problems
    if source not in SOURCES:  # they are meant, whatever lies in this folder
        source = _whole_path(source) or source
    student = models.student or _default_student(models.expert)
    losses = config.losses
    if losses.teacher_cache:
        folder = str(Path(losses.teacher_cache).expanduser().absolute())
        losses = dataclasses.replace(losses, teacher_cache=folder)
    return dataclasses.replace(
        config,
        models=dataclasses.replace(
            models,
            expert=absolute_model_name(models.expert) if models.expert else "",
            student=absolute_model_name(student),
            continue_from=_whole_path(models.continue_from) or models.continue_from,
        ),
        problems=dataclasses.replace(config.problems, problems=source),
        losses=losses,
    )


def _default_student(expert: str) -> str:
    base = parse_name(expert).base
    if base not in ALIASES and "/" not in base and _whole_path(base) is None:
        # There is no such model, and this says which one may have been meant.
        resolve(expert)
    return default_student(expert)


def absolute_model_name(name: str) -> str:
    """A model's name that means the same in any folder: the whole path of a directory."""
    parsed = parse_name(name)
    path = _whole_path(parsed.base)
    if path is None:
        return name
    return path if parsed.layers is None else f"{path}:layers={parsed.layers}"


def _whole_path(name: str) -> str | None:
    """The absolute path of something on this machine, ``None`` where there is no such thing."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name and path.exists() else None


def check_out(folder: Path) -> None:
    """Make sure that a run directory can be made, without making it.

    Raises:
        UserError: there is something in the folder, or it cannot be written.
    """
    runs.check_new(folder)
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder}: this link leads nowhere; choose another --out")
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{folder}: {there} is a file, not a folder; choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {there} cannot be written; choose another --out")


def _check_alone(options: GenerationOptions) -> None:
    """Make sure that nothing is asked for that texts written together do not have.

    Raises:
        UserError: something is.
    """
    if options.speculate and options.batching == CONTINUOUS:
        raise UserError(
            f"speculate = {options.speculate} is for texts that are written one by one, and "
            "batching = continuous writes several: use batching = lockstep"
        )
    if options.speculate and not options.sequential and options.batch_size > 1:
        raise UserError(
            f"speculate = {options.speculate} is for texts that are written one by one, and "
            f"batch_size is {options.batch_size}: add sequential, or set batch_size to 1"
        )


def _check_two_tokenizers(config: Config) -> None:
    """Make sure that nothing is asked for that compares two models token by token.

    Raises:
        UserError: something is.
    """
    losses, generation = config.losses, config.generation
    wanted = {
        "the attention loss": losses.needs_attention,
        "standardize_logits": losses.standardize_logits,
        "speculate": generation.speculate > 0,
        "expert_thinking": generation.expert_thinking == "on",
        "student_thinking": generation.student_thinking == "on",
        f"student_context = {losses.student_context}": losses.student_context != "none",
    }
    for what, is_wanted in wanted.items():
        if is_wanted:
            raise UserError(
                f"expert and student have different tokenizers, and {what} needs one: leave it "
                "out, or choose a student of the expert's family"
            )


def _check_gold(config: Config, problems: Sequence[Problem]) -> None:
    """Make sure that nothing asks for right answers where there are none.

    Raises:
        UserError: something does.
    """
    if are_graded(problems):
        return
    losses = config.losses
    wanted = {
        f"--losses {','.join(losses.losses)}": losses.on_solutions,
        f"--student-context {losses.student_context}": CONTEXTS[losses.student_context].needs_gold,
    }
    for what, is_wanted in wanted.items():
        if is_wanted:
            raise UserError(
                f"{config.problems.problems} has no right answers (kind none), and {what} learns "
                "from right ones only: leave it out, or choose problems with answers"
            )


def _gold_note(config: Config, problems: Sequence[Problem]) -> str:
    """What is not learned from right answers that one might think is."""
    losses, source = config.losses, config.problems.problems
    if losses.solutions and not are_graded(problems):
        return (
            f"{source} has no right answers (kind none): the student learns from feedback, and not "
            "from solutions"
        )
    if "answer" in losses.losses and any(problem.kind == "code" for problem in problems):
        return (
            f"answers to {source} are programs, without a line '#### ...': the loss answer has "
            "nothing to learn from them"
        )
    return ""


def _check_attention(expert: Path, student: Path, losses: LossOptions) -> None:
    """Make sure that the attention of two models can be compared; no weight is read."""
    from mlx_fd.models.attention_taps import only
    from mlx_fd.models.loading import open_lazily
    from mlx_fd.models.view import block_attention

    for path in (expert, student):
        blocks = list(enumerate(block_attention(open_lazily(path)[0])))
        for index, calls in blocks[-1:] if losses.hidden_layers == "last" else blocks:
            only(calls, f"block {index} of {path}")


def check_run_memory(
    expert: Path,
    student: Path,
    questions: Sequence[str],
    config: Config,
    template: ChatTemplate | None = None,
    *,
    learns: bool = True,
) -> Memory:
    """Make sure the run fits into memory, from the shapes of the models; no weight is read.

    Args:
        expert: the expert's directory.
        student: the student's.
        questions: all that the run will ask.
        config: the run's.
        template: how chats are written; ``None``: as most are.
        learns: whether the student is trained.

    Returns:
        The estimate.

    Raises:
        UserError: it does not fit, a model cannot be opened, or what trains cannot be put on it.
    """
    from mlx_fd.models.directory import blaming
    from mlx_fd.models.loading import open_as_loaded
    from mlx_fd.models.memory import check_memory
    from mlx_fd.models.outline import hidden_width
    from mlx_fd.models.student import prepare

    models = config.models
    sharded = models.shard_expert and ranks.processes() > 1
    opened, _ = open_as_loaded(expert, dequantize=models.dequantize, sharded=sharded)
    trained, settings = open_as_loaded(student, dequantize=models.dequantize)
    for path, model in ((expert, opened), (student, trained)):
        # What config.json has of a wrong kind may show only now.
        with blaming(f"the model in {path} cannot be loaded: it fails on a single token"):
            hidden_width(model)
    prepare(trained, models)
    source = (settings.get("mlx_fd") or {}).get("source")
    shared = not sharded and (student == expert or source == str(expert.resolve()))
    work = dataclasses.replace(workload(expert, questions, config, template), shared=shared)
    if not learns:
        work = dataclasses.replace(work, micro_batch=0)
    return check_memory(opened, trained, work)


def workload(
    expert: Path, questions: Sequence[str], config: Config, template: ChatTemplate | None = None
) -> Workload:
    """How much a run does at a time.

    Args:
        expert: the expert's directory, whose tokenizer counts.
        questions: all that the run will ask.
        config: the run's.
        template: how chats are written; ``None``: as most are.
    """
    from mlx_fd.models.context import TEMPLATE_TOKENS
    from mlx_fd.models.memory import Workload
    from mlx_fd.models.tokenizer_file import read_tokenizer
    from mlx_fd.problems import prompts

    tokenizer = read_tokenizer(expert)

    def tokens(messages: Sequence[str]) -> int:
        if template is not None:
            turns = [part for message in messages for part in (message, "x")][:-1]
            text, around = template.render(turns), 0
        else:
            text, around = "\n".join(messages), TEMPLATE_TOKENS * len(messages) // 2
        return len(tokenizer.encode(text, add_special_tokens=False).ids) + around

    nothing = prompts.Feedback("", None, ())
    said = [
        prompts.answer_prompt(max(questions, key=len)),
        prompts.feedback_prompt(),
        prompts.merge_prompt(nothing, nothing),
        prompts.revise_prompt(""),
        prompts.critique_prompt(),
        prompts.final_prompt(),
    ]
    both = tokens(said[:2])
    options, losses = config.generation, config.losses
    batch_size = min(options.batch_size, len(questions))
    # Of each episode its feedback, and its solution where those are learned from.
    samples = batch_size * (2 if losses.learns_solutions else 1)
    samples += batch_size if options.answers_by == "both" else 0
    kept = config.training.replay_size if config.training.replay else 0
    continuous, trusts = options.batching == CONTINUOUS, config.gate.max_disagreement > 0
    return Workload(
        batch_size=batch_size,
        micro_batch=min(config.training.micro_batch, samples),
        prompt_tokens=both + options.thought_tokens,
        later_tokens=tokens(said) - both,
        request_tokens=max(tokens([text]) for text in said[2:]),
        max_answer_tokens=options.max_answer_tokens,
        max_feedback_tokens=max(options.max_feedback_tokens, options.max_merge_tokens),
        solutions=losses.learns_solutions,
        attention=losses.needs_attention,
        head_by_head=losses.attention_heads == "aligned",
        grad_checkpoint=config.training.grad_checkpoint,
        remembered=min(kept, config.problems.episodes * samples // batch_size),
        # In continuous batching no more are written side by side than anything else.
        own_solutions=0 if continuous or not trusts else config.gate.own_solutions,
        question_tokens=tokens(said[:1]),
        overlaps=continuous and not config.learns_last,
    )


_EXAMPLES, _SHOWN = 3, 200


def sample_of_problems(source: str, problems: Sequence[Problem]) -> list[str]:
    """How problems of a file or a hub data set were read: their kind, and the first as they are.

    Returns:
        A line for each thing to say; none where the source has a name, and so cannot be mistaken.
    """
    if source in SOURCES or not problems:
        return []
    kind = KINDS[problems[0].kind]
    lines = [f"answers of {source}: {kind.help} ({kind.name})"]
    for problem in problems[:_EXAMPLES]:
        question = " ".join(problem.question.split())
        cut = f"{question[:_SHOWN]}..." if len(question) > _SHOWN else question
        lines.append(f"  {cut} -> {problem.answer}" if kind.graded else f"  {cut}")
    return lines
