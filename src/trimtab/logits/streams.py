"""Lanes that share an accelerator, each on a stream of its own: small members fill what the strong one leaves free.

A lane's stream begins where the current one stands, and the current one goes on when every lane has ended. Between the
two no other work is queued, so that memory which one stream gives back is never in use by another.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trimtab.core.errors import BadSetting
from trimtab.logits.lanes import Lane

# Kinds of devices that work off what is queued while the processor queues more.
QUEUEING = ("cuda", "xpu")


class Streams:
    """A stream for each lane whose device reads another one, too; without any, everything stays as it is."""

    def __init__(self, lanes: Sequence[Lane], is_on: bool) -> None:
        devices = [lane.members[0].model.device for lane in lanes]
        counts = Counter(devices)
        shared = [device.type in QUEUEING and counts[device] > 1 for device in devices]
        if is_on and not any(shared):
            raise BadSetting(
                f"streams are on, but no accelerator reads several members: they are on {_listed(devices)}.",
                "Streams let forwards on one accelerator overlap.",
                "set fused.streams = False.",
            )
        self.is_on = is_on
        self._of = [
            _module(device).Stream(device=device) if is_on and has else None
            for device, has in zip(devices, shared, strict=True)
        ]
        self._devices = devices

    @contextmanager
    def forked(self) -> Iterator[None]:
        """Within the block lanes may be read in `of`; behind it the current streams have all that was read."""
        for stream, device in self._each():
            stream.wait_stream(_module(device).current_stream(device))
        try:
            yield
        finally:
            for stream, device in self._each():
                _module(device).current_stream(device).wait_stream(stream)

    @contextmanager
    def of(self, lane: int) -> Iterator[None]:
        """What is queued within the block goes to this lane's stream."""
        stream = self._of[lane]
        if stream is None:
            yield
            return
        with _module(self._devices[lane]).stream(stream):
            yield

    def _each(self) -> Iterator[tuple[Any, torch.device]]:
        for stream, device in zip(self._of, self._devices, strict=True):
            if stream is not None:
                yield stream, device


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _listed(devices: Sequence[torch.device]) -> str:
    return ", ".join(sorted({str(device) for device in devices}))
