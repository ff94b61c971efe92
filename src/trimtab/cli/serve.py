"""Serve a fused model with vLLM: the OpenAI-compatible API, steered per request by name and number.

Needs vLLM (see docs/serving.md). Every option that is not listed here is passed on to `vllm serve`. A request's
"vllm_xargs" may set alpha (factor of the shift), expert, and the strategy's numbers; {"trace": 1} keeps its alphas.
"""

import argparse
import os
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from trimtab.cli import methods, options, output
from trimtab.serving.http import defaults

EXAMPLE = "trimtab serve runs/facts --page"
PASSES_ON = True  # words that no option takes go to vLLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Directory, where to listen, who may ask, strategy, drafts."""
    parser.add_argument("model", metavar="DIR", help="a fused directory; give it first")
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default=defaults.LOCAL, help="address to listen at: this machine only, unless you say so"
    )
    group.add_argument("--port", type=int, default=defaults.PORT, help="port to listen at")
    group.add_argument(
        "--api-key", metavar="KEY", help="asked of every request but /, /health and /ping; or set VLLM_API_KEY"
    )
    group.add_argument("--page", action="store_true", help="serve a chat page at /")
    group.add_argument(
        "--max-body-mib",
        type=float,
        default=defaults.LARGEST_BODY_MIB,
        metavar="MIB",
        help="largest body of a request",
    )
    group.add_argument(
        "--max-requests",
        type=int,
        default=defaults.MOST_REQUESTS,
        metavar="N",
        help="requests under way at once; more are told 503; 0: any number",
    )
    drafts = parser.add_argument_group("speed", "drafts change the speed, not the distribution of the text")
    drafts.add_argument(
        "--speculate",
        metavar="auto|N",
        help="tokens that a small member drafts: auto where drafts pay, 0 for none; by default as the directory says",
    )
    drafts.add_argument(
        "--draft",
        metavar="WHO",
        help="who drafts: an expert's name, base, mixture, fused or prompt; by default as the directory says",
    )
    options.add_strategy(parser)


def run(args: argparse.Namespace) -> None:
    """Check what can be checked at once, then hand over to vLLM until it is stopped."""
    from trimtab.serving.http import launch

    directory = Path(args.model)
    config = launch.check_directory(directory)
    launch.check_port(args.host, args.port)
    strategy = _strategy(args, config)
    drafting = _drafting(args, directory, config)
    print(drafting.remark, file=sys.stderr)
    settings = launch.ServeSettings(
        directory,
        args.host,
        args.port,
        args.api_key,
        args.page,
        strategy=strategy,
        drafting=drafting.config,
        max_body_mib=args.max_body_mib,
        max_requests=args.max_requests,
        passed_on=args.passed_on,
    )
    launch.check_members(settings, config)
    launch.check_vllm()
    told = launch.prepared(settings)
    warning = launch.open_to_all(told)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    threading.Thread(target=_announce, args=(args, settings, launch.url_of(told)), daemon=True).start()
    launch.run(told)


def _strategy(args: argparse.Namespace, config: Any) -> dict[str, Any] | None:
    """What the options change of the directory's strategy; None: nothing. Takes its settings out of what vLLM gets."""
    from trimtab.core.registry import find
    from trimtab.core.settings import settings_of
    from trimtab.logits import saving
    from trimtab.logits.registry import AMOUNTS, CHOOSERS
    from trimtab.logits.strategy.fusion import strategy_from_dict

    names = tuple(saving.references_of(config)[2])
    present = strategy_from_dict(config.strategy or {}, names).to_dict()
    amount, chooser = options.chosen_pair(args, present)
    kinds = find(AMOUNTS, amount), find(CHOOSERS, chooser)
    settings = {item.name for kind in kinds for item in settings_of(kind)}
    args.passed_on, given = methods.without_settings(args.passed_on, settings)
    args.set = [*args.set, *given]
    if not methods.is_changed(args):
        return None
    changed: dict[str, Any] = options.strategy_of(args, names, present).to_dict()
    return changed


def _drafting(args: argparse.Namespace, directory: Path, config: Any) -> Any:
    """vLLM's settings of speculation, with a remark on who drafts."""
    from trimtab.serving.http.launch import are_windows_masks
    from trimtab.serving.vllm.speculative_config import translated

    are_masks = are_windows_masks(args.passed_on)
    return translated(directory, *options.speculation_of(args, config.speculate), are_windows_masks=are_masks)


def _announce(args: argparse.Namespace, settings: Any, url: str) -> None:
    """Says where the server is, once it answers."""
    while not answers(url):
        time.sleep(0.5)
    is_http = not url.startswith("unix:")
    result = {
        "url": f"{url}/v1" if is_http else url,
        "page": f"{url}/" if settings.page and is_http else None,
        "pid": os.getpid(),
    }
    shown = f"serving {settings.directory} at {result['url']}" + (f"; page: {result['page']}" if result["page"] else "")
    document = output.document(result, {"strategy": settings.strategy, "drafting": settings.drafting}, None, "vllm")
    output.emit(args.json, document, lambda: print(shown, flush=True))


def answers(url: str) -> bool:
    """Whether a server on this machine is up.

    url   as `launch.url_of` says
    """
    try:
        if url.startswith("unix:"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(url.removeprefix("unix:"))
            return True
        # Nothing secret is sent, and the certificate names the machine as others call it. Proxies are for other places.
        trusting = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
        urllib.request.build_opener(urllib.request.ProxyHandler({}), trusting).open(f"{url}/health", timeout=5).close()
    except urllib.error.HTTPError:
        return False
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # it speaks, and wants a certificate from its clients
    except OSError as error:
        return isinstance(error, ssl.SSLError)
    return True
