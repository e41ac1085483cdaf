"""What is evaluated: a run's student, an adapter, or any model; and the expert beside it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mlx_fd import runs
from mlx_fd.config import Config, override, preset
from mlx_fd.errors import UserError
from mlx_fd.feedback.gate import GateState
from mlx_fd.feedback.judge import adapter_hash, locate_model
from mlx_fd.feedback.pair import open_pair
from mlx_fd.models import fingerprint
from mlx_fd.models.aliases import ALIASES
from mlx_fd.models.chat_template import ChatTemplate
from mlx_fd.models.directory import blaming
from mlx_fd.models.loading import check_can_think
from mlx_fd.models.pairing import check_pair
from mlx_fd.models.resolve import resolve, why_changed
from mlx_fd.models.student import ADAPTER_WEIGHTS, projection_width, read_trained
from mlx_fd.models.tokenizer import TEMPLATE_FILE
from mlx_fd.runs.checked import read_checked
from mlx_fd.runs.plan import Plan, check_run_memory
from mlx_fd.runs.records.manifest import Manifest

if TYPE_CHECKING:
    from mlx_fd.feedback.pair import Pair


# About as long as the longest of GSM8K.
_LONG_PROBLEM = "How many? " * 100


@dataclass(frozen=True)
class Target:
    """A model to evaluate that passed every check; nothing large is loaded yet.

    Attributes:
        name: as it was named.
        config: the run's configuration; the defaults for a model.
        student: directory of the language model.
        expert: directory of the expert; ``None``: there is none.
        run: the run directory.
        checkpoint: the run's checkpoint.
        adapter: an mlx-lm adapter that belongs to no run.
        gate: the gate as the run ended; ``None`` where no loop trained the student.
        vocab: tokens that expert and student share.
        template: how chats are written for both.
        models: what ``eval.json`` says of them.
        expert_template: the expert's way to write chats, where the tokenizers differ.
        answer_kind: of the answers that the run learned from; ``None``: there is no run.
        manifest: the run's; likewise.
    """

    name: str
    config: Config
    student: Path
    expert: Path | None
    run: Path | None
    checkpoint: Path | None
    adapter: Path | None
    gate: GateState | None
    vocab: int
    template: ChatTemplate
    models: dict[str, dict[str, str]]
    expert_template: ChatTemplate | None = None
    answer_kind: str | None = None
    manifest: Manifest | None = None

    @property
    def helps_expert(self) -> bool:
        """Whether it learned in the loop: it judges beside an expert."""
        return self.run is not None and not self.config.self_distils

    @property
    def scores(self) -> bool:
        """Whether it has a score head that was taught."""
        return self.helps_expert and self.config.losses.trains_head

    @property
    def threshold(self) -> float | None:
        """The confidence from which on the student stands alone; ``None``: it never does."""
        return None if self.gate is None else self.gate.running.trust.threshold


def open_target(
    name: str,
    expert: str | None,
    adapter_path: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Target:
    """Find and check what is to be evaluated.

    Args:
        name: a run directory (its best checkpoint), one of its checkpoints, an mlx-lm adapter, or a
            model's name.
        expert: the expert's name; ``None``: the run's own; none for a model, and for a run of
            self-distillation.
        adapter_path: an mlx-lm adapter, or a run's checkpoint, on the model ``name`` (empty: on
            the model that it was trained on).
        changes: options of the run's configuration that are others here, such as
            ``max_answer_tokens``.
        template_kwargs: further variables of the chat template, beside the run's.

    Raises:
        UserError: nothing of that name, an expert that is not the run's any more, or one that does
            not fit the student.
    """
    if adapter_path is None and (folder := _adapter(name)) is not None:
        ref = locate_model("", folder, template_kwargs)
    else:
        ref = locate_model(name, adapter_path, template_kwargs)
        name = str(adapter_path or name)
    student, run, checkpoint, adapter = ref.model, ref.run, ref.checkpoint, ref.adapter
    config = ref.config or Config()
    looped = run is not None and not config.self_distils
    expert_name = expert or (config.models.expert if looped else None)
    expert_path = resolve(expert_name) if expert_name else None
    if ref.manifest and looped and not expert:
        _check_expert(name, ref.manifest, config, expert_path)
    # The models of this package know no other problems than those of their preset.
    usual = next(
        (
            alias.preset
            for name, alias in ALIASES.items()
            if alias.preset and student == resolve(name)
        ),
        "",
    )
    if run is None:
        config = preset(usual) if usual else config
        config = override(config, {"expert": name, "student": name}, name)
    if not looped and not (run is None and usual):
        # The defaults of the loop are for learning, which needs answers with errors.
        config = override(config, {"answers_by": "expert", "answer_temperature": 0.0}, name)
    if expert_name:
        config = override(config, {"expert": expert_name}, name)
    else:
        config = override(config, {"answers_by": "student"}, name)
    config = override(config, changes or {}, "command line")
    fingerprint.prefetch(student, *([expert_path] if expert_path else []))
    models = {
        "student": {"name": config.models.student, "sha256": fingerprint.content_hash(student)}
    }
    weights = checkpoint or adapter
    if weights is not None:
        models["adapter"] = {"name": str(weights), "sha256": adapter_hash(weights, config)}
    if expert_path is not None:
        models["expert"] = {
            "name": config.models.expert,
            "sha256": fingerprint.content_hash(expert_path),
        }
    # With two tokenizers the run's expert is asked as the run asked it, too.
    asked = config.models if looped and not expert else Config().models
    # A run's student is asked in the way that it was trained in, whoever is the expert now; so is
    # an adapter with a template of its own.
    its_own = run is not None or (adapter is not None and (adapter / TEMPLATE_FILE).exists())
    pairing = check_pair(
        expert_path or student,
        student,
        kwargs=asked.chat_template_kwargs if its_own else template_kwargs,
        date=asked.template_date,
        trained=ref.template if its_own else None,
    )
    template = (ref.template if its_own else None) or pairing.template
    models["chat_template"] = {"name": template.owner, "sha256": template.digest()}
    if config.generation.student_thinking == "on":
        check_can_think(student, template)
    if expert_path is not None and config.generation.expert_thinking == "on":
        check_can_think(expert_path, pairing.expert_template or template)
    return Target(
        name=name,
        config=config,
        student=student,
        expert=expert_path,
        run=run,
        checkpoint=checkpoint,
        adapter=adapter,
        gate=_gate(run, checkpoint) if run and looped else None,
        vocab=pairing.shared_vocab,
        template=template,
        models=models,
        expert_template=pairing.expert_template,
        answer_kind=ref.answer_kind if run is not None else None,
        manifest=ref.manifest,
    )


def _adapter(name: str) -> Path | None:
    """The folder of an adapter that mlx-lm can put on its model and that no run knows."""
    folder = Path(name).expanduser()
    if runs.is_run(folder) or not (folder / ADAPTER_WEIGHTS).is_file():
        return None
    folder = folder.resolve()
    return None if runs.is_run(folder.parents[1]) else folder


def check_thinking(target: Target, changes: Mapping[str, Any]) -> None:
    """Refuse words on thoughts that nobody has.

    Args:
        target: made with the changes.
        changes: as for :func:`open_target`.

    Raises:
        UserError: there is no expert that could think, or neither model does.
    """
    if changes.get("expert_thinking") == "on" and target.expert is None:
        raise UserError("--expert-thinking: there is no expert; name one with --expert")
    if "max_thinking_tokens" in changes and not target.config.generation.thought_tokens:
        raise UserError("--max-thinking-tokens: nobody thinks; add --thinking on, or leave it out")


def _check_expert(name: str, manifest: Manifest, config: Config, path: Path | None) -> None:
    assert path is not None
    if not fingerprint.is_same(manifest.get("expert", {}), path):
        why = why_changed(config.models.expert, manifest.get("versions", {}))
        raise UserError(f"{name}: the expert {path} is not the one of the run: {why}.")


def _gate(run: Path, checkpoint: Path | None) -> GateState | None:
    """The gate as the run ended; of a checkpoint by number, as it was then."""
    assert checkpoint is not None
    best = (run / runs.CHECKPOINTS / "best").resolve()
    last = run / runs.CHECKPOINTS / "last"
    # The best checkpoint's weights are used as the run's end would have them used.
    folder = last if checkpoint == best and last.exists() else checkpoint
    try:
        state, _ = read_checked(folder / runs.STATE)
        return GateState.from_json(state["gate"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / runs.STATE}: cannot be read ({error!r})") from error


class Models:
    """The models of a target, loaded when something has to be generated."""

    def __init__(self, target: Target):
        self._target = target
        self._untrained: dict[str, Any] = {}

    @functools.cached_property
    def pair(self) -> Pair:
        """Expert (the student itself, where there is none) and student, trained.

        Raises:
            UserError: files are damaged or do not belong together.
        """
        from mlx.utils import tree_flatten

        from mlx_fd.models.device_memory import limit_memory
        from mlx_fd.models.student import load_student

        target = self._target
        # Nothing is run: there is no manifest to write.
        plan = Plan(
            config=target.config,
            expert_path=target.expert or target.student,
            student_path=target.student,
            vocab=target.vocab,
            template=target.template,
            expert_template=target.expert_template,
            probe=(),
            problems=(),
            manifest=cast(Manifest, {}),
            notes=(),
        )
        # One conversation at least must fit; of its problem nothing is known here.
        memory = check_run_memory(
            plan.expert_path,
            plan.student_path,
            [_LONG_PROBLEM],
            plan.config,
            plan.expert_template or plan.template,
            learns=False,
        )
        limit_memory(memory.total)
        if target.adapter is not None:
            return _with_adapter(plan, target.adapter)
        pair: Pair
        if target.checkpoint is None:
            pair = open_pair(plan)
        else:
            # As wide as it was: this expert may be another one, or there was none.
            pair = open_pair(plan, projection_width(target.checkpoint))
            self._untrained = dict(tree_flatten(pair.student.trainable_parameters()))
            load_student(pair.student, target.checkpoint)
        pair.student.eval()
        return pair

    @contextlib.contextmanager
    def amateur(self, *, trained: bool) -> Iterator[Pair]:
        """The pair, its student as trained or as it was before its run."""
        from mlx.utils import tree_flatten, tree_unflatten

        pair = self.pair
        if trained or not self._untrained:
            yield pair
            return
        learned = tree_flatten(pair.student.trainable_parameters())
        pair.student.update(tree_unflatten(list(self._untrained.items())))
        try:
            yield pair
        finally:
            pair.student.update(tree_unflatten(learned))


def _with_adapter(plan: Plan, adapter: Path) -> Pair:
    """A pair whose student is a model with an mlx-lm adapter on it."""
    from mlx_lm.tuner.utils import load_adapters

    from mlx_fd.feedback.pair import joined, thinking_as
    from mlx_fd.models.loading import load_pair
    from mlx_fd.models.student import Student

    expert, base = load_pair(plan.expert_path, plan.student_path)
    read_trained(adapter / ADAPTER_WEIGHTS)  # is it whole, and are its numbers finite?
    with blaming(f"{adapter}: this adapter does not fit its model"):
        load_adapters(base.model, str(adapter))
    student = Student(base.view, expert.view.width)
    student.eval()
    pair = joined(expert, base, student, plan.vocab, plan.template, plan.expert_template)
    return thinking_as(pair, plan.config.generation)
