"""From references to models: each directory is loaded once, adapters share their base, nothing is fetched twice."""

import copy
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import BadSetting, MemberMismatch, UnreadableModel, unknown_name
from trimtab.models import (
    adapter_copies,
    adapter_fit,
    adapters,
    checkpoint,
    kinds,
    quantization,
    references,
    vocabulary,
)
from trimtab.models.adapter_vocabulary import adapter_vocabulary
from trimtab.models.adapters import Adapter
from trimtab.models.context import context_of
from trimtab.models.handed import Handed, look_at
from trimtab.models.opening import is_spread, load_model, load_outline
from trimtab.models.probe import own_logits
from trimtab.models.references import Reference
from trimtab.models.token_ids import FusedVocabulary


@dataclass(frozen=True)
class Placement:
    """How members are loaded, each setting one for all or {member: ...}.

    dtype     None or "auto": as stored; embedded models, which are stored narrow to be small, in float32
    device    None: the CPU; "auto" and its kin: spread by transformers over what there is (needs accelerate);
              {"": device} is transformers' way to say one for all; of a member also a device map of its own
    quantization_config   None: as stored; else members are quantized while they are loaded
    max_memory            {device: bytes or "20GiB"} for all members that are spread, together
    """

    dtype: Any = None
    device: Any = None
    attn_implementation: str | None = None
    quantization_config: Any = None
    max_memory: Mapping[Any, Any] | None = None

    def check_names(self, members: Iterable[str]) -> None:
        """Raises UnknownName when a number type or a device is given for a member that is not there."""
        known = tuple(members)
        quantized = self.quantization_config if quantization.is_per_member(self.quantization_config) else None
        settings = (("dtype", self.dtype), ("device", self.device), ("quantization_config", quantized))
        for setting, given in settings:
            for name in given if isinstance(given, Mapping) else ():
                if name not in known and not (name == "" and setting == "device"):
                    raise unknown_name(f"member (in {setting})", str(name), known)
        if self.max_memory and not any(is_spread(self.device_of(name)) for name in known):
            raise BadSetting(
                "max_memory is given, but no member is spread over devices.",
                "It limits what device='auto' takes on each device.",
                "add device='auto' or device={'strong': 'auto'}, or leave max_memory out.",
            )

    def dtype_of(self, name: str, reference: Reference) -> Any:
        """The number type of one member."""
        dtype = self.dtype.get(name) if isinstance(self.dtype, Mapping) else self.dtype
        if dtype is None or dtype == "auto":
            return torch.float32 if reference.is_zoo else "auto"
        return dtype

    def quantization_of(self, name: str) -> Any:
        """The quantization config of one member; None: it is loaded as it is stored."""
        given = self.quantization_config
        return given.get(name) if quantization.is_per_member(given) else given

    def device_of(self, name: str) -> Any:
        """The device of one member; None: where it was loaded."""
        return self.device.get("", self.device.get(name)) if isinstance(self.device, Mapping) else self.device


@dataclass
class Member:
    """One model that is asked at every step.

    model      the transformers model; an adapter's member shows the model that it sits on
    adapter    what the switch selects; None: the bare model
    tokenizer  what its ids mean
    doubt      of an expert that is an adapter: why the base may not be the model that it was trained on; empty when
               that was checked
    tokenizer_beside   of an adapter: the tokenizer in its directory, which says nothing about the ids of its base
    resized    of an adapter: rows of its own embeddings, where their number is not that of its base
    vocabulary         of the fused model, once it is known: it says what the member reads for each id
    own_logits         [1, time, rows] what the model computes by itself on the tokens of `trimtab.models.probe`
    """

    name: str
    model: Any
    adapter: Adapter = None
    reference: Reference | None = None
    directory: Path | None = None
    tokenizer: Any = None
    doubt: str = ""
    tokenizer_beside: Any = None
    resized: int | None = None
    vocabulary: FusedVocabulary | None = None
    own_logits: torch.Tensor | None = None

    @property
    def chat_tokenizer(self) -> Any:
        """The tokenizer whose chat template and end of text are this member's; None without any."""
        return self.tokenizer if self.tokenizer_beside is None else self.tokenizer_beside

    @property
    def rows(self) -> int:
        """Rows of the output layer, padding included."""
        head = self.model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        weight = weight() if callable(weight) else weight  # quantized layers of torch.ao have a method
        return int(weight.shape[0]) if weight is not None else int(self.model.config.get_text_config().vocab_size)

    @property
    def embedded(self) -> int:
        """Rows of the input embeddings: ids from here on cannot be read."""
        weight = getattr(self.model.get_input_embeddings(), "weight", None)
        return int(weight.shape[0]) if weight is not None else self.rows

    def read_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The ids that this member reads for ids of the fused vocabulary."""
        return input_ids if self.vocabulary is None else self.vocabulary.read(self.name, input_ids)

    @property
    def context(self) -> int | None:
        """Tokens that the model can read at most; None when its configuration sets no limit."""
        return context_of(self.model.config)


class MemberLoader:
    """Loads members; a directory that is asked for twice is loaded once."""

    def __init__(
        self,
        placement: Placement,
        beside: Path | None = None,
        is_outline: bool = False,
        handed: Mapping[str, Handed] | None = None,
    ) -> None:
        """The loader of one fused model, see `gather`; `handed` says what loaded models are, see `look_at`."""
        self._is_outline = is_outline
        self._placement = placement
        self._beside = beside
        self._handed = dict(handed or {})
        self._models: dict[Any, Any] = {}
        self._own_logits: dict[int, torch.Tensor] = {}  # by the id of a bare model, before adapters were attached
        self.switches: dict[int, adapters.AdapterSwitch] = {}

    def member(self, name: str, source: Any, base: Member | None = None) -> Member:
        """The member of this name.

        source    a loaded model (transformers or peft), or a reference: path, zoo: name, hub id, Reference
        base      for an expert: what its adapter sits on
        """
        if isinstance(source, nn.Module):
            return self._given(name, source, base)
        reference = source if isinstance(source, Reference) else references.parse_reference(source)
        reference, directory = references.locate(reference, self._beside)
        try:
            checkpoint.check_directory(directory)
        except UnreadableModel as error:
            raise UnreadableModel(
                f"member '{name}' cannot be loaded: {error.found}", error.expected, error.fix
            ) from error
        if not checkpoint.is_adapter(directory):
            kinds.read_config(name, directory)  # refuses what is no text model before its tokenizer is read
        references.check_digest(name, reference, directory)
        tokenizer = vocabulary.load_tokenizer(directory)
        if not checkpoint.is_adapter(directory):
            model = self._load(name, reference, directory)
            logits = self._own_logits.get(id(model))
            return Member(name, model, None, reference, directory, tokenizer, own_logits=logits)
        under, doubt = self._under(name, directory, base)
        tokens = adapter_vocabulary(name, directory, under.model)
        resized = tokens.rows if tokens.rows != under.embedded else None
        if tokens.is_separate:
            under = replace(under, model=self._resized(name, directory, under, tokens.rows))
        own = tokenizer if tokens.is_changed and tokenizer is not None else under.tokenizer
        if self._is_outline:
            adapter_fit.check_fit(name, directory, under.model)
            return Member(name, under.model, name, reference, directory, own, doubt, tokenizer, resized)
        key = ("adapter", directory, id(under.model))
        if key not in self._models:
            self._models[key] = self._attached(name, directory, under.model)
        model, adapter, logits = self._models[key]
        return Member(name, model, adapter, reference, directory, own, doubt, tokenizer, resized, own_logits=logits)

    def _attached(self, name: str, directory: Path, base: Any) -> tuple[Any, str, torch.Tensor]:
        """The model that carries an adapter, the adapter's name on it, and what peft computes with it."""
        if adapter_copies.sits_on_base(adapters.read_config(name, directory)):
            model, adapter = base, adapters.switch_for(base).attach(name, directory)
        else:
            model, adapter = adapter_copies.attach_apart(name, directory, base)
        switch = self.switches.setdefault(id(model), adapters.switch_for(model))
        return model, adapter, switch.own_logits(name, adapter)

    def _given(self, name: str, source: Any, base: Member | None) -> Member:
        """A member from a loaded model, which is read with the adapters that are on."""
        handed = self._handed[name] if name in self._handed else look_at({name: source})[name]
        model, adapter = handed.model, handed.adapter
        if adapters.has_adapters(model):
            self.switches[id(model)] = adapters.switch_for(model)
        doubt = ""
        # An adapter that was made in memory, on a base without a name, records none either.
        if adapter and base is not None and base.model is model and (handed.recorded or model.config.name_or_path):
            doubt = _doubt(handed.recorded, _find_base(handed.recorded, None), base)
        return Member(name, model, adapter, doubt=doubt, own_logits=handed.logits)

    def _under(self, name: str, directory: Path, base: Member | None) -> tuple[Member, str]:
        """The model that an adapter sits on, and what is doubtful about it (see Member).

        An expert's is the base; any other's is the one that it names.
        """
        recorded = adapters.base_name(directory)
        located = _find_base(recorded, directory)
        if base is not None:
            if base.adapter is not None:
                on = ", ".join(f"'{name}'" for name in adapters.names_of(base.adapter))
                raise MemberMismatch(
                    f"expert '{name}' is an adapter, but the base is read with another one on ({on}).",
                    "An adapter is a change of the bare model, and so is the expert's delta.",
                    "pass the bare base: load it anew, or call disable_adapters() on it.",
                )
            if located is not None and base.directory is not None and not _same_model(located, base.directory):
                raise MemberMismatch(
                    f"expert '{name}' is an adapter of '{recorded}', but the base is '{base.directory}'.",
                    "An expert's delta is taken against the model that it was tuned from.",
                    f"pass base='{recorded}'.",
                )
            return base, _doubt(recorded, located, base)
        return self.member(name, _base_reference(name, directory)), ""

    def _resized(self, name: str, directory: Path, under: Member, rows: int) -> Any:
        """A model of its own for an adapter that changes the embeddings: the shared base stays bare."""
        key = ("resized", directory, id(under.model))
        if key not in self._models:
            if under.directory is not None:
                reference = under.reference or Reference(str(under.directory))
                model = self._fresh(under.name, reference, under.directory)
            elif adapters.has_adapters(under.model):
                raise MemberMismatch(
                    f"the adapter '{name}' brings embeddings, and its base is a loaded model with other adapters.",
                    "Such an adapter needs a copy of the bare base.",
                    "pass the base as a directory.",
                )
            else:
                model = copy.deepcopy(under.model)
            model.resize_token_embeddings(rows, mean_resizing=False)
            self._models[key] = model
        return self._models[key]

    def _load(self, name: str, reference: Reference, directory: Path) -> Any:
        dtype, device = self._placement.dtype_of(name, reference), self._placement.device_of(name)
        quantized = self._placement.quantization_of(name)
        key = (directory, str(dtype), str(device), str(quantized))
        if key not in self._models:
            model = self._fresh(name, reference, directory)
            if not self._is_outline:
                self._own_logits[id(model)] = own_logits(name, model)
            self._models[key] = model
        return self._models[key]

    def _fresh(self, name: str, reference: Reference, directory: Path) -> Any:
        """A model of its own, shared with no other member."""
        placement = self._placement
        dtype, device, quantized = (
            placement.dtype_of(name, reference),
            placement.device_of(name),
            placement.quantization_of(name),
        )
        if self._is_outline:
            return load_outline(name, directory, dtype)
        return load_model(name, directory, dtype, device, placement.attn_implementation, quantized, self._memory_left())

    def _memory_left(self) -> dict[Any, int] | None:
        """What the members loaded so far leave of `max_memory`, in bytes per device; None: no limit was given."""
        if not self._placement.max_memory:
            return None
        loaded = [model for model in self._models.values() if isinstance(model, nn.Module)]
        return remaining_memory(self._placement.max_memory, loaded)


def adapter_base(name: str, directory: Path) -> Path:
    """The local directory of the model that an adapter names as its base; fetched from the hub where it names an id.

    raises    UnreadableModel where the adapter names none; OfflineError
    """
    return references.locate(_base_reference(name, directory))[1]


def _base_reference(name: str, directory: Path) -> Reference:
    recorded = adapters.base_name(directory)
    if recorded is None:
        raise UnreadableModel(
            f"the adapter '{name}' ({directory}) does not say which model it sits on.",
            "adapter_config.json names it in base_model_name_or_path.",
            "write it there, or merge the adapter into a model of its own.",
        )
    located = _find_base(recorded, directory)
    is_path = located is not None and not recorded.startswith(references.ZOO)
    return Reference(str(located)) if is_path else references.parse_reference(recorded)


def _find_base(recorded: str | None, directory: Path | None) -> Path | None:
    """The local model directory that an adapter names as its base, if there is one; never asks the network."""
    if not recorded:
        return None
    if recorded.startswith(references.ZOO):
        return references.locate(Reference(recorded))[1]
    for place in (Path(recorded).expanduser(), *([] if directory is None else [directory / recorded])):
        if (place / "config.json").is_file():
            return place.resolve()
    return None


def remaining_memory(max_memory: Mapping[Any, Any], models: Iterable[nn.Module]) -> dict[Any, int]:
    """What some models leave of a limit, in bytes per device; devices are named as accelerate does: 0, "cpu"."""
    from accelerate.utils import convert_file_size_to_int

    left = {device: int(convert_file_size_to_int(size)) for device, size in max_memory.items()}
    for parameter in (parameter for model in models for parameter in model.parameters()):
        device = parameter.device
        name = device.type if device.index is None else device.index
        if name in left:
            left[name] = max(0, left[name] - parameter.numel() * parameter.element_size())
    return left


def _doubt(recorded: str | None, located: Path | None, base: Member) -> str:
    """Why the base may not be the model that an adapter was trained on; empty when it is, as far as can be told.

    recorded   what the adapter names, a path or a hub id
    located    the directory of that model, if it is here: then weights are compared, and otherwise names
    """
    if located is not None:
        # A base that was opened from a directory was compared file by file already.
        if base.directory is not None or _holds(located, base.model):
            return ""
        return f"it is an adapter of '{recorded}', whose weights are not those of the loaded base"
    names = {base.model.config.name_or_path or ""} | ({base.reference.where} if base.reference is not None else set())
    if recorded and recorded in names:
        return ""
    named = " or ".join(f"'{name}'" for name in sorted(names - {""})) or "a model without a name"
    what = f"it is an adapter of '{recorded}', which is not here" if recorded else "the adapter names no base"
    return f"{what} and cannot be compared with {named}"


def saved_reference(member: Member) -> tuple[Reference, Path]:
    """Where a member can be loaded from again; a loaded model is held against the files that it names.

    raises    MemberMismatch when it was never saved, or differs from what is there
    """
    if member.reference is not None and member.directory is not None:
        return member.reference, member.directory
    named = getattr(member.model, "name_or_path", "") or ""
    is_loaded_packed = getattr(member.model, "hf_quantizer", None) is not None and not _is_stored_quantized(named)
    if is_loaded_packed or quantization.has_packed_layers(member.model):
        raise MemberMismatch(
            f"member '{member.name}' was quantized in memory{f', and comes from {named}' if named else ''}.",
            "A fused directory holds references to the members, and these files are not quantized.",
            f"pass the directory in place of the model, with quantization_config={{'{member.name}': ...}}, at building "
            "and at opening; or save the quantized model with save_pretrained and pass that directory.",
        )
    directory = Path(named) if named else None
    if member.adapter is not None or directory is None or not directory.is_dir() or not _holds(directory, member.model):
        raise MemberMismatch(
            f"member '{member.name}' lives in memory only, or differs from its files{f' in {named}' if named else ''}.",
            "A fused directory holds references to the members, no weights.",
            "save it with save_pretrained(DIR), and build the fused model from that path.",
        )
    return Reference(str(directory.resolve())), directory.resolve()


def _is_stored_quantized(named: str) -> bool:
    config = Path(named) / "config.json"
    return bool(named) and config.is_file() and bool(checkpoint.read_json(config).get("quantization_config"))


def _holds(directory: Path, model: nn.Module) -> bool:
    """Whether the safetensors of a directory hold this model's weights: the first numbers of every tensor agree."""
    from safetensors import safe_open
    from transformers.core_model_loading import revert_weight_conversion

    # Where adapters sit, peft has put the model's own layer one level down.
    ours = {re.sub(r"\.(base_layer|original_module)\b", "", key): value for key, value in model.state_dict().items()}
    # Some architectures have other names in files than in memory (Gemma 3: `language_model.model` in files).
    if getattr(model, "hf_quantizer", None) is None:  # packed weights have one name only
        ours = revert_weight_conversion(model, ours)
    ours |= {f"language_model.{key}": value for key, value in ours.items()}  # a text class opened from a larger model
    seen = 0
    for file in checkpoint.weight_files(directory):
        with safe_open(str(file), framework="pt") as tensors:
            for key in set(tensors.keys()) & set(ours):
                part = tensors.get_slice(key)
                index = tuple(slice(0, min(size, 4)) for size in part.get_shape())
                stored = part[index] if index else tensors.get_tensor(key)
                here = ours[key][index] if index else ours[key]
                if stored.shape != here.shape or not torch.equal(stored.to(here.dtype), here.cpu()):
                    return False
                seen += 1
    return seen > 0


def _same_model(one: Path, other: Path) -> bool:
    return os.path.samefile(one, other) or references.digest(one) == references.digest(other)
