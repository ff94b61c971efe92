"""Writes a fused directory without loading its members: seconds, and memory of a few tensors, for models of any size.

What is written is what loading the members and `save_pretrained` would write. What needs the models' computations is
not checked here: the first opening does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.logits import members as member_loading
from trimtab.logits import saving
from trimtab.logits.speculation.plan import Plan
from trimtab.logits.strategy.fusion import Strategy, as_strategy
from trimtab.models.loading import Placement
from trimtab.models.vocabulary import TokenSettings


def write_fused(
    target: Path,
    strong: Any,
    base: Any,
    experts: Mapping[str, Any],
    strategy: Strategy | str | Mapping[str, Any] = "dynamic",
    tokenizer: Any = None,
    prompts: Mapping[str, Any] | None = None,
    *,
    one_pass: bool | str = "auto",
    speculate: str | int = "auto",
    speculate_draft: str = "auto",
    chat_template: str | None = None,
    token_map: Mapping[str, Mapping[str, str]] | None = None,
    special_tokens: str | None = None,
    overwrite: bool = True,
) -> None:
    """Writes a fused directory from references, as `FusedCausalLM.from_members(...).save_pretrained(target)` does.

    strong, base, experts    paths, hub ids or zoo: names, never loaded models
    the rest                 as `from_members` and the properties of a fused model take it
    raises                   as `from_members`; what only a computation shows is left to the first opening
    warns                    TrimtabWarning for an expert that does not descend from the base or equals it, by samples
    """
    members = member_loading.gather(strong, base, experts, Placement(), is_outline=True)
    token_settings = TokenSettings(token_map or {}, special_tokens)
    config, tokenizer, _ = saving.settle(members, tokenizer, prompts or {}, one_pass, chat_template, token_settings)
    names = tuple(members.experts)
    config.strategy = as_strategy(strategy, names).to_dict()
    plan = Plan(speculate, speculate_draft).check(names)
    config.speculate, config.speculate_draft = plan.speculate, plan.draft
    member_loading.check_descent(members, None, config.vocab_size, prompts or ())
    saving.write_directory(config, members, tokenizer, target, overwrite)
