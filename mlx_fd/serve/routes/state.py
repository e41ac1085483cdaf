"""What there is and how it goes: models, health, metrics."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mlx_fd.serve.exchange import Exchange, Reply
from mlx_fd.serve.prompts import who_may_answer
from mlx_fd.serve.service import Service

HEALTH = "/health"
_SECONDS = 10.0


def routes(service: Service) -> list[Route]:
    """``/v1/models``, ``/health`` and ``/metrics``."""
    begun = int(time.time())

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": begun, "owned_by": "mlx-fd"}

    async def models(request: Request) -> Exchange:
        async def work(reply: Reply) -> None:
            names = service.served.names
            await reply.json({"object": "list", "data": [described(name) for name in names]})

        return Exchange(work, _SECONDS)

    async def model(request: Request) -> Exchange:
        async def work(reply: Reply) -> None:
            name = request.path_params["name"]
            who_may_answer(service.served, name)
            await reply.json(described(name))

        return Exchange(work, _SECONDS)

    async def health(request: Request) -> Exchange:
        async def work(reply: Reply) -> None:
            going = service.admission.draining
            content = {
                "status": "stopping" if going else "ok",
                "models": list(service.served.names),
                "inside": service.admission.inside,
            }
            await reply.json(content, 503 if going else 200)

        return Exchange(work, _SECONDS)

    async def metrics(request: Request) -> Response:
        service.metrics.inside.set(service.admission.inside)
        body = service.metrics.exposition()
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    return [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name}", model, methods=["GET"]),
        Route(HEALTH, health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]
