"""What a test sends to the processes that share an engine's members: it must be importable there, by this name."""

import time

import torch
from vllm.distributed import get_tp_group

LATE = 0.2  # seconds for which the first process lets the second one run ahead, before each body's logits


def without_gather(model):
    """The shape of this process's logits when only the first process gathers them, None for none; all run this.

    torch.distributed gathers here: vLLM's own way on CPUs, shared memory of two buffers, waits for the first process
    in no gather, and three of them in a row hang where that one is late. vLLM itself gathers to all processes on
    every platform of its own, where each waits for the others.
    """
    communicator = get_tp_group().device_communicator
    shared_memory, communicator.dist_module = communicator.dist_module, torch.distributed
    hooks = []
    for body in model.bodies:
        body.logits_processor.use_all_gather = False
        if get_tp_group().is_first_rank:
            hooks.append(body.logits_processor.register_forward_pre_hook(lambda *_: time.sleep(LATE)))
    found = model.compute_logits(torch.zeros(2, sum(model.widths)))
    for body in model.bodies:
        body.logits_processor.use_all_gather = True
    for hook in hooks:
        hook.remove()
    communicator.dist_module = shared_memory
    return None if found is None else list(found.shape)
