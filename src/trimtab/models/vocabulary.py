"""Which tokens are fused, and which id of each member stands for them.

The strong model's tokens are the reference: a fused id means what it means to the strong model. Ordinary tokens must be
equal in all members. An id that the strong model cannot emit, or that has no token, is cut. An id that a small member
lacks has delta 0, so that the strong model alone decides about it. Special tokens that were renamed need the user's
word, see `TokenSettings`.
"""

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trimtab.core.errors import BadSetting, UnreadableModel, VocabularyMismatch, unknown_name
from trimtab.models.token_ids import FusedVocabulary, MemberIds

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
SHOWN = 5
LARGEST_GAP = 0.1  # share of the tokenizer's tokens that a member may lack before it counts as another vocabulary
GIVEN = "the tokenizer given"
STRONG = "strong"
STAND_INS = ("unk_token_id", "pad_token_id", "eos_token_id", "bos_token_id")


def load_tokenizer(directory: Path) -> Any | None:
    """The tokenizer beside a model; None when there is none."""
    options = {}
    if directory.is_file():  # a GGUF file holds a tokenizer, too; files beside it are what its publisher made it from
        directory, options = directory.parent, {"gguf_file": directory.name}
    if any((directory / file).is_file() for file in TOKENIZER_FILES):
        options = {}
    elif not options:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds here, from KeyError to the Rust side's own
        raise UnreadableModel(
            f"the tokenizer in '{directory}' cannot be read: {error}.", fix="save it again with save_pretrained."
        ) from error


@dataclass(frozen=True)
class TokenSettings:
    """What the user says about special tokens that members have under different names.

    token_map        {member: {A: B}}: the member's token A stands for the strong model's token B
    special_tokens   "strong": an id of a special token means in every member what it means in the strong model
    """

    token_map: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    special_tokens: str | None = None

    def __post_init__(self) -> None:
        if self.special_tokens not in (None, STRONG):
            raise BadSetting(
                f"special_tokens is {self.special_tokens!r}.",
                "Known: 'strong', by which ids of special tokens mean what they mean in the strong model.",
                "pass special_tokens='strong', or leave it out.",
            )

    def to_dict(self) -> dict[str, Any]:
        """For `config.json`; empty where nothing was said."""
        maps = {name: dict(pairs) for name, pairs in self.token_map.items() if pairs}
        parts = {"token_map": maps or None, "special_tokens": self.special_tokens}
        return {name: value for name, value in parts.items() if value is not None}


@dataclass(frozen=True)
class MemberTokens:
    """What is known of one member's vocabulary.

    rows        of its output layer, padding included
    embedded    rows of its input embeddings
    tokenizer   what its ids mean; None: unknown, so they are taken to mean what they mean in the fused tokenizer
    resized     rows of the embeddings that the member's adapter brings; None: it has those of its base
    """

    rows: int
    embedded: int
    tokenizer: Any = None
    resized: int | None = None


def fuse_vocabularies(
    members: Mapping[str, MemberTokens], tokenizer: Any = None, token_settings: TokenSettings | None = None
) -> FusedVocabulary:
    """The fused vocabulary of these members, the strong model first.

    tokenizer   the fused one; None: that of the strong model, or of the first member that has one
    raises      VocabularyMismatch when ordinary tokens differ, when special tokens were renamed and nothing is said
                about them, when a member lacks too many tokens, and without any tokenizer when sizes differ
    """
    token_settings = token_settings or TokenSettings()
    named = {name: member.tokenizer for name, member in members.items() if member.tokenizer is not None}
    reference = GIVEN if tokenizer is not None else next(iter(named), "")
    tokenizer = tokenizer if tokenizer is not None else next(iter(named.values()), None)
    if tokenizer is None:
        return FusedVocabulary(_common_rows(members))
    tokens = tokens_of(tokenizer)
    _check_members(token_settings, [name for name in members if name != reference])
    compared = {
        name: _compare(name, member, tokens, tokenizer, reference, token_settings) for name, member in members.items()
    }
    _refuse_renamed({name: found.renamed for name, found in compared.items()}, tokens, members, reference)
    strong = compared[STRONG] if STRONG in compared else next(iter(compared.values()))
    emitted = tokens.keys() - strong.lacking
    if not emitted:
        raise VocabularyMismatch("no token of the tokenizer is known to the strong model.", fix="pass its tokenizer.")
    size = max(emitted) + 1
    small = [found for name, found in compared.items() if found is not strong]
    strong_only = frozenset().union(*(found.lacking for found in small)) & emitted
    return FusedVocabulary(
        size,
        cut=frozenset(range(size)) - emitted,
        strong_only=strong_only,
        members={name: found.ids.below(size) for name, found in compared.items()},
        remark=_remark(compared, tokens, emitted, strong_only),
    )


def tokens_of(tokenizer: Any) -> dict[int, str]:
    """{id: token} of a tokenizer."""
    return {index: token for token, index in tokenizer.get_vocab().items()}


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of tokens that were added to the vocabulary, or have a role in it."""
    return set(getattr(tokenizer, "added_tokens_decoder", ())) | set(tokenizer.all_special_ids)


# ---- one member beside the reference


@dataclass(frozen=True)
class _Compared:
    """One member's vocabulary beside the reference.

    lacking   ids of the reference for which it has no token, or no row
    stand_in  the token that it reads for ids that it has no row for
    own       {id: token} that only it has
    renamed   [(id, token of the reference, its token)] of which nothing is known
    """

    ids: MemberIds
    lacking: frozenset[int]
    own: dict[int, str]
    renamed: list[tuple[int, str, str]]
    stand_in: str

    def is_blind_to(self, index: int) -> bool:
        """Whether the member reads its stand-in for an id."""
        return (
            index >= (self.ids.embedded or 0)
            if index not in self.ids.reads
            else self.ids.reads[index] == self.ids.stand_in
        )


def _compare(
    name: str,
    member: MemberTokens,
    tokens: Mapping[int, str],
    tokenizer: Any,
    reference: str,
    token_settings: TokenSettings,
) -> _Compared:
    own_tokenizer = tokenizer if member.tokenizer is None else member.tokenizer
    theirs = tokens if own_tokenizer is tokenizer else tokens_of(own_tokenizer)
    rows = min(member.rows, member.embedded) if name == STRONG else member.rows
    pairs = _pairs(name, token_settings.token_map.get(name, {}), theirs, tokens)
    taken, sources = set(pairs.values()), {i: own for i, own in pairs.items() if own < rows}
    differing = set() if theirs == tokens else {i for i in tokens.keys() | theirs if tokens.get(i) != theirs.get(i)}
    clashing = {i for i in differing if i in tokens and i in theirs} - pairs.keys() - taken
    special = special_ids(tokenizer) & special_ids(own_tokenizer)
    if clashing - special:
        raise _mismatch(reference, name, tokens, theirs, sorted(differing))
    unknown = {i for i in tokens if i >= rows} | {i for i in differing if i not in theirs}
    lacking = (unknown | taken | pairs.keys()) - sources.keys()
    _check_gap(name, member, len(lacking), tokens)
    stand_in = _stand_in(own_tokenizer, member.embedded)
    # A token that stands for another one is still read at its own id where that means the same in both.
    reads = dict.fromkeys(taken & differing, stand_in)
    reads |= {i: own if own < member.embedded else stand_in for i, own in pairs.items()}
    return _Compared(
        MemberIds(
            reads={i: own for i, own in reads.items() if i != own},
            scores={i: own for i, own in sources.items() if i != own},
            embedded=member.embedded,
            stand_in=stand_in,
            resized=member.resized,
        ),
        frozenset(lacking),
        {i: theirs[i] for i in differing if i not in tokens and i not in taken},
        [] if token_settings.special_tokens == STRONG else [(i, tokens[i], theirs[i]) for i in sorted(clashing)],
        theirs.get(stand_in, str(stand_in)),
    )


def _pairs(name: str, pairs: Mapping[str, str], theirs: Mapping[int, str], tokens: Mapping[int, str]) -> dict[int, int]:
    """{fused id: the member's id that stands for it}, from what the user says."""
    if not pairs:
        return {}
    own_ids, ids = ({token: i for i, token in known.items()} for known in (theirs, tokens))
    found: dict[int, int] = {}
    for own, token in pairs.items():
        for text, known, owner in ((own, own_ids, f"'{name}'"), (token, ids, "the strong model")):
            if text not in known:
                near = get_close_matches(text, known, n=1)
                raise VocabularyMismatch(
                    f"the token map of '{name}' says {own!r} = {token!r}, but {owner} has no token {text!r}.",
                    "Expected: a token of the member, and the strong model's token that it stands for.",
                    f"did you mean {near[0]!r}?" if near else "correct the spelling.",
                )
        if ids[token] in found:
            raise VocabularyMismatch(
                f"the token map of '{name}' gives {token!r} twice.",
                "One token of a member stands for one of the strong model.",
                "leave one of them out.",
            )
        found[ids[token]] = own_ids[own]
    return found


def _stand_in(tokenizer: Any, embedded: int) -> int:
    """What a member reads in place of an id that it has no row for."""
    ids = [getattr(tokenizer, name, None) for name in STAND_INS]
    return next((i for i in ids if i is not None and i < embedded), 0)


# ---- refusals


def _common_rows(members: Mapping[str, MemberTokens]) -> int:
    """The rows that all members have, where no tokenizer tells padding from tokens."""
    if len({member.rows for member in members.values()}) > 1:
        sizes = ", ".join(f"'{name}' {member.rows}" for name, member in members.items())
        raise VocabularyMismatch(
            f"the members score different numbers of tokens: {sizes}.",
            "Without a tokenizer, padding rows cannot be told from tokens.",
            "pass tokenizer=..., so that padding rows can be cut.",
        )
    return next(iter(members.values())).rows


def _check_members(token_settings: TokenSettings, known: Iterable[str]) -> None:
    for name in token_settings.token_map:
        if name not in known:
            raise unknown_name("member with tokens to be mapped", name, known)


def _check_gap(name: str, member: MemberTokens, lacking: int, tokens: Mapping[int, str]) -> None:
    if lacking > LARGEST_GAP * len(tokens):
        raise VocabularyMismatch(
            f"member '{name}' scores {member.rows} tokens, the tokenizer has {len(tokens)}: {lacking} are missing.",
            f"A member may lack special tokens, but no more than {LARGEST_GAP:.0%} of the vocabulary.",
            "use members that share one tokenizer, or pass the tokenizer that belongs to them.",
        )


def _mismatch(
    reference: str, name: str, tokens: Mapping[int, str], theirs: Mapping[int, str], differing: list[int]
) -> VocabularyMismatch:
    shown = [f"id {i} is {_shown(tokens.get(i))} and {_shown(theirs.get(i))}" for i in differing[:SHOWN]]
    more = f", and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return VocabularyMismatch(
        f"the tokenizers of '{reference}' and '{name}' differ in {len(differing)} tokens: {'; '.join(shown)}{more}.",
        "Logits can be added only where the same id means the same token; only special tokens may differ.",
        "use members that share one tokenizer.",
    )


def _refuse_renamed(
    renamed: Mapping[str, list[tuple[int, str, str]]],
    tokens: Mapping[int, str],
    members: Mapping[str, MemberTokens],
    reference: str,
) -> None:
    """The error for renamed special tokens; it prints what the user may say about them."""
    renamed = {name: found for name, found in renamed.items() if found}
    if not renamed:
        return
    ids = {token: i for i, token in tokens.items()}
    pairs: dict[str, dict[str, str]] = {}
    for name, found in renamed.items():
        own = members[name].tokenizer.get_vocab()
        pairs[name] = {}
        for _, token, theirs in found:
            # A token that both have, at different ids, stands for itself; else the name at this id was changed.
            pairs[name] |= {token: token} if token in own else {}
            pairs[name] |= {theirs: theirs} if theirs in ids else {} if token in own else {theirs: token}
    first = [
        f"id {i} is {ours!r} and in '{name}' {theirs!r}" for name, found in renamed.items() for i, ours, theirs in found
    ]
    more = f", and {len(first) - SHOWN} more" if len(first) > SHOWN else ""
    options = [shlex.join(("--map-token", written_pair(n, a, b))) for n, own in pairs.items() for a, b in own.items()]
    python = f"token_map={pairs!r} or special_tokens='strong'"
    by_option = (
        f"add\n    {' '.join(options)}\n"
        "  or, for all special tokens of all members, by their ids,\n"
        f"    --special-tokens strong\n  (in Python {python})"
    )
    raise VocabularyMismatch(
        f"special tokens have different names: {'; '.join(first[:SHOWN])}{more}.",
        "Whether they mean the same cannot be seen; ordinary tokens agree.",
        # Only Python takes a tokenizer beside those of the members.
        f"if they do, {f'pass {python}, or leave tokenizer= out' if reference == GIVEN else by_option}.",
    )


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)


# ---- what the user is told, and says


def _remark(
    compared: Mapping[str, _Compared], tokens: Mapping[int, str], emitted: Collection[int], strong_only: Collection[int]
) -> str:
    """One line: which tokens are cut, and which have delta 0; empty where there are none."""
    cut = {i: tokens[i] for i in sorted(tokens.keys() - set(emitted))}
    for found in compared.values():
        cut |= {i: token for i, token in sorted(found.own.items()) if i not in emitted}
    told = []
    if cut:
        told.append(f"{_listed(_tokens(cut))} cut, missing in the strong model or the fused tokenizer")
    if strong_only:
        ids = {i: tokens[i] for i in sorted(strong_only)}
        lacking = {name: found for name, found in compared.items() if found.lacking & ids.keys()}
        told.append(f"{_listed(_tokens(ids))} with delta 0, missing in {_listed(map(repr, lacking))}")
        readers: dict[str, list[str]] = {}
        for name, found in lacking.items():
            if any(map(found.is_blind_to, ids)):
                readers.setdefault(found.stand_in, []).append(repr(name))
        told += [f"{_listed(names)} read {token!r} in place of ids without a row" for token, names in readers.items()]
    return f"vocabulary: {'; '.join(told)}." if told else ""


def _tokens(tokens: Mapping[int, str]) -> list[str]:
    return [f"{token!r} ({i})" for i, token in tokens.items()]


def _listed(items: Iterable[str]) -> str:
    found = list(items)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def written_pair(member: str, own: str, token: str) -> str:
    """EXPERT:A=B as the command line takes it; a backslash stands before a separator that is part of a name."""
    escaped = [re.sub(rf"([\\{separator}])", r"\\\1", text) for text, separator in ((member, ":"), (own, "="))]
    return f"{escaped[0]}:{escaped[1]}={token}"


def read_pair(text: str) -> tuple[str, str, str]:
    """Member, its token and the strong model's token, from EXPERT:A=B.

    raises    BadSetting for anything else
    """
    found = re.fullmatch(r"((?:\\.|[^\\:])+):((?:\\.|[^\\=])+)=(.+)", text, flags=re.DOTALL)
    if found is None:
        raise BadSetting(
            f"--map-token {text} cannot be read.",
            "Expected: EXPERT:A=B, the expert's token A stands for the strong model's token B.",
            "for example --map-token 'math:<|im_end|>=<|eot_id|>'; write \\= for an equals sign within A.",
        )
    member, own, token = found.groups()
    return re.sub(r"\\(.)", r"\1", member), re.sub(r"\\(.)", r"\1", own, flags=re.DOTALL), token
