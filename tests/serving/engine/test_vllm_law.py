"""What vLLM samples from, scores with and constrains is the fused law."""

import dataclasses
import json

import pytest
import torch
import vllm
from engines import engine, served
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import StructuredOutputsParams

from trimtab import FusedCausalLM, make_strategy
from trimtab.core.errors import BadSetting, MemberMismatch
from trimtab.logits.registry import AMOUNTS, CHOOSERS, DEFAULT_CHOOSER
from trimtab.serving.vllm import plugin

PROMPT = "Q: Who lives in the north?\nA:"
STATIC = {"amount": "static", "chooser": "joint_objective", "settings": {"alpha": 0.7}}


@pytest.fixture(scope="module")
def fused():
    return FusedCausalLM.from_members(
        "zoo:strong", "zoo:small", {"math": "zoo:small/arithmetic", "facts": "zoo:small/facts"}
    )


@pytest.fixture(scope="module")
def directory(fused, tmp_path_factory):
    directory = tmp_path_factory.mktemp("law") / "fused"
    fused.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llm(directory):
    """One engine for this file, started with another strategy than the directory's."""
    with engine(directory, hf_overrides={"strategy": STATIC}, max_logprobs=20) as llm:
        yield llm


@pytest.fixture
def ids(fused):
    return fused.tokenizer(PROMPT)["input_ids"]


def told(entries):
    """{token: log-probability} of one position."""
    return {token: entry.logprob for token, entry in entries.items()}


def check_law(entries, log_probs):
    for token, value in told(entries).items():
        assert value == pytest.approx(float(log_probs[token]), abs=1e-3)


def test_log_probabilities_are_the_fused_ones_with_the_strategy_asked_for(fused, llm, ids):
    output = served(llm, [ids], logprobs=5, prompt_logprobs=5, max_tokens=8)[0]
    new = list(output.outputs[0].token_ids)
    read = torch.tensor([ids + new])
    fused.strategy = STATIC
    laws = fused(read, use_cache=False).logits[0].log_softmax(-1)
    strong = fused.members.strong.model(read).logits[0].detach().log_softmax(-1)
    for place, entries in enumerate(output.outputs[0].logprobs):
        check_law(entries, laws[len(ids) + place - 1])
    for place, entries in enumerate(output.prompt_logprobs[1:]):
        check_law(entries, laws[place])
    # The strong model alone would have said something else.
    assert (laws - strong).abs().max() > 0.1
    fused.strategy = "dynamic"


PAIRS = [(amount, DEFAULT_CHOOSER) for amount in AMOUNTS]
PAIRS += [("dynamic", "confident"), ("dynamic", "only"), ("static", "sum")]
PAIRS += [("static", chooser) for chooser in CHOOSERS if chooser not in {name for _, name in PAIRS}]


@pytest.fixture
def change(fused, llm):
    """Gives both engines another strategy; they have their own back afterwards."""

    def change(strategy):
        def put(model):
            model.plan = dataclasses.replace(model.plan, strategy=strategy)

        llm.apply_model(put)
        llm.reset_prefix_cache()
        fused.strategy = strategy

    before, (plan,) = fused.strategy, llm.apply_model(lambda model: model.plan)
    yield change
    change(plan.strategy)
    fused.strategy = before


@pytest.mark.parametrize(("amount", "chooser"), PAIRS)
def test_every_strategy_is_the_transformers_engines(fused, llm, ids, change, amount, chooser):
    settings = {"expert": "facts"} if chooser == "only" else {}
    change(make_strategy(amount, chooser, ("math", "facts"), **settings))
    output = served(llm, [ids], logprobs=5, max_tokens=6)[0].outputs[0]
    laws = (
        fused(torch.tensor([ids + list(output.token_ids)]), use_cache=False).logits[0, len(ids) - 1 :].log_softmax(-1)
    )
    for place, entries in enumerate(output.logprobs):
        check_law(entries, laws[place])


def test_samples_follow_the_seed_and_the_fused_law(fused, llm, ids, change):
    change(make_strategy("static", expert_names=("math", "facts"), alpha=0.7))
    law = fused(torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1)
    strong = fused.members.strong.model(torch.tensor([ids])).logits[0, -1].detach().softmax(-1)
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=1, logprobs=0) for seed in range(400)]
    prompts = [{"prompt_token_ids": ids}] * len(params)
    drawn = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
    tokens = [[output.outputs[0].token_ids[0] for output in outputs] for outputs in drawn]
    assert tokens[0] == tokens[1]
    # The token whose share tells the two laws apart best.
    telling = int((law - strong).abs().argmax())
    share, probability = tokens[0].count(telling) / len(params), float(law[telling])
    error = 4 * (probability * (1 - probability) / len(params)) ** 0.5 + 1e-3
    assert abs(share - probability) < error
    assert abs(share - float(strong[telling])) > error


def test_stop_strings_end_a_text(llm, ids):
    free = served(llm, [ids], max_tokens=16, ignore_eos=True)[0].outputs[0].text
    word = free.split()[2]
    stopped = served(llm, [ids], max_tokens=16, ignore_eos=True, stop=[word])[0].outputs[0]
    assert stopped.text == free[: free.index(word)]
    assert stopped.finish_reason == "stop"


def test_structured_output_allows_nothing_else(llm, ids):
    choices = [" a red house", " two boats"]
    output = served(llm, [ids], structured_outputs=StructuredOutputsParams(choice=choices))[0].outputs[0]
    assert output.text in choices


def test_a_member_that_has_changed_is_refused(directory, tmp_path):
    content = json.loads((directory / "config.json").read_text())
    content["strong"]["digest"] = "sha256:0"
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(MemberMismatch, match="member 'strong' has changed"), engine(tmp_path):
        pass


@pytest.mark.parametrize("form", ["pt", "npcache", "dummy", "fastsafetensors"])
def test_members_are_read_from_safetensors_alone(directory, form):
    with pytest.raises(BadSetting, match=f"load_format is '{form}'"), engine(directory, load_format=form):
        pass


def test_pipeline_parallelism_is_refused(directory):
    with pytest.raises(NotImplementedError, match="Pipeline parallelism is not supported"):
        EngineArgs(model=str(directory), pipeline_parallel_size=2).create_engine_config()


def test_another_series_of_vllm_is_refused(directory, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(vllm, "__version__", "0.34.0")
        plugin.register()
        with pytest.raises(BadSetting, match=r"this is vLLM 0\.34\.0"):
            EngineArgs(model=str(directory)).create_engine_config()
    plugin.register()
    assert EngineArgs(model=str(directory)).create_engine_config().model_config.architectures == ["FusedCausalLM"]
