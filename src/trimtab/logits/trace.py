"""What happened at every step of a generation: who spoke, how loudly, and what each member thought."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from trimtab.core.divergence import entropy_nats
from trimtab.logits.forward.reader import MemberLogProbs
from trimtab.logits.strategy.fusion import Fusion

TOP = 5


@dataclass(frozen=True)
class TraceStep:
    """One generated token.

    alpha           {expert: amount}, 0 for experts that did not speak; None where the strategy has no alpha
    chosen          experts that spoke
    kl_nats         KL(fused || strong); reverse_kl_nats is KL(strong || fused)
    entropy_nats    {"strong", "base", each expert, "fused": entropy}
    top5            {the same names: [(token, probability), ...]}, most likely first
    """

    token_id: int
    token: str
    alpha: dict[str, float] | None
    chosen: list[str]
    kl_nats: float
    reverse_kl_nats: float
    entropy_nats: dict[str, float]
    top5: dict[str, list[tuple[str, float]]]


@dataclass(frozen=True)
class Trace:
    """One generated text, step by step. MemberLogProbs are those before temperature, top-k and other processors.

    speculation    what was drafted and what stood, or why nothing was drafted (`SpeculationReport.to_dict`)
    """

    prompt: str
    text: str
    strategy: dict[str, Any]
    expert_names: list[str]
    steps: list[TraceStep]
    speculation: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Trace":
        """A trace from what `to_dict` gave, also after a detour through JSON."""
        steps = []
        for step in content["steps"]:
            top5 = {name: [(token, prob) for token, prob in tokens] for name, tokens in step["top5"].items()}
            steps.append(TraceStep(**{**step, "top5": top5}))
        return cls(**{**content, "steps": steps})


def trace_steps(
    tokenizer: Any, token_ids: Sequence[int], members: MemberLogProbs, fusion: Fusion, expert_names: Sequence[str]
) -> list[TraceStep]:
    """One step per row of the distributions; token_ids are the tokens that were generated there."""
    by_name = {"strong": members.strong, "base": members.base}
    by_name |= dict(zip(expert_names, members.experts, strict=True)) | {"fused": fusion.log_probs}
    entropies = {name: entropy_nats(log_probs).tolist() for name, log_probs in by_name.items()}
    tops = {name: top_tokens(tokenizer, log_probs) for name, log_probs in by_name.items()}
    alphas = None if fusion.alpha is None else fusion.alpha.tolist()  # [expert][row]
    is_chosen = fusion.is_chosen.tolist()
    return [
        TraceStep(
            token_id=token_id,
            token=token_text(tokenizer, token_id),
            alpha=None if alphas is None else {name: alphas[e][row] for e, name in enumerate(expert_names)},
            chosen=[name for e, name in enumerate(expert_names) if is_chosen[e][row]],
            kl_nats=float(fusion.kl_nats[row]),
            reverse_kl_nats=float(fusion.reverse_kl_nats[row]),
            entropy_nats={name: values[row] for name, values in entropies.items()},
            top5={name: rows[row] for name, rows in tops.items()},
        )
        for row, token_id in enumerate(token_ids)
    ]


def top_tokens(tokenizer: Any, log_probs: Float[Tensor, "row vocab"]) -> list[list[tuple[str, float]]]:
    """Per row the most likely tokens and their probabilities."""
    top = log_probs.topk(min(TOP, log_probs.shape[-1]), dim=-1)
    rows = zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
    return [[(token_text(tokenizer, i), p) for i, p in zip(ids, probs, strict=True)] for ids, probs in rows]


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token as text; without a tokenizer its id."""
    return str(token_id) if tokenizer is None else str(tokenizer.decode([token_id]))
