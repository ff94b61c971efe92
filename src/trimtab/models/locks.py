"""Turns at a model: its modules are the same for all threads, so one reads while no other changes how it computes.

A group turns adapters on, or lets forwards stand in for those of modules, and then reads: all of it is one turn. Models
have turns of their own, so that different members are read at the same time.
"""

import threading
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_FOR_THE_TABLE = threading.Lock()


def model_lock(model: nn.Module) -> AbstractContextManager[Any]:
    """What a thread holds while it reads with a model: `with model_lock(model): ...`; a turn may stand in a turn.

    It is found by the model and kept nowhere else: locks cannot be copied, but models and groups can.
    """
    with _FOR_THE_TABLE:
        return _LOCKS.setdefault(model, threading.RLock())  # type: ignore[no-any-return]
