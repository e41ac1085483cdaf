"""New weights for a student that is being served."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

from mlx_fd import runs
from mlx_fd.errors import UserError
from mlx_fd.feedback.judge import locate_model
from mlx_fd.models.student import ADAPTER_WEIGHTS, MADE_WITH, load_student
from mlx_fd.serve.calibration import calibration_of, rule_of
from mlx_fd.serve.errors import bad
from mlx_fd.serve.models import Served
from mlx_fd.serve.service import Options, Service


async def reload(service: Service, student: str | None = None) -> str:
    """Take the newest weights of the student, or those of another run of the same base.

    Requests that run finish with the old ones; those that come wait.

    Args:
        service: the server.
        student: a run or checkpoint; ``None``: the one that was named last.

    Returns:
        The checkpoint.

    Raises:
        ApiError: they do not fit, or are damaged; then the old ones are served on.
    """
    # Who asked may leave meanwhile: weights and rule change together or not at all.
    changing = asyncio.ensure_future(_reload(service, student or service.student))
    return await asyncio.shield(changing)


async def _reload(service: Service, name: str) -> str:
    try:
        async with service.admission.alone():
            options = service.options
            served = await service.engine.exchange(lambda old: renewed(old, name, options))
            rule = rule_of(service.options, served)
    except (UserError, OSError) as error:
        service.metrics.reloads.labels("refused").inc()
        service.log.write("reload", student=name, error=str(error))
        raise bad(f"{error}; the server goes on with what it has", "student") from None
    service.served, service.rule, service.student = served, rule, name
    checkpoint = str(served.judge.ref.checkpoint)
    service.metrics.reloads.labels("taken").inc()
    service.log.write("reload", student=name, checkpoint=checkpoint, threshold_by=rule.source)
    return checkpoint


def renewed(old: Served, name: str, options: Options) -> Served:
    """The models with a student's weights out of a checkpoint; on their thread.

    Raises:
        UserError: it is another model, its files are damaged, or its calibration is of another
            score; nothing is changed then.
    """
    folder = Path(name).expanduser()
    if not (runs.is_run(folder) or (folder / ADAPTER_WEIGHTS).is_file()):
        # A model's name would be downloaded while nobody is answered.
        raise UserError(f"{name}: only a run of mlx-fd loop can be reloaded")
    ref, before, student = locate_model(name), old.judge.ref, old.judge.student
    ref = options.thoughts.of_student(ref)
    if (
        before.config is None
        or student is None
        or ref.config is None
        or ref.config.self_distils
        or ref.checkpoint is None
    ):
        raise UserError(f"{name}: only a run of mlx-fd loop can be reloaded")
    now, then = ref.config.models, before.config.models
    if ref.model != before.model:
        raise UserError(f"{name}: its student is another model; restart the server")
    if ref.scores != before.scores:
        which = "has a trained score head" if ref.scores else "has no trained score head"
        raise UserError(f"{name}: its student {which}, unlike this one's; restart the server")
    if any(getattr(now, part) != getattr(then, part) for part in (*MADE_WITH, "dequantize")):
        raise UserError(f"{name}: its student has other LoRA; restart the server")
    if ref.thinking != before.thinking:
        raise UserError(f"{name}: its student thinks otherwise; restart the server")
    digests = {one.template.digest() for one in (ref, before) if one.template is not None}
    if len(digests) > 1 or ref.answer_kind != before.answer_kind:
        raise UserError(f"{name}: its student is asked in another way; restart the server")
    calibration_of(options, ref)
    load_student(student, ref.checkpoint)
    return dataclasses.replace(old, judge=dataclasses.replace(old.judge, ref=ref))
