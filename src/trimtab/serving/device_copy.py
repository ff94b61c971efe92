"""Small tables copied from host to device without waiting for the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """A tensor of these numbers on a device; returns before the copy is done.

    On CUDA a copy from ordinary memory waits for all work that is queued before it. One from pinned memory is queued.
    """
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)
