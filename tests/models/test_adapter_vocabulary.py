"""A tokenizer beside an adapter counts only where the adapter changes the vocabulary; the base stays bare."""

import warnings

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from on_disk import save_models
from trimtab import FusedCausalLM
from trimtab.core.errors import TrimtabWarning, UnreadableModel
from trimtab.logits.writing import write_fused

V = tiny.VOCAB
CHATML = ("<|im_start|>", "<|im_end|>")
IDS = torch.tensor([[5, 17, 33, 40, 9]])
# peft says that it saves embeddings, and asks transformers for a property that is on its way out.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    save_models(folder, strong=tiny.make(seed=0, width=48), base=tiny.make(seed=1), tied=tiny.make("qwen2", seed=1))
    return folder


def save_adapter(folder, name, tokens, rows=V, base="base", **options):
    """A random adapter on the base with `rows` embeddings, and a tokenizer with these tokens beside it."""
    model = AutoModelForCausalLM.from_pretrained(folder / base)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if rows != V:
            model.resize_token_embeddings(rows)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options
        )
        made = peft.get_peft_model(model, config)
        with torch.no_grad():
            for key, weight in made.named_parameters():
                if "modules_to_save" in key or "trainable_tokens" in key:
                    weight += 0.1 * torch.randn(weight.shape)
        made.save_pretrained(folder / name)
    tokenizer = tiny.make_tokenizer()
    for token in tokens:
        tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.save_pretrained(folder / name)
    return made.eval()


def open_fused(folder, adapter, base="base"):
    return FusedCausalLM.from_members(folder / "strong", folder / base, {"a": folder / adapter})


def test_a_tokenizer_beside_an_adapter_does_not_count(folder):
    save_adapter(folder, "padded", ["[PAD]"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrimtabWarning)
        fused = open_fused(folder, "padded")
    assert fused.config.vocab_size == V
    assert fused.members.experts["a"].model is fused.members.base.model


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("base", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("base", {}),  # peft saves resized embeddings by itself
        ("tied", {"trainable_token_indices": [V, V + 1]}),
    ],
    ids=["modules_to_save", "resized", "trained tokens"],
)
def test_an_adapter_with_more_tokens_is_read_with_its_own_embeddings(folder, tmp_path, base, options):
    alone = save_adapter(folder, "chatml", CHATML, rows=V + 2, base=base, **options)
    with pytest.warns(TrimtabWarning, match=r"'<\|im_start\|>' \(84\), '<\|im_end\|>' \(85\) cut") as told:
        fused = open_fused(folder, "chatml", base)
    assert len(told) == 1, "the expert descends from the base"
    members = fused.members
    expert, bare = members.experts["a"], AutoModelForCausalLM.from_pretrained(folder / base).eval()
    torch.testing.assert_close(fused.reader.read_alone(expert, IDS), alone(IDS).logits.detach()[..., :V])
    torch.testing.assert_close(fused.reader.read_alone(members.base, IDS), bare(IDS).logits.detach())
    assert expert.rows == V + 2
    assert members.base.rows == V
    fused.save_pretrained(tmp_path / "fused")
    with pytest.warns(TrimtabWarning, match="cut"):
        write_fused(tmp_path / "written", folder / "strong", folder / base, {"a": folder / "chatml"})
    assert (tmp_path / "written" / "config.json").read_text() == (tmp_path / "fused" / "config.json").read_text()
    opened = FusedCausalLM.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(opened(IDS).logits, fused(IDS).logits)


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [70, 71]}], ids=str
)
def test_an_adapter_that_trains_tokens_of_the_base_shares_it(folder, options):
    alone = save_adapter(folder, "trained", [], **options)
    fused = open_fused(folder, "trained")
    members, bare = fused.members, AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    expert, base = members.experts["a"].model, members.base.model
    shared = [model.get_parameter("model.layers.0.mlp.up_proj.weight").data_ptr() for model in (expert, base)]
    assert shared[0] == shared[1]
    ids = torch.tensor([[5, 70, 33, 71, 9]])
    torch.testing.assert_close(fused.reader.read_alone(members.experts["a"], ids), alone(ids).logits.detach())
    torch.testing.assert_close(fused.reader.read_alone(members.base, ids), bare(ids).logits.detach())


def test_an_adapter_that_overwrites_the_embeddings_of_its_base_gets_a_copy(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.1
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    alone = peft.get_peft_model(model, config).eval()
    alone.save_pretrained(folder / "other", save_embedding_layers=True)
    fused = open_fused(folder, "other")
    bare = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    torch.testing.assert_close(fused.reader.read_alone(fused.members.base, IDS), bare(IDS).logits.detach())
    torch.testing.assert_close(fused.reader.read_alone(fused.members.experts["a"], IDS), alone(IDS).logits.detach())


def test_an_adapter_without_output_rows_for_its_tokens_is_refused(folder):
    alone = save_adapter(folder, "half", CHATML, rows=V + 2, modules_to_save=["embed_tokens"])
    alone.save_pretrained(folder / "half", save_embedding_layers=False)
    with pytest.raises(UnreadableModel, match=r"(?s)trained with 86 tokens, its base has 84.*save_embedding_layers=T"):
        open_fused(folder, "half")
    alone.save_pretrained(folder / "half", save_embedding_layers=True)  # the fix
    with pytest.warns(TrimtabWarning, match="cut"):
        open_fused(folder, "half")
