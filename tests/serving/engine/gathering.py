"""What a test sends to the processes that share an engine's members: it must be importable there, by this name."""

import time
from contextlib import ExitStack

import pytest
import torch
from vllm.distributed import get_tp_group

LATE = 0.2  # seconds for which the first process lets the second one run ahead, before each body's logits


def without_gather(model):
    """The shape of this process's logits when only the first process gathers them, None for none; all run this.

    torch.distributed gathers here. In vLLM's own way on CPUs, through shared memory with two buffers, the others do not
    wait for the first process as long as a piece fits into a buffer: the third gather in a row overtakes it, and it
    waits for ever. vLLM itself gathers to all processes, on every platform of its own, and there each waits.
    """
    group = get_tp_group()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as hooks:
        patch.setattr(group.device_communicator, "dist_module", torch.distributed)
        for body in model.bodies:
            patch.setattr(body.logits_processor, "use_all_gather", False)
            if group.is_first_rank:
                hook = body.logits_processor.register_forward_pre_hook(lambda *_: time.sleep(LATE))
                hooks.callback(hook.remove)
        found = model.compute_logits(torch.zeros(2, sum(model.widths)))
    return None if found is None else list(found.shape)
