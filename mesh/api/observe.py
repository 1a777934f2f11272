"""``/metrics`` for Prometheus and ``/metrics/json`` with llamesh's keys."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mesh.api.context import NodeContext
from mesh.api.exposition import CONTENT_TYPE, render


def routes(ctx: NodeContext) -> list[Route]:
    """Both copy the counters on the loop, which is short, and render the copy in a thread (trap 108)."""

    async def prometheus(request: Request) -> Response:
        gauges = ctx.gauges()
        text = await asyncio.to_thread(render, ctx.metrics.snapshot(gauges), gauges)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def as_json(request: Request) -> Response:
        body = await asyncio.to_thread(msgspec.json.encode, ctx.metrics.snapshot(ctx.gauges()))
        return Response(body, media_type="application/json")

    return [Route("/metrics", prometheus), Route("/metrics/json", as_json)]
