"""Groups on different devices are read at the same time: one thread per device, groups of one device in their order.

A forward spends the processor's time on starting operations; while one device computes, another one's can be started.
On one device nothing changes: all groups are one queue, read in the calling thread.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from trimtab.logits.forward.groups import ForwardGroup

MOST_DEVICES = 16  # devices of one machine
_POOL: list[ThreadPoolExecutor] = []
_FOR_THE_POOL = threading.Lock()


def devices_of(group: ForwardGroup) -> frozenset[str]:
    """The devices that a group's forward uses; of members that are spread, all of theirs."""
    found: set[str] = set()
    for member in group.members:
        spread = getattr(member.model, "hf_device_map", None) or {"": member.model.device}
        # "disk" and "cpu" hold what is moved to the device that computes, by the processor.
        found |= {_name(device) for device in spread.values()}
    return frozenset(found)


def queues(devices: Sequence[frozenset[str]]) -> list[list[int]]:
    """Which groups are read one after the other: those that share a device, however indirectly.

    devices    of each group
    returns    lists of groups, each ascending, the first group's queue first; queues can be read at the same time
    """
    found: list[tuple[set[str], list[int]]] = []
    for index, used in enumerate(devices):
        touching = [queue for queue in found if queue[0] & used]
        devices_used = set(used).union(*(queue[0] for queue in touching))
        indices = [other for queue in touching for other in queue[1]] + [index]
        found = [queue for queue in found if queue not in touching] + [(devices_used, indices)]
    return sorted(sorted(indices) for _, indices in found)


def run_queues(all_queues: Sequence[Sequence[int]], read: Callable[[int], Any]) -> dict[int, Any]:
    """{group: what `read` gave}, queue by queue at the same time; the first queue in the calling thread.

    raises    what the earliest group raised, after every queue has ended: none goes on writing to a cache
    """
    if len(all_queues) == 1:
        return {index: read(index) for index in all_queues[0]}
    settings = _torch_settings()

    def read_queue(queue: Sequence[int]) -> dict[int, Any]:
        with _applied(settings):
            return {index: read(index) for index in queue}

    others: list[Future[dict[int, Any]]] = [_pool().submit(read_queue, queue) for queue in all_queues[1:]]
    try:
        found = {index: read(index) for index in all_queues[0]}
    finally:
        wait(others)
    for other in others:
        found |= other.result()
    return found


def _pool() -> ThreadPoolExecutor:
    with _FOR_THE_POOL:
        if not _POOL:
            _POOL.append(ThreadPoolExecutor(MOST_DEVICES, thread_name_prefix="trimtab-device"))
        return _POOL[0]


def _torch_settings() -> tuple[bool, list[tuple[str, torch.dtype]]]:
    """What torch keeps per thread: inference mode, and the number types of autocast where it is on."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kinds = {"cpu"} | ({accelerator.type} if accelerator is not None else set())
    autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in sorted(kinds) if torch.is_autocast_enabled(kind)]
    return torch.is_inference_mode_enabled(), autocast


@contextmanager
def _applied(settings: tuple[bool, list[tuple[str, torch.dtype]]]) -> Iterator[None]:
    is_inference, autocast = settings
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(is_inference))
        for kind, dtype in autocast:
            stack.enter_context(torch.autocast(kind, dtype))
        yield


def _name(device: Any) -> str:
    if device == "disk":
        return "cpu"
    if isinstance(device, int):  # accelerate numbers the devices of the accelerator that there is
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return f"{accelerator.type if accelerator is not None else 'cuda'}:{device}"
    return str(torch.device(device))
