"""At alpha 0 every logits processor of transformers does to a fused model what it does to the strong model alone."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import logits_process as known

import tiny
from fusing import fuse
from trimtab.logits.speculation.processors import STATEFUL

TEXTS = ["abc abc abc ab", "12+7=19, 12+7="]  # of one length: two rows without padding
END = 1
IDS = tiny.make_tokenizer()(TEXTS, return_tensors="pt")["input_ids"]
START = IDS.shape[1]


def whisper_settings():
    config = GenerationConfig(eos_token_id=END)
    config.no_timestamps_token_id = 30
    return config


# What `generate` makes of its own arguments.
BY_ARGUMENT = {
    "MinLengthLogitsProcessor": {"min_length": START + 3},
    "MinNewTokensLengthLogitsProcessor": {"min_new_tokens": 4},
    "TemperatureLogitsWarper": {"do_sample": True, "temperature": 0.6},
    "RepetitionPenaltyLogitsProcessor": {"repetition_penalty": 1.4},
    "EncoderRepetitionPenaltyLogitsProcessor": {"encoder_repetition_penalty": 1.4},
    "TopPLogitsWarper": {"do_sample": True, "top_p": 0.8},
    "TopKLogitsWarper": {"do_sample": True, "top_k": 7},
    "TopHLogitsWarper": {"do_sample": True, "top_h": 0.6},
    "MinPLogitsWarper": {"do_sample": True, "min_p": 0.1},
    "TypicalLogitsWarper": {"do_sample": True, "typical_p": 0.8},
    "EpsilonLogitsWarper": {"do_sample": True, "epsilon_cutoff": 0.01},
    "EtaLogitsWarper": {"do_sample": True, "eta_cutoff": 0.01},
    "NoRepeatNGramLogitsProcessor": {"no_repeat_ngram_size": 2},
    "EncoderNoRepeatNGramLogitsProcessor": {"encoder_no_repeat_ngram_size": 2},
    "SequenceBiasLogitsProcessor": {"sequence_bias": [[[9], 4.0], [[12], -2.0]]},
    "NoBadWordsLogitsProcessor": {"bad_words_ids": [[5], [6]]},
    "PrefixConstrainedLogitsProcessor": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(5, 40 + row))},
    "ForcedBOSTokenLogitsProcessor": {"forced_bos_token_id": 2},
    "ForcedEOSTokenLogitsProcessor": {"forced_eos_token_id": END},
    "InfNanRemoveLogitsProcessor": {"remove_invalid_values": True},
    "ExponentialDecayLengthPenalty": {"exponential_decay_length_penalty": (2, 1.5)},
    "LogitNormalization": {"renormalize_logits": True},
    "SuppressTokensAtBeginLogitsProcessor": {"begin_suppress_tokens": list(range(4, 40))},
    "SuppressTokensLogitsProcessor": {"suppress_tokens": list(range(4, 30))},
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": {"guidance_scale": 1.7},
    "WatermarkLogitsProcessor": {"watermarking_config": {"bias": 3.0, "context_width": 1}},
}
# Those of other models, whose own `generate` adds them.
BY_HAND = {
    "WhisperTimeStampLogitsProcessor": lambda: known.WhisperTimeStampLogitsProcessor(whisper_settings(), START),
    "WhisperNoSpeechDetection": lambda: known.WhisperNoSpeechDetection(5, 1),
    "AlternatingCodebooksLogitsProcessor": lambda: known.AlternatingCodebooksLogitsProcessor(START, 20, 20),
    "BarkEosPrioritizerLogitsProcessor": lambda: known.BarkEosPrioritizerLogitsProcessor(END, 1e-3),
    "SynthIDTextWatermarkLogitsProcessor": lambda: known.SynthIDTextWatermarkLogitsProcessor(
        5, [654, 400, 836], 2**10, 0, 16, torch.device("cpu")
    ),
    "DiaEOSChannelFilterLogitsProcessor": lambda: known.DiaEOSChannelFilterLogitsProcessor(2, 40),
    "DiaEOSDelayPatternLogitsProcessor": lambda: known.DiaEOSDelayPatternLogitsProcessor([0, 1], END, START + 4),
}
# Those that take the logits of two rows to make one of them: no loop of a language model runs them.
PAIRED = {
    "ClassifierFreeGuidanceLogitsProcessor": lambda: known.ClassifierFreeGuidanceLogitsProcessor(1.7),
    "DiaClassifierFreeGuidanceLogitsProcessor": lambda: known.DiaClassifierFreeGuidanceLogitsProcessor(1.7, 9),
}
# On finite scores these change nothing; what they look at is compared all the same.
UNCHANGING = ("InfNanRemoveLogitsProcessor", "WhisperNoSpeechDetection", "ForcedBOSTokenLogitsProcessor")
# These remember the steps before; with drafts asked for they go token by token, and say so.
STATEFUL_NAMES = tuple(kind.__name__ for kind in STATEFUL)


@pytest.fixture(scope="module")
def strong_again():
    """A fused model that adds nothing to its strong model."""
    return fuse(strategy={"amount": "static", "chooser": "sum", "settings": {"alpha": 0.0}})


def written(model, name, **more):
    """Tokens, processed scores and logits of six steps."""
    torch.manual_seed(5)
    options = {"do_sample": False, "top_k": 0, **BY_ARGUMENT.get(name, {}), **more}
    if name in BY_HAND:
        options["logits_processor"] = [BY_HAND[name]()]
    if not options["do_sample"]:
        del options["top_k"]
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = model.generate(IDS, max_new_tokens=6, eos_token_id=END, pad_token_id=0, **options)
    return output.sequences, torch.stack(output.scores), torch.stack(output.logits)


def test_the_table_holds_every_processor_of_transformers():
    kinds = [kind for kind in vars(known).values() if isinstance(kind, type) and issubclass(kind, LogitsProcessor)]
    assert {kind.__name__ for kind in kinds} - {"LogitsProcessor"} == {*BY_ARGUMENT, *BY_HAND, *PAIRED}


@pytest.mark.parametrize("name", [*BY_ARGUMENT, *BY_HAND])
def test_a_processor_does_the_same_to_the_strong_model(strong_again, name):
    strong = written(strong_again.members.strong.model, name)
    ours = written(strong_again, name, speculate=0)
    assert torch.equal(ours[0], strong[0])
    for mine, theirs in zip(ours[1:], strong[1:], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)
    # Read again: some processors write into the logits that they are given.
    plain = strong_again.members.strong.model(strong[0][:, :-1]).logits[:, START - 1 :].transpose(0, 1)
    changed = (strong[1] - plain).nan_to_num().abs().max()
    assert changed > 0.05 or name in UNCHANGING, "the settings of this test change nothing"


@pytest.mark.parametrize("name", [*BY_ARGUMENT, *BY_HAND])
def test_a_processor_does_the_same_to_drafts(strong_again, name):
    options = {"do_sample": False} if name not in STATEFUL_NAMES else {"do_sample": False, "speculate": "auto"}
    drafted = written(strong_again, name, **{"speculate": 3} | options)
    plain = written(strong_again, name, speculate=0, do_sample=False)
    assert torch.equal(drafted[0], plain[0])
    alive = (drafted[0][:, START:].T != 0).cumprod(0).bool()  # rows that have ended are filled, each engine its way
    torch.testing.assert_close(drafted[1][alive], plain[1][alive], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", PAIRED)
def test_a_processor_of_two_rows_does_the_same(strong_again, name):
    scores = [model(IDS).logits[:, -1].detach() for model in (strong_again, strong_again.members.strong.model)]
    ours, strong = (PAIRED[name]()(IDS[:1], logits) for logits in scores)
    torch.testing.assert_close(ours, strong, atol=1e-4, rtol=1e-5)


def test_the_probability_that_a_processor_keeps_is_the_strong_models(strong_again):
    found = []
    for model in (strong_again, strong_again.members.strong.model):
        processor = known.WhisperNoSpeechDetection(5, 1)
        processor(IDS[:, :1], model(IDS[:, :1]).logits[:, -1].detach())
        found.append(processor.no_speech_prob)
    torch.testing.assert_close(*found)


def test_beams_score_the_same(strong_again):
    models = (strong_again, strong_again.members.strong.model)
    options = {"num_beams": 3, "max_new_tokens": 8, "repetition_penalty": 1.3, "do_sample": False}
    ours, strong = (
        model.generate(IDS, **options, output_scores=True, return_dict_in_generate=True) for model in models
    )
    assert torch.equal(ours.sequences, strong.sequences)
    torch.testing.assert_close(ours.sequences_scores, strong.sequences_scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["dynamic", "static"])
def test_logits_are_log_probs_at_the_strong_models_zero_point(strategy):
    model = fuse(strategy=strategy)
    inputs = model.encode(TEXTS)
    strong = model.members.strong.model(**inputs).logits.detach()
    logits = model(**inputs).logits
    torch.testing.assert_close(logits.logsumexp(-1), strong.logsumexp(-1), atol=1e-4, rtol=1e-5)
    laws = [member.model(**inputs).logits.detach().log_softmax(-1)[:, -1] for member in model.members]
    expected = model.strategy(laws[0], laws[1], torch.stack(laws[2:])).log_probs
    torch.testing.assert_close(logits[:, -1].log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
