"""What goes into the next training, and comes out of it: corrections, and new weights."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from mlx_fd.errors import UserError
from mlx_fd.serve.errors import ApiError, bad
from mlx_fd.serve.exchange import Exchange, Reply, read_json
from mlx_fd.serve.kept import CORRECTION, Kept
from mlx_fd.serve.reloading import reload
from mlx_fd.serve.schema import Fields, checked_text
from mlx_fd.serve.service import Service


def routes(service: Service) -> list[Route]:
    """``/v1/corrections`` and ``/admin/reload``."""
    limits = service.options.limits

    async def corrections(request: Request) -> Exchange:
        content = await read_json(request, limits)

        async def work(reply: Reply) -> None:
            fields = Fields(content)
            problem, answer = fields.text("problem"), fields.text("answer")
            fields.end()
            kept = _file(service)
            async with service.admission.enter():
                try:
                    found = await service.aside(lambda: _kept(kept, problem, answer))
                except (OSError, UserError) as error:
                    # Where the file is is nobody's business but the server's.
                    service.log.write("not_kept", error=str(error))
                    raise _not_kept() from None
            await reply.json(found)

        return Exchange(work, limits.seconds)

    async def new_weights(request: Request) -> Exchange:
        content = await read_json(request, limits)

        async def work(reply: Reply) -> None:
            fields = Fields(content)
            name = fields.take("student")
            student = None if name is None else checked_text(name, "student")
            fields.end()
            checkpoint = await reload(service, student)
            rule = service.rule
            await reply.json(
                {
                    "checkpoint": checkpoint,
                    "threshold": rule.threshold,
                    "threshold_by": rule.source,
                }
            )

        # Requests that run come to their end first.
        return Exchange(work, 2 * limits.seconds)

    return [
        Route("/v1/corrections", corrections, methods=["POST"]),
        Route("/admin/reload", new_weights, methods=["POST"]),
    ]


def _file(service: Service) -> Kept:
    if service.kept is None:
        raise ApiError(
            403,
            "This server keeps nothing; whoever runs it can start it with --keep FILE.",
            code="nothing_is_kept",
        )
    return service.kept


def _not_kept() -> ApiError:
    return ApiError(
        503,
        "The correction was not kept: the server cannot write its file. Whoever runs it finds "
        "the reason in its log.",
        code="not_kept",
    )


def _kept(kept: Kept, problem: str, answer: str) -> dict[str, Any]:
    final = kept.final(problem, answer)
    if final is None:
        raise bad(
            "No final answer that can be learned from can be read in 'answer'; end it as the "
            "student does, such as with a line '#### 42', and list choices below the problem, each "
            "on a line of its own such as 'A. red'.",
            "answer",
        )
    kept.add(problem, answer, CORRECTION)
    return {"object": "correction", "kept": len(kept.rows()), "final": final}
