"""Groups that share an accelerator, each on a stream of its own: small members fill what the strong one leaves free.

A group's stream begins where the current one stands, and the current one goes on when every group has ended. Between
the two the thread queues no other work. Each thread has streams of its own: memory that a stream gives back is taken
again by work on the same stream, which may be another thread's where they share it, and what the current stream still
reads would be written over.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from trimtab.core.errors import BadSetting
from trimtab.logits.forward.groups import ForwardGroup

# Kinds of devices that work off what is queued while the processor queues more.
QUEUEING = ("cuda", "xpu")


# Each thread's streams, per setting. They are not kept on the model, which can be copied, as a thread's own cannot.
_OF_THREAD = threading.local()


class Streams:
    """A stream for each group whose device reads another one, too; without any, everything stays as it is."""

    def __init__(self, groups: Sequence[ForwardGroup], is_on: bool) -> None:
        devices = [group.members[0].model.device for group in groups]
        counts = Counter(devices)
        shared = [device.type in QUEUEING and counts[device] > 1 for device in devices]
        if is_on and not any(shared):
            raise BadSetting(
                f"streams are on, but no accelerator reads several members: they are on {_listed(devices)}.",
                "Streams let forwards on one accelerator overlap.",
                "set fused.streams = False.",
            )
        self.is_on = is_on
        self._shared = [is_on and has for has in shared]
        self._devices = devices

    @contextmanager
    def forked(self) -> Iterator[None]:
        """Within the block groups may be read in `of`; behind it the current streams have all that was read."""
        for stream, device in self._each():
            stream.wait_stream(_module(device).current_stream(device))
        try:
            yield
        finally:
            for stream, device in self._each():
                _module(device).current_stream(device).wait_stream(stream)

    @contextmanager
    def of(self, group: int) -> Iterator[None]:
        """What is queued within the block goes to this group's stream."""
        if not self._shared[group]:
            yield
            return
        with _module(self._devices[group]).stream(self._own()[group]):
            yield

    def hand_over(self, group: int, logits: Sequence[Tensor]) -> None:
        """What a group has made stays in memory until the current stream, which reads it behind the block, is done."""
        if self._shared[group]:
            stream = _module(self._devices[group]).current_stream(self._devices[group])
            for part in logits:
                _record(part, stream)

    def _own(self) -> list[Any]:
        """This thread's streams, one per group; None for groups that need none."""
        if not hasattr(_OF_THREAD, "streams"):
            _OF_THREAD.streams = WeakKeyDictionary()
        if self not in _OF_THREAD.streams:
            _OF_THREAD.streams[self] = [
                _module(device).Stream(device=device) if is_shared else None
                for device, is_shared in zip(self._devices, self._shared, strict=True)
            ]
        return _OF_THREAD.streams[self]  # type: ignore[no-any-return]

    def _each(self) -> Iterator[tuple[Any, torch.device]]:
        if not any(self._shared):
            return
        for stream, device in zip(self._own(), self._devices, strict=True):
            if stream is not None:
                yield stream, device


def _record(logits: Tensor, stream: Any) -> None:
    logits.record_stream(stream)


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _listed(devices: Sequence[torch.device]) -> str:
    return ", ".join(sorted({str(device) for device in devices}))
