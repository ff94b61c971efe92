"""Who drafts: one small member, all of them together, or the text itself.

    NAME      that expert, or the base
    auto      mixture where several experts that may speak are read in one forward, and it costs no more; else recent
    recent    the expert that had most weight in the last accepted tokens
    mixture   the average of all experts' distributions
    fused     the small models' own fused distribution: the strategy with the base in the strong model's place
    prompt    no member: the text's own n-grams, looked up

Where the strategy's amount uses no expert, `recent` and `fused` are the base: no expert has any weight, and the small
models' own distribution is the base's. The report names who drafted. Without experts `mixture` and `fused` are refused.

A drafter need not be good for the text to be right: the output distribution is the fused one, whatever drafts. It
decides how many tokens of a draft are accepted.

Sources: Leviathan et al. 2023, arXiv 2211.17192, for a model; Saxena 2023, prompt lookup decoding.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.errors import BadSetting, unknown_name
from trimtab.logits.strategy.fusion import Strategy

CHEAPEST, RECENT, MIXTURE, FUSED, PROMPT = "auto", "recent", "mixture", "fused", "prompt"
RULES = (CHEAPEST, RECENT, MIXTURE, FUSED, PROMPT)
FORMER = {"lately": RECENT}  # names of rules that saved directories may hold
FADE = 0.9  # how much of an expert's weight is remembered per accepted token
NGRAM, LEAST_NGRAM = 4, 2  # longest and shortest ends of the text that are looked up


@dataclass(frozen=True)
class Drafter:
    """Who reads while a draft grows, and the distribution that its tokens are drawn from.

    name      as in the module's table, or the member's name
    members   those whose logits it needs, by name
    """

    name: str
    members: tuple[str, ...]
    strategy: Strategy | None = None

    def log_probs(self, log_probs: Sequence[Float[Tensor, "row vocab"]]) -> Float[Tensor, "row vocab"]:
        """Log-probabilities of the drafter from those of its members, in the order of `members`."""
        if self.strategy is not None:
            base, experts = log_probs[0], torch.stack(list(log_probs[1:]))
            return self.strategy(base, base, experts).log_probs
        if len(log_probs) == 1:
            return log_probs[0]
        return torch.stack(list(log_probs)).logsumexp(dim=0) - math.log(len(log_probs))


def until_end(tokens: Sequence[int], ends: Collection[int | None]) -> int:
    """How many drafted tokens of a row count: those up to the first that would end its text, or all."""
    return next((count for count, token in enumerate(tokens, 1) if token in ends), len(tokens))


def canonical_rule(rule: str) -> str:
    """The name of a rule for its former name; anything else as it is."""
    return FORMER.get(rule, rule)


def check_rule(rule: str, expert_names: Sequence[str]) -> None:
    """Raise UnknownName unless `rule` names a rule, an expert or the base; BadSetting where it lacks experts."""
    known = (*RULES, "base", *expert_names)
    if rule not in known:
        raise unknown_name("drafter", rule, known)
    if rule in (MIXTURE, FUSED) and not expert_names:
        raise BadSetting(
            f"speculate_draft is '{rule}', but there is no expert.",
            "Its drafts are made of the experts' distributions.",
            "pass speculate_draft='base' or 'prompt', or leave it out.",
        )


def settled(rule: str, strategy: Strategy, expert_names: Sequence[str], is_one_forward: bool) -> str:
    """The rule that "auto" stands for; any other as it is.

    is_one_forward   whether base and experts are read together, whichever drafts
    """
    if rule != CHEAPEST:
        return rule
    has_choice = len(expert_names) > 1 and strategy.amount.uses_experts and not strategy.chooser.is_fixed
    return MIXTURE if has_choice and is_one_forward else RECENT


def drafter_for(
    rule: str, expert_names: Sequence[str], strategy: Strategy, weights: Float[Tensor, " expert"]
) -> Drafter:
    """The drafter that a rule, which `check_rule` approves and `settled` has settled, stands for now.

    weights   [expert]   how much each expert weighed in the last accepted tokens, for the rule "recent"
    """
    if rule == PROMPT:
        return Drafter(PROMPT, ())
    if rule == MIXTURE:
        return Drafter(MIXTURE, tuple(expert_names))
    if rule in expert_names and rule not in RULES:  # an expert may be called "recent": it had that name first
        return Drafter(rule, (rule,))
    if rule == "base" or not expert_names or not strategy.amount.uses_experts:
        return Drafter("base", ("base",))
    if rule == FUSED:
        return Drafter(FUSED, ("base", *expert_names), strategy)
    heaviest = expert_names[int(weights.argmax())]
    return Drafter(heaviest, (heaviest,))


def lookup(ids: Sequence[int], most: int) -> list[int]:
    """What followed the last earlier place where the text read as it does at its end; [] when it never did.

    ids     the text so far
    most    how many tokens are wanted at most
    """
    for size in range(min(NGRAM, len(ids) - 1), LEAST_NGRAM - 1, -1):
        end = list(ids[-size:])
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start] == end[0] and list(ids[start : start + size]) == end:
                return list(ids[start + size : start + size + most])
    return []


def lookups(texts: Sequence[Sequence[int]], most: int) -> tuple[Int[Tensor, "row draft"], Int[Tensor, " row"]]:
    """Drafts of several texts, filled up with zeros, and their lengths."""
    found = [lookup(ids, most) for ids in texts]
    longest = max(map(len, found))
    draft = torch.tensor([ids + [0] * (longest - len(ids)) for ids in found], dtype=torch.long)
    return draft.view(len(found), longest), torch.tensor([len(ids) for ids in found])
