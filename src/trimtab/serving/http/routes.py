"""Routes that `trimtab serve` adds to vLLM's server.

Entry point `vllm.endpoint_plugins`; vLLM loads it only where VLLM_PLUGINS names it, as `trimtab serve` makes it.
"""

import base64
import hashlib
import re
from argparse import Namespace
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from vllm.v1.metrics.prometheus import get_prometheus_registry

from trimtab.logits import saving
from trimtab.logits.strategy.fusion import strategy_from_dict
from trimtab.serving.http import metrics
from trimtab.serving.http.engine_client import SteeredEngine
from trimtab.serving.requests import LARGEST_SCALE, numbers_of

# Routes of vLLM that nobody should find here: they resize the engine, end other people's requests, or answer 501.
CLOSED = {"/scale_elastic_ep", "/is_scaling_elastic_ep", "/inference/v1/abort_requests", "/v1/systemone"}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class SteeringEndpoints:
    """vLLM's `EndpointPlugin`: routes now, state once the engine runs."""

    name = "trimtab"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes; `/metrics` takes the place of vLLM's, and says what that says as well. Closes others."""
        # vLLM's /metrics is a mount as well, which answers any method, and any path that begins so.
        gone = CLOSED | {"/metrics"}
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in gone]
        app.add_api_route("/metrics", show_metrics, methods=["GET"], summary="Metrics of vLLM and of fusion")
        app.add_api_route("/v1/steering", show_steering, methods=["GET"], summary="What requests may set")
        app.add_api_route("/v1/traces/{response_id}", show_trace, methods=["GET"], summary="Alphas, token by token")
        if getattr(app.state.args, "trimtab_page", False):
            app.add_api_route("/", show_page, methods=["GET"], include_in_schema=False)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Switches settings of requests on, in the workers and in front of the engine."""
        await engine_client.collective_rpc("trimtab_start")
        config = engine_client.vllm_config.model_config.hf_config
        _, _, experts = saving.references_of(config)
        strategy = strategy_from_dict(config.strategy or {}, tuple(experts))
        state.trimtab = SteeredEngine(engine_client, strategy)


async def show_metrics(request: Request) -> Response:
    """Text format of Prometheus."""
    steered: SteeredEngine = request.app.state.trimtab
    try:
        counted = await steered.ask_workers("trimtab_histograms")
    except TimeoutError:
        return _busy()
    name = request.app.state.openai_serving_models.base_model_paths[0].name
    # Processes that share a model count the same rows; only those that have the logits count at all.
    counted = [histograms for histograms in counted if histograms][:1]
    return Response(metrics.render(get_prometheus_registry(), counted, name), media_type=METRICS_TYPE)


async def show_steering(request: Request) -> dict[str, Any]:
    """The experts, the strategy, and the numbers that a request's `vllm_xargs` may set."""
    state = request.app.state
    strategy = state.trimtab.strategy
    described = strategy.to_dict()
    drafts = state.vllm_config.speculative_config
    numbers: dict[str, Any] = {"alpha": {"low": 0.0, "high": LARGEST_SCALE, "value": 1.0, "doc": "factor of the shift"}}
    for name, item in numbers_of(strategy).items():
        value = described["settings"][name]
        numbers[name] = {"low": item.low, "high": item.high, "value": value, "doc": item.doc}
    return {
        "model": state.openai_serving_models.base_model_paths[0].name,
        "experts": list(strategy.expert_names),
        "strategy": described,
        "settings": numbers,
        "drafted_tokens": drafts.num_speculative_tokens if drafts else 0,
    }


async def show_trace(request: Request, response_id: str) -> Response:
    """What fusion did at each token of an answer that was asked for with `"vllm_xargs": {"trace": 1}`."""
    try:
        choices = await request.app.state.trimtab.trace(response_id)
    except TimeoutError:
        return _busy()
    if not choices:
        message = (
            f"no trace of '{response_id[:100]}' is kept. Expected: the id of an answer whose request had "
            '"vllm_xargs": {"trace": 1}, among the latest.'
        )
        return _refused(404, "NotFoundError", message)
    if not any(choice["tokens"] or choice["is_whole"] for choice in choices):
        message = f"the trace of '{response_id[:100]}' was dropped: there is room for the latest. Fetch it sooner."
        return _refused(410, "GoneError", message)
    return JSONResponse({"id": response_id, "object": "trimtab.trace", "choices": choices})


def _busy() -> Response:
    return _refused(503, "ServiceUnavailableError", "the engine is busy and has not answered: ask again later.")


def _refused(status: int, kind: str, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)


async def show_page() -> Response:
    """The chat page: one file, which may load nothing from elsewhere."""
    text = (files("trimtab.serving.http") / "page" / "chat.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; script-src {_hashes(text, 'script')}; style-src {_hashes(text, 'style')}"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return Response(text, media_type="text/html; charset=utf-8", headers=headers)


def _hashes(text: str, tag: str) -> str:
    """The sources that a page's own scripts or styles are, for its content security policy."""
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
