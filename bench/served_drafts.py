"""How long drafts should be under load: the fused model, one server for each length, beside the strong model alone.

    strong alone    vLLM's own server on the strong member
    N drafted       `trimtab serve` of the fused directory, the expert drafting N tokens at a time

Members, servers and requests are those of `serving`, so many at a time.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from bench import serving
from bench.harness import Findings, Options, Progress
from bench.served_members import Directories
from bench.serving import Form

LENGTHS, QUICK_LENGTHS = (1, 2, 4, 8), (1, 4)  # every server is up at once, and takes memory


def measure(options: Options, progress: Progress) -> Findings:
    """All servers in turn; reported are the loads whose name holds `options.only`."""
    form = replace(serving.form_of(options), shares=())
    lengths = QUICK_LENGTHS if options.is_quick else LENGTHS
    started = partial(commands, lengths=lengths)
    found = serving.run_campaign("Drafts under load", NOTES, form, options, progress, started)
    found.settings["drafted"] = list(lengths)
    return found


NOTES = [
    *serving.NOTES_ON_WORK,
    "One server for each length of the expert's drafts. Acceptance: the share of drafted tokens that were accepted.",
]


def commands(form: Form, members: Directories, lengths: Sequence[int]) -> dict[str, list[str]]:
    """What is started for each arm."""
    started = {serving.STRONG: serving.strong_command(form, members)}
    return started | {f"{length} drafted": serving.fused_command(form, members, length) for length in lengths}
