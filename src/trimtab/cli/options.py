"""Options that several commands share: which fused model, which strategy, how to sample."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.cli import methods
from trimtab.core.errors import InputError
from trimtab.core.registry import canonical, find
from trimtab.core.settings import parse, settings_of
from trimtab.logits.registry import AMOUNTS, CHOOSERS, DEFAULT_AMOUNT, DEFAULT_CHOOSER
from trimtab.studies.options import positive as positive

AUTO = "auto"


def quiet_transformers() -> None:
    """Loading reports of transformers are not for users of this program; its errors are."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# --- the fused model -----------------------------------------------------------------------------------------------


def add_members(parser: argparse.ArgumentParser) -> None:
    """--strong, --base, --expert: members by path, hub id (id@revision) or zoo: name."""
    group = parser.add_argument_group("members", "each a directory, a hub id (ID@REVISION) or a zoo: name")
    group.add_argument("--strong", metavar="MODEL", help="the big model, never trained")
    group.add_argument("--base", metavar="MODEL", help="the small untuned model")
    group.add_argument(
        "--expert",
        metavar="NAME=MODEL",
        action="append",
        default=[],
        help="the base after tuning, full weights or a LoRA adapter; may be given several times",
    )
    group.add_argument(
        "--prompt",
        metavar="MEMBER=FORM",
        action="append",
        default=[],
        help='how a member reads the prompt: "chat" for its chat template, or a text with {prompt}; '
        "MEMBER is strong, base or an expert's name",
    )
    group.add_argument(
        "--chat-template",
        metavar="FILE|MEMBER|NAME",
        help="how conversations are written: a file with a Jinja template, the template of a member, or a named one; "
        "by default the strong model's, or that of another member",
    )
    group.add_argument(
        "--map-token",
        metavar="EXPERT:A=B",
        action="append",
        default=[],
        help="a special token that was renamed: the expert's token A stands for the strong model's token B; may be "
        "given several times",
    )
    group.add_argument(
        "--special-tokens",
        choices=("strong",),
        help="strong: ids of special tokens mean in every member what they mean in the strong model",
    )


def add_directory(parser: argparse.ArgumentParser) -> None:
    """DIR, or members inline."""
    parser.add_argument("model", metavar="DIR", nargs="?", help="a fused directory; or give --strong, --base, --expert")
    add_members(parser)
    group = parser.add_argument_group("placement")
    group.add_argument(
        "--device", metavar="DEVICE", help="where all members run: cuda, cuda:1, auto (spread); else the CPU"
    )
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="number type of all members; else as stored"
    )
    add_speculation(parser)


def add_speculation(parser: argparse.ArgumentParser) -> None:
    """--speculate and --draft: small members write ahead, all members verify at once."""
    group = parser.add_argument_group("speed", "drafts change the speed, not the distribution of the text")
    group.add_argument(
        "--speculate",
        metavar="auto|N",
        help="tokens that a small member drafts for the others to verify: auto for as many as pay, 0 for none",
    )
    group.add_argument(
        "--draft",
        metavar="WHO",
        help="who drafts: an expert's name or base, recent (the expert with most weight in the last tokens), mixture "
        "(all experts), fused (the small models' own fusion), prompt (n-grams of the text) or auto (mixture where it "
        "costs no more than one expert, else recent)",
    )
    group.add_argument(
        "--one-pass",
        choices=("auto", "on", "off"),
        help="read the small members in one forward: auto where it pays, on for all of them, off for none",
    )


def one_pass_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for what --one-pass says; none where it was not given."""
    return {} if args.one_pass is None else {"one_pass": {"auto": "auto", "on": True, "off": False}[args.one_pass]}


def speculation_of(args: argparse.Namespace, present: str | int) -> tuple[str | int | None, str | None]:
    """What --speculate and --draft say: (speculate, who drafts), each None where it stays as it is.

    present   the model's own `speculate`
    raises    InputError for what is neither auto nor a number

    Who names a drafter wants drafts: where the model has none, that means auto.
    """
    text = args.speculate
    if text is None:
        return AUTO if args.draft is not None and present == 0 else None, args.draft
    if text == AUTO:
        return AUTO, args.draft
    if not re.fullmatch("-?[0-9]{1,9}", text):
        raise InputError(
            f"--speculate {text[:100]} cannot be read.", "Expected: auto or a number.", "for example auto."
        )
    return int(text), args.draft


def set_speculation(args: argparse.Namespace, fused: Any) -> None:
    """What --speculate and --draft say, set on a fused model; raises InputError for what cannot be."""
    speculate, draft = speculation_of(args, fused.speculate)
    if speculate is not None:
        fused.speculate = speculate
    if draft is not None:
        fused.speculate_draft = draft


def members_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `FusedCausalLM.from_members`; raises InputError where a member is missing."""
    missing = [f"--{role}" for role in ("strong", "base") if not getattr(args, role)]
    if not args.expert:
        missing.append("--expert")
    if missing:
        raise InputError(
            f"no {' and no '.join(missing)} was given.",
            "A fused model is a strong model, a base, and at least one expert tuned from that base.",
            "for example --strong zoo:strong --base zoo:small --expert facts=zoo:small/facts.",
        )
    experts = dict(named(expert, "--expert", allow_bare=True) for expert in args.expert)
    if len(experts) < len(args.expert):
        raise InputError("two experts have the same name.", fix="name each one: --expert NAME=MODEL.")
    prompts = dict(named(prompt, "--prompt") for prompt in args.prompt)
    found = {"strong": args.strong, "base": args.base, "experts": experts, "prompts": prompts or None}
    said = {"chat_template": args.chat_template, "special_tokens": args.special_tokens, "token_map": token_map_of(args)}
    return found | {name: value for name, value in said.items() if value}


def token_map_of(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """{expert: {its token: the strong model's}}; raises BadSetting for what cannot be read or is said twice."""
    from trimtab.models.vocabulary import read_pair

    found: dict[str, dict[str, str]] = {}
    for text in args.map_token:
        member, own, token = read_pair(text)
        if own in found.setdefault(member, {}):
            raise InputError(f"--map-token names {own} of '{member}' twice.", fix="leave one of them out.")
        found[member][own] = token
    return found


def named(text: str, option: str, allow_bare: bool = False) -> tuple[str, str]:
    """NAME=VALUE, or a bare model reference, which is named by its last part."""
    name, equals, value = text.partition("=")
    if equals and name and value:
        return name, value
    if not equals and allow_bare and text:
        return text.split("@")[0].rstrip("/").replace(":", "/").rsplit("/", 1)[-1], text
    raise InputError(f"{option} {text} cannot be read.", "Expected: NAME=VALUE.", f"for example {option} math=runs/m.")


def is_inline(args: argparse.Namespace) -> bool:
    """Whether members were given, in place of a fused directory."""
    return bool(args.strong or args.base or args.expert)


def check_pointed(args: argparse.Namespace) -> None:
    """Raise InputError unless a command was pointed at exactly one model."""
    if args.model and is_inline(args):
        raise InputError(
            f"both a directory ({args.model}) and members were given.", fix="give one or the other, not both."
        )
    if not args.model and not is_inline(args):
        raise InputError(
            "no model was given.", "Expected: a fused directory, or --strong, --base and --expert.", "add one of them."
        )
    for name in ("prompt", "chat_template", "map_token", "special_tokens"):
        if args.model and getattr(args, name):
            raise InputError(f"{methods.flag_of(name)} is part of a fused directory.", fix="give it to `trimtab fuse`.")


def open_fused(args: argparse.Namespace) -> Any:
    """The fused model that a command was pointed at, with the strategy that its options ask for."""
    from trimtab import FusedCausalLM

    check_pointed(args)
    quiet_transformers()
    placement = placement_of(args) | one_pass_of(args)
    if is_inline(args):
        members = members_of(args)
        names = tuple(members["experts"])
        fused = FusedCausalLM.from_members(**members, strategy=strategy_of(args, names), **placement)
    else:
        fused = FusedCausalLM.from_pretrained(args.model, **placement)
        if methods.is_changed(args):
            fused.strategy = strategy_of(args, tuple(fused.expert_names), fused.strategy.to_dict())
    set_speculation(args, fused)
    return fused.eval()


def placement_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of device and number type, as far as they were given; raises InputError for no such device."""
    import torch

    from trimtab.models.opening import is_spread

    found: dict[str, Any] = {}
    if args.dtype:
        found["dtype"] = getattr(torch, args.dtype)
    if args.device and is_spread(args.device):
        found["device"] = args.device
    elif args.device:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"device {args.device} cannot be used: {reason}", fix="leave it out for the CPU."
            ) from error
        found["device"] = args.device
    return found


# --- strategy ------------------------------------------------------------------------------------------------------


def add_strategy(parser: argparse.ArgumentParser, has_directory: bool = True) -> None:
    """--strategy, --chooser, and --set for the settings of either.

    has_directory   whether a fused directory has a strategy, which holds where nothing is said
    """
    promise = "how much of an expert's delta is added, and which experts speak"
    defaults = (None, None) if has_directory else (DEFAULT_AMOUNT, DEFAULT_CHOOSER)
    methods.add_methods(parser, "strategy", promise, (AMOUNTS, CHOOSERS), defaults)


def strategy_of(
    args: argparse.Namespace, expert_names: tuple[str, ...], present: Mapping[str, Any] | None = None
) -> Any:
    """The strategy that the options describe.

    present   what a fused directory has: kept where the options say nothing, settings only while the method stays
    """
    from trimtab.logits.strategy.fusion import make_strategy

    present = present or {"amount": DEFAULT_AMOUNT, "chooser": DEFAULT_CHOOSER, "settings": {}}
    amount, chooser = chosen_pair(args, present)
    kept: dict[str, Any] = {}
    given = methods.texts_of(args)
    for family, name, old in ((AMOUNTS, amount, present["amount"]), (CHOOSERS, chooser, present["chooser"])):
        kind = find(family, name)
        given = parse(kind, given)
        if name == canonical(family, old):
            settings = present["settings"]
            kept |= {item.name: settings[item.name] for item in settings_of(kind) if item.name in settings}
    return make_strategy(amount, chooser=chooser, expert_names=expert_names, **{**kept, **given})


def changed_strategy(args: argparse.Namespace, directory: Path) -> dict[str, Any] | None:
    """What the options make of a fused directory's strategy, read without its members; None: they say nothing."""
    if not methods.is_changed(args):
        return None
    from trimtab.logits import saving
    from trimtab.logits.strategy.fusion import strategy_from_dict

    config = saving.read_config(directory)
    names = tuple(saving.references_of(config)[2])
    present = strategy_from_dict(config.strategy or {}, names).to_dict()
    changed: dict[str, Any] = strategy_of(args, names, present).to_dict()
    return changed


def chosen_pair(args: argparse.Namespace, present: Mapping[str, Any]) -> tuple[str, str]:
    """Amount and chooser that the options name, or what a fused directory has."""
    amount = canonical(AMOUNTS, args.strategy or present["amount"])
    # A directory's chooser has nothing to choose where the options ask for an amount that uses no expert.
    kept = present["chooser"] if find(AMOUNTS, amount).uses_experts else DEFAULT_CHOOSER
    return amount, canonical(CHOOSERS, args.chooser or kept)


# --- values of options -----------------------------------------------------------------------------------------------


def not_negative(text: str) -> float:
    """A number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def share(text: str) -> float:
    """A number in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in (0, 1]")
    return value
