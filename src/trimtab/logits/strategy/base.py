"""What an amount and a chooser are, and what each says about itself.

An amount turns one expert's delta into a distribution: by an alpha along the delta, or written out. A chooser says
which expert speaks. `trimtab.logits.strategy.fusion` puts the two together; neither knows the other.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.settings import Configurable
from trimtab.logits.solver.deltas import DeltaTargets
from trimtab.logits.strategy.step import Step


class Ingredient(Configurable, ABC):
    """An amount or a chooser: a frozen dataclass of settings, and a pure function of one step.

    looks_back   whether it keeps anything from one call to the next; generation goes without drafts then, since a
                 draft shows it positions that the text never comes to
    """

    looks_back: ClassVar[bool] = False

    def check_names(self, names: tuple[str, ...]) -> None:
        """Raise BadSetting or UnknownName where a setting names an expert that is not among `names`."""
        return

    def narrowed(self, names: tuple[str, ...]) -> "Ingredient":
        """The same ingredient where only these experts may speak."""
        return self


class Amount(Ingredient):
    """What is done with an expert's delta.

    has_alpha      an alpha along the delta describes it: `alphas` is defined. Else `log_probs` is
    is_joint       all experts may speak at once: `joint_log_probs` is defined
    uses_experts   False: `joint_log_probs` is all there is, and no expert speaks
    uses_base      whether the base's distribution matters
    """

    has_alpha: ClassVar[bool] = False
    is_joint: ClassVar[bool] = False
    uses_experts: ClassVar[bool] = True
    uses_base: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {
            name for name in ("alphas", "log_probs", "joint_log_probs") if getattr(cls, name) is not vars(Amount)[name]
        }
        alone = {"alphas" if cls.has_alpha else "log_probs"} if cls.uses_experts else set()
        wanted = alone | ({"joint_log_probs"} if cls.is_joint or not cls.uses_experts else set())
        if own != wanted:
            raise TypeError(
                f"{cls.__qualname__} defines {', '.join(sorted(own)) or 'nothing'}.\n"
                f"  Expected: {', '.join(sorted(wanted))}, by has_alpha, is_joint and uses_experts.\n"
                "  Fix: define these methods, or correct these class variables."
            )

    def alphas(self, step: Step, deltas: DeltaTargets) -> Float[Tensor, "expert batch"]:
        """How far each expert alone moves the strong model along its delta. [expert, batch]

        deltas   the experts' deltas, and the divergences that each of them is asked to meet
        """
        raise NotImplementedError

    def log_probs(self, step: Step) -> Float[Tensor, "expert batch vocab"]:
        """The fused distribution of each expert alone: log-probabilities, normalised. [expert, batch, vocab]"""
        raise NotImplementedError

    def joint_log_probs(self, step: Step) -> Float[Tensor, "batch vocab"]:
        """The fused distribution of all experts together: log-probabilities, normalised. [batch, vocab]"""
        raise NotImplementedError


class Chooser(Ingredient):
    """Which expert speaks at a step.

    is_joint         all experts speak at once, for amounts that are joint, too
    is_fixed         the same expert speaks at every step, known beforehand
    uses_objective   experts are compared by what their distributions reach: each is fused alone, asked to meet the
                     targets of all, and `choose` gets the objectives. Else each meets its own targets
    """

    is_joint: ClassVar[bool] = False
    is_fixed: ClassVar[bool] = False
    uses_objective: ClassVar[bool] = False

    @abstractmethod
    def choose(self, step: Step, objective: Float[Tensor, "expert batch"] | None) -> Int[Tensor, " batch"] | None:
        """The index of the expert that speaks, [batch]; None: all of them, for choosers that are joint.

        objective   [expert, batch] of each expert alone, nats squared: the distance between its divergences and the
                    targets of all experts; None unless `uses_objective`
        """
