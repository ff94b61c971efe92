"""Small tables of the host's, sent to the device without waiting for it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sent(values: Sequence[Any], device: torch.device) -> Tensor:
    """A tensor of these numbers on a device; the host goes on at once.

    On CUDA a copy from ordinary memory waits until all that is queued before it is done; one from pinned memory is
    queued itself.
    """
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)
