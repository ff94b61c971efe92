"""One named expert speaks at every step.

Source: ours; every other chooser is measured against it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.errors import BadSetting, unknown_name
from trimtab.core.settings import setting
from trimtab.logits.strategy.base import Chooser
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Only(Chooser):
    """The named expert, asked to meet its own targets."""

    is_fixed: ClassVar[bool] = True

    expert: str | None = setting(
        None, "the name of the expert that speaks; may be left out when there is only one", "name"
    )

    def check_names(self, names: tuple[str, ...]) -> None:
        """Raise unless the setting picks exactly one of the experts."""
        if self.expert is None and len(names) != 1:
            raise BadSetting(
                f"chooser 'only' does not say which of {len(names)} experts speaks.",
                f"Known: {', '.join(names)}." if names else "Experts need names to be chosen by name.",
                f"set expert={names[0]}." if names else "pass expert_names.",
            )
        if self.expert is not None and self.expert not in names:
            raise unknown_name("expert", self.expert, names)

    def narrowed(self, names: tuple[str, ...]) -> "Only":
        """Where one expert alone may speak, it does."""
        return replace(self, expert=names[0]) if len(names) == 1 else self

    def choose(self, step: Step, objective: Float[Tensor, "expert batch"] | None) -> Int[Tensor, " batch"]:
        """The same expert in every row."""
        if len(step.names) == 0 and self.expert is None and step.experts.shape[0] == 1:
            index = 0
        else:
            self.check_names(step.names)
            index = 0 if self.expert is None else step.names.index(self.expert)
        return torch.full_like(step.who[0], index)
