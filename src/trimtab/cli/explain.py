"""Write a page that shows, token by token, which expert spoke, how loudly, and how far the strong model was moved.

The page is one HTML file that needs no network: hover or focus a token to see alphas, divergences, entropies and every
member's five likeliest tokens. A plot of alpha over the steps is written beside it.
"""

import argparse
from pathlib import Path

from trimtab.cli import options, output, prompting
from trimtab.cli.generate import take_prompt_from_model
from trimtab.core.errors import EmptyPrompt, InputError
from trimtab.core.files import write_whole

EXAMPLE = (
    "trimtab explain --strong zoo:strong --base zoo:small --expert facts=zoo:small/facts "
    '--chat "Where does Ada Moss live?" -o runs/explain.html'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, one prompt, where to write."""
    options.add_directory(parser)
    prompting.add_prompts(parser)
    prompting.add_conversation(parser)
    parser.add_argument("-o", "--output", metavar="HTML", type=Path, default=Path("explain.html"), help="the page")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument("--max-new-tokens", type=options.positive, default=64, help="longest answer, in tokens")
    options.add_strategy(parser)


def run(args: argparse.Namespace) -> None:
    """Trace one greedy answer and write page and plot."""
    from trimtab.measure.explain_page import explain_page
    from trimtab.measure.plots import alpha_plot

    take_prompt_from_model(args)
    options.check_pointed(args)
    if len(args.prompts) != 1:
        raise InputError(f"{len(args.prompts)} prompts were given.", "A page explains one answer.", "give one prompt.")
    (prompt,) = prompting.prompts_from(args)
    if not prompt:
        raise EmptyPrompt("the prompt is empty.", "There is nothing to continue.", "give at least one token.")
    (asked,), chat = prompting.as_asked(args, [prompt]), prompting.template_arguments(args)
    page = output.claim_file(args.output, args.force)
    plot = output.claim_file(args.output.with_suffix(".png"), args.force)
    fused = options.open_fused(args)
    trace = fused.trace(asked, chat, max_new_tokens=args.max_new_tokens, do_sample=False).to_dict()
    write_whole(page, explain_page(trace))
    alpha_plot(trace, plot)
    result = {"page": str(page), "plot": str(plot), "trace": trace}
    settings = {"strategy": fused.strategy.to_dict(), "chat": args.chat, "system": args.system, "template": chat}
    settings["max_new_tokens"] = args.max_new_tokens
    answer = trace["text"].removesuffix(fused.tokenizer.eos_token or "")
    output.emit(args.json, output.document(result, settings), lambda: print(f"{answer}\n{page}\n{plot}"))
