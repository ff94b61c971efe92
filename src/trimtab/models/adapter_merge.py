"""An adapter merged into its base, as a checkpoint that any engine can load.

Source: Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1: W + s B A has the shape of W, so it costs nothing to run.
"""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trimtab.core.errors import MemberMismatch, UnreadableModel
from trimtab.models import adapters
from trimtab.models.adapter_vocabulary import adapter_vocabulary
from trimtab.models.opening import load_model


@contextmanager
def merged(name: str, directory: Path, adapter: Path | None) -> Iterator[Path]:
    """The directory of a model with its adapter merged, for as long as the context lasts.

    directory   the model that the adapter sits on
    adapter     None: the directory itself
    raises      UnreadableModel, MemberMismatch when the adapter does not fit or does not fill its layers
    """
    if adapter is None:
        yield directory
        return
    with TemporaryDirectory(prefix="trimtab-merged-") as folder:
        _merge(name, directory, adapter, Path(folder))
        yield Path(folder)


def _merge(name: str, directory: Path, adapter: Path, target: Path) -> None:
    import peft
    import torch

    _check(name, directory, adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft says about merging concerns training
            # In float32: a sum rounded to a narrow type would lose most of a small delta. The engine rounds it once.
            plain = load_model(name, directory, torch.float32)
            _resize(name, plain, adapter)
            whole = peft.PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise MemberMismatch(
            f"the adapter '{name}' ({adapter}) cannot be merged: {str(error).strip().splitlines()[-1]}",
            "vLLM runs an expert as a model of its own.",
            "use the transformers engine, which keeps adapters apart.",
        ) from error
    # Of processes that share members each loads for itself; transformers would let the first one write only.
    whole.should_save_on_this_rank = lambda is_main_process: True
    whole.save_pretrained(target)
    if not any(target.glob("*.safetensors")):
        raise UnreadableModel(f"merging the adapter '{name}' wrote no weights.", fix="merge it by hand, then fuse.")


def _check(name: str, directory: Path, adapter: Path) -> None:
    """Raise for an adapter that does not fit, or lacks weights; the model that it is tried on is gone afterwards."""
    import torch

    adapters.read_config(name, adapter)  # refuses what is no adapter of weights
    model = load_model(name, directory, torch.bfloat16)  # what fits is a matter of names and shapes
    _resize(name, model, adapter)
    adapters.AdapterSwitch(model).attach(name, adapter)
    del model
    gc.collect()  # peft's layers and the model hold one another


def _resize(name: str, model: Any, adapter: Path) -> None:
    """Gives the base as many rows as an adapter that adds tokens brings."""
    rows = adapter_vocabulary(name, adapter, model).rows
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
