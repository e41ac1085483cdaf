"""The model card: what was exported, from what, with which results, and how to open it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mlx_fd.export.chat import template_note
from mlx_fd.export.gguf_file import Written
from mlx_fd.export.guide import how_to_compare
from mlx_fd.export.verify import Agreement
from mlx_fd.models.aliases import ALIASES, SMOLLM2
from mlx_fd.models.score_head import SCORE_HEAD
from mlx_fd.registry import FORMATS
from mlx_fd.runs import CHECKPOINTS
from mlx_fd.runs.labels import EXAM_NAMES

if TYPE_CHECKING:
    from mlx_fd.export.form import Form
    from mlx_fd.export.source import Source
    from mlx_fd.models.student import Student

_UNKNOWN = ("other", "the licence of that model")
_APACHE = ("apache-2.0", "the Apache License 2.0")
# Licence of the weights, as the hub writes it, and what it asks for: by the beginnings of names on
# the hub (sizes and kinds of one series may have others), and by the names of packaged models.
_LICENCES = {
    "mlx-community/Qwen2.5-3B-": (
        "other",
        "the Qwen Research License (not for commercial use)",
    ),
    "mlx-community/Qwen2.5-0.5B-": _APACHE,
    "mlx-community/Qwen2.5-1.5B-": _APACHE,
    "mlx-community/Qwen2.5-7B-": _APACHE,
    "mlx-community/Llama-3.1-": ("llama3.1", "the Llama 3.1 Community License"),
    "mlx-community/Llama-3.2-": ("llama3.2", "the Llama 3.2 Community License"),
    "mlx-community/Meta-Llama-3.1-": ("llama3.1", "the Llama 3.1 Community License"),
}
_OF_PACKAGES = {
    SMOLLM2: _APACHE,
    **{
        name: ("mit", "the MIT licence of mlx-fd")
        for name, alias in ALIASES.items()
        if alias.preset
    },
}


def write_card(
    source: Source,
    form: Form,
    student: Student | None,
    agreement: Agreement,
    kept: Agreement | None,
    gguf: Written | None,
    folder: Path,
) -> None:
    """Write ``README.md`` into an export that is otherwise complete.

    Args:
        source: what was exported.
        form: as what.
        student: the live student, or model with a score head; ``None`` for a plain model.
        agreement: what was written against the live model.
        kept: the live student against its base, where the weights were rounded.
        gguf: what the GGUF file holds.
        folder: the export.
    """
    licence, _ = _licence(source.base, source.local)
    parts = [
        _front_matter(source, form, licence),
        f"# {source.name}\n",
        _origin(source, student),
        _results(source),
        "## Use\n",
        FORMATS[form.format].use(source, form),
        template_note(source.ref, folder),
        _score_head(source, form, student, folder)
        if student is not None and source.ref.scores
        else "",
        "## Is it the same model?\n",
        _same(form, agreement, kept, gguf),
        "## Licence\n",
        licence_note(source),
    ]
    text = "\n".join(part for part in parts if part)
    (folder / "README.md").write_text(text, encoding="utf-8")


def text_alone(source: Source) -> str:
    """Says of a multimodal model that no more than what it writes with is here; else nothing."""
    from mlx_fd.export.source import language_model
    from mlx_fd.models.loading import open_lazily

    model, config = open_lazily(source.ref.model)
    if language_model(model, config["model_type"])[0] is model:
        return ""
    return (
        f"\nThis is the language model of `{source.base}` alone: it reads texts, and no pictures.\n"
    )


def _licence(base: str, local: bool) -> tuple[str, str]:
    """The hub's word for a licence, and what to say of it; of a directory nothing is known."""
    if local:
        return _UNKNOWN
    name = base.partition(":layers=")[0]
    beginning = next((one for one in _LICENCES if name.startswith(one)), name)
    return _LICENCES.get(beginning) or _OF_PACKAGES.get(name, _UNKNOWN)


def licence_note(source: Source) -> str:
    """Which licence holds for the weights, and which may be about what learned from an expert."""
    from mlx_fd.export.source import base_name

    _, licence = _licence(source.base, source.local)
    text = (
        f"The weights are those of `{source.base}`, changed as said above: {licence} holds for them"
    )
    options = source.manifest.get("options", {})
    # A model that teaches itself has no expert beside it.
    if not options or (source.self_distils and options["self_teacher"] != "expert"):
        return f"{text}.\n"
    expert, _, local = base_name(options["expert"])
    _, experts = _licence(expert, local)
    models = {name.partition(":layers=")[0] for name in (expert, source.base)}
    if len(models) == 1 or experts == licence != _UNKNOWN[1]:
        return f"{text}.\n"
    return (
        f"{text}. They learned from what `{expert}` wrote, and {experts} may ask something of "
        "models that do.\n"
    )


def _front_matter(source: Source, form: Form, licence: str) -> str:
    lines = [
        "---",
        f"library_name: {FORMATS[form.format].library(form)}",
        f"license: {licence}",
        "pipeline_tag: text-generation",
        "tags: [mlx-fd, feedback-distillation]",
    ]
    if source.on_hub:
        lines.append(f"base_model: {source.base}")
    return "\n".join([*lines, "---", ""])


def _origin(source: Source, student: Student | None) -> str:
    if source.ref.adapter is not None:
        return (
            f"`{source.base}` with the mlx-lm adapter `{source.name}`, written by [mlx-fd]"
            "(https://github.com/mlx-fd/mlx-fd).\n"
        )
    if student is None or source.ref.run is None:
        return (
            f"`{source.base}`, not trained further, written by [mlx-fd]"
            "(https://github.com/mlx-fd/mlx-fd).\n"
        )
    options = source.manifest["options"]
    what = (
        "all weights"
        if options["train"] == "full"
        else f"{'DoRA' if options['train'] == 'dora' else 'LoRA'} of rank {options['lora_rank']} "
        f"and scale {options['lora_scale']:g}"
    )
    if options.get("self_teacher") == "expert":
        rows = {
            "expert": f"`{_named(options['expert'])}`",
            "student's base": f"`{source.base}`",
            "method": f"{options['method']}: the student answers "
            f"{options['on_policy_fraction']:.0%} of the problems, the expert the others; the "
            f"objective is {options['objective']}",
            "problems": _problems(options),
            "trained": what,
            **_provenance(source),
        }
        return (
            "A small model that learned from a large one: on answers to problems it learned to "
            "predict tokens as the expert does. Made by distillation with [mlx-fd]"
            f"(https://github.com/mlx-fd/mlx-fd).\n\n{_table(rows)}"
        )
    if source.self_distils:
        rows = {
            "base": f"`{source.base}`",
            "method": f"{options['method']}: the teacher reads {options['context']}, the objective "
            f"is {options['objective']}",
            "critic": f"`{_named(options['critic'])}`" if options["critic"] else "none",
            "problems": _problems(options),
            "trained": what,
            **_provenance(source),
        }
        return (
            "A model that learned from itself: what it does where it reads more than the problem, "
            "it learned to do without. Made by self-distillation with [mlx-fd]"
            f"(https://github.com/mlx-fd/mlx-fd).\n\n{_table(rows)}"
        )
    rows = {
        "expert": f"`{_named(options['expert'])}`",
        "student's base": f"`{source.base}`",
        **_begun_with(options),
        "problems": _problems(options),
        "losses": f"{', '.join(options['losses'])} (KL {options['kl']}, temperature "
        f"{options['loss_temperature']:g})",
        "trained": f"{what}; score head read {_read_at(student.score_at)}"
        if source.ref.scores
        else what,
        "gate": _gate(options["gate"], source.summary),
        **_provenance(source),
    }
    return (
        "A small model that gives a large one's feedback: it scores and criticises answers to "
        "problems. Made by Online Feedback Distillation with [mlx-fd]"
        f"(https://github.com/mlx-fd/mlx-fd): {_who_answered(options)}, and the student learned "
        f"from that feedback meanwhile.\n\n{_table(rows)}"
    )


def _who_answered(options: dict[str, Any]) -> str:
    """Whose answers to the problems the feedback is about."""
    return {
        "expert": "the expert solved problems and criticised its solutions",
        "student": "the student answered problems, the expert criticised the answers",
        "both": "the student and the expert answered problems, the expert criticised the answers",
    }[options["answers_by"]]


def _begun_with(options: dict[str, Any]) -> dict[str, str]:
    """What the student had learned before the run's first batch, where that is something."""
    rows = {}
    if before := options.get("continue_from"):
        run = before.partition(f"/{CHECKPOINTS}/")[0]
        rows["begun with"] = f"the student of the run `{Path(run).name}`"
    if warm_up := options.get("warm_up"):
        method, _, count = warm_up.partition(":")
        rows["warm-up"] = f"{count} problems, to solve them (`mlx-fd distil`, {method})"
    return rows


def _named(text: str) -> str:
    """A name, or of a path, which is of that machine, its last part."""
    return Path(text).name if Path(text).is_absolute() else text


def _problems(options: dict[str, Any]) -> str:
    return (
        f"{_named(options['problems'])}, split {options['split']}, {options['episodes']} episodes "
        f"in batches of {options['batch_size']}"
    )


def _provenance(source: Source) -> dict[str, str]:
    checkpoint, versions = source.ref.checkpoint, source.manifest["versions"]
    assert checkpoint is not None
    return {
        "checkpoint": f"{checkpoint.name} (seed {source.manifest['seed']})",
        "software": f"mlx-fd {versions['mlx-fd']}, mlx {versions['mlx']}, "
        f"mlx-lm {versions['mlx-lm']}, on {source.manifest['backend']['device']}",
    }


def _table(rows: dict[str, str]) -> str:
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| | |\n|---|---|\n{lines}\n"


def _read_at(score_at: str) -> str:
    ref = "at the prompt's last token"
    return ref if score_at == "prompt" else "where the feedback's last token is predicted"


def _gate(gate: str, summary: dict[str, Any]) -> str:
    if "updates" not in summary:
        return gate
    updates = summary["updates"]
    frozen = updates["frozen_after_batch"]
    end = "not frozen" if frozen is None else f"frozen after batch {frozen}"
    return f"{gate}; {updates['steps']} steps in {updates['batches']} batches, {end}"


def _results(source: Source) -> str:
    """The run's own measurements."""
    summary = source.summary
    if source.ref.checkpoint is None:
        return ""
    if not summary:
        return "The run has not ended, so it has no summary yet.\n"
    if source.self_distils:
        before, after = (summary["held_out"][side] for side in ("before", "after"))
        if not after["n"]:
            return (
                "## Measured in the run\n\nIts problems have no right answers, so it is not known "
                "how many the model answers right.\n"
            )
        return (
            "## Measured in the run\n\n"
            f"Held-out problems answered right: {before['right']} of {before['n']} before, "
            f"{after['right']} of {after['n']} after (95 % Wilson intervals "
            f"{before['interval'][0]:.1%} to {before['interval'][1]:.1%}, "
            f"{after['interval'][0]:.1%} to {after['interval'][1]:.1%})."
            f"{_of_other_weights(source)}\n"
        )
    lines = ["## Measured in the run\n", "| | before | after |", "|---|---|---|"]
    after = summary["probe"]["after"]
    for name, before in summary["probe"]["before"].items():
        lines.append(f"| {name} loss, held out | {before:.4g} | {after[name]:.4g} |")
    for name, text in EXAM_NAMES.items():
        if name in summary.get("exam", {}):
            row = [_interval(summary["exam"][name][side]) for side in ("before", "after")]
            lines.append(f"| exam: {text} | {row[0]} | {row[1]} |")
    lines += [
        "",
        f"In its {summary['episodes']} episodes {_answers_of(summary)}. Held-out losses are means "
        "over the run's probe set; brackets are 95 % intervals."
        f"{_of_other_weights(source)}\n",
    ]
    return "\n".join(lines)


def _of_other_weights(source: Source) -> str:
    """That the run was measured at its end, where the checkpoint is one from before; else empty."""
    checkpoint = source.ref.checkpoint
    assert checkpoint is not None
    last = (checkpoint.parent / "last").resolve()
    if not last.is_dir() or last.name == checkpoint.name:
        return ""
    return (
        f" What is said of *after* was measured at the run's end, with the weights of checkpoint "
        f"{last.name}; those here are of checkpoint {checkpoint.name}."
    )


def _answers_of(summary: dict[str, Any]) -> str:
    if "verdicts" in summary:
        verdicts = summary["verdicts"]
        good, agreed = verdicts["first_answers"], verdicts["agreement"]
        return (
            f"no right answers were known; by the expert's verdict {good['right']} of {good['n']} "
            f"first answers were good, and the student's verdict was the expert's on "
            f"{agreed['right']} of {agreed['n']}"
        )
    first, final = (summary["accuracy"][name] for name in ("first_answers", "final_answers"))
    return (
        f"{first['right']} of {first['n']} first answers were right, and {final['right']} of "
        f"{final['n']} final ones"
    )


def _interval(value: dict[str, Any]) -> str:
    if value["value"] is None:
        return "-"
    interval = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['value']:.3f}{interval} (n = {value['n']})"


def named_base(source: Source) -> str:
    """What a card calls the base model of an adapter: its name on the hub, or ``BASE``."""
    return source.base if source.on_hub else "BASE"


def how_to_base(source: Source, base: str, form: str) -> str:
    """How to get at ``BASE``, for a format's name; empty where the base has a name on the hub."""
    if base != "BASE":
        return ""
    name, where = source.base, ""
    if source.local:
        # Its name says nothing where this card is read.
        directory, colon, layers = source.base.partition(":layers=")
        name = f"DIRECTORY{colon}{layers}"
        where = f", where DIRECTORY is the base model's directory (`{directory}` at the training)"
    return (
        f"\n`BASE` is a directory with the base model, which this writes{where}: "
        f"`mlx-fd export {name} --format {form} --out BASE`\n"
    )


def _score_head(source: Source, form: Form, student: Student, folder: Path) -> str:
    import mlx.core as mx

    text = (
        "`score_head.safetensors` is a linear head, `weight` [1, d] and `bias` [1], on the last "
        f"hidden state (after the final norm) {_read_at(student.score_at)}. Its tanh is the "
        "student's score of an answer"
    )
    _, about = cast("Any", mx.load(str(folder / SCORE_HEAD), return_metadata=True))
    # Where a thought comes between, no three texts make the prompt.
    asks = {"before", "between", "after"} <= about.keys()
    code = FORMATS[form.format].score_code(source, form, student) if asks else ""
    if not code:
        return f"{text}.\n"
    return f"{text}:\n\n```python\n{code}```\n"


SCORE_EXAMPLE = """\
problem, answer = "Tom has 3 apples and buys 5. How many?", "3 + 5 = 9. #### 9"
text = about["before"] + problem + about["between"] + answer + about["after"]
"""
"""The prompt that a student was trained on, so that its head reads what it knows: in the texts that
stand beside the head, whatever the tool makes of a chat template."""


def mlx_score_code(source: Source, form: Form, student: Student) -> str:
    """Python code that reads the score head with mlx-lm.

    Empty for the few architectures in which no module that reads tokens gives final hidden states.
    """
    body = student.view.body
    if body is None:
        return ""
    load = f'"{named_base(source)}", adapter_path="."' if form.adapter else '"."'
    penalised = source.ref.repetition_penalty != 1
    rules = """\
from mlx_lm.sample_utils import make_repetition_penalty
penalise, read = make_repetition_penalty(float(about["repetition_penalty"]), 1 << 20), mx.array(ids)
rules = [lambda seen, logits: penalise(mx.concatenate([read, seen]), logits)]
"""
    given = "model, tokenizer, ids, max_tokens=most" + ", logits_processors=rules" * penalised
    written = f"""\
most = int(about["max_tokens"])
ids += [r.token for r in mlx_lm.stream_generate({given})][:-1]
"""
    if not student.scores_at_end:
        written = ""
    elif penalised:
        written = rules + written
    return f"""\
import mlx.core as mx, mlx_lm
model, tokenizer = mlx_lm.load({load})
head, about = mx.load("{SCORE_HEAD}", return_metadata=True)
{SCORE_EXAMPLE}\
ids = tokenizer.encode(text, add_special_tokens=False)
{written}\
hidden = {body}(mx.array([ids]), cache=None)[0, -1].astype(mx.float32)
print(mx.tanh(head["weight"] @ hidden + head["bias"]).item())  # from -1, harmful, to 1, excellent
"""


def _same(
    form: Form,
    agreement: Agreement,
    kept: Agreement | None,
    gguf: Written | None,
) -> str:
    text = (
        f"Read back and run beside the live student on {agreement.positions} tokens of all roles: "
        f"largest difference of two logits {agreement.largest_difference:.3g}, mean KL "
        f"{agreement.mean_kl:.3g} nats, same likeliest token at {agreement.top1:.1%}.\n"
    )
    if gguf is not None:
        kinds = ", ".join(f"{count} {name.upper()}" for name, count in sorted(gguf.kinds.items()))
        text += f"\nMatrices: {kinds}"
        text += f"; {gguf.carried} carried over without rounding.\n" if gguf.carried else ".\n"
    if kept is not None:
        text += (
            f"\nThe training moved the model by a mean KL of {kept.mean_kl:.3g}, which is what "
            "these bits have to keep.\n"
        )
    if form.parity_problems:
        text += "\n" + how_to_compare(form.format, adapter=form.adapter)
    return text
