"""Kinds of checkpoints that are opened as text models, and what each kind that is not hears."""

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import tiny
from fusing import new_tokens
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting, MemberMismatch, MissingPackage, UnknownName, UnreadableModel
from trimtab.logits.writing import write_fused
from trimtab.models import opening, quantization

V = tiny.VOCAB
ALPHA0 = {"amount": "static", "chooser": "sum", "settings": {"alpha": 0.0}}
TEXT = tiny.TOKENS | tiny.SHAPE | tiny.WIDE
TEXT |= {"vocab_size": V + 3, "hidden_size": 32, "num_key_value_heads": 2, "head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
M_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 16}
QWEN_IDS = {"image_token_id": V, "video_token_id": V + 1, "vision_start_token_id": V + 2, "vision_end_token_id": V + 2}
CLIP = VISION | {"model_type": "clip_vision_model"}
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
GEMMA_IDS = {"image_token_index": V + 1, "boi_token_index": V + 2, "eoi_token_index": V, "mm_tokens_per_image": 4}
VISION_KINDS = {
    "qwen2_vl": {
        "text_config": TEXT | M_ROPE,
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        **QWEN_IDS,
    },
    "qwen2_5_vl": {"text_config": TEXT | M_ROPE, "vision_config": QWEN, **QWEN_IDS},
    "qwen3_vl": {
        "text_config": TEXT | M_ROPE,
        "vision_config": QWEN | {"deepstack_visual_indexes": [0]},
        **QWEN_IDS,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral"},
        "image_token_index": V,
    },
    "llava": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": CLIP, "image_token_index": V},
    "gemma3": {"text_config": TEXT | {"sliding_window": 8}, "vision_config": SIGLIP, **GEMMA_IDS},
    "mllama": {  # transformers opens its text part alone
        "text_config": TEXT | {"cross_attention_layers": [1]},
        "vision_config": CLIP | {"intermediate_layers_indices": [0], "num_global_layers": 1, "vision_output_dim": 32},
        "image_token_index": V,
    },
}


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_a_vision_language_checkpoint_is_a_text_model(members_dir, tmp_path, kind):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = AutoConfig.for_model(kind, **VISION_KINDS[kind])
        model = AutoModelForImageTextToText.from_config(config).float().eval()
    model.save_pretrained(tmp_path / "strong")
    tiny.make_tokenizer().save_pretrained(tmp_path / "strong")
    members = members_dir / "base", {"math": members_dir / "math"}
    fused = FusedCausalLM.from_members(tmp_path / "strong", *members, strategy=ALPHA0)
    ids = torch.randint(4, V, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits.detach()[..., :V].log_softmax(-1)
    torch.testing.assert_close(fused(ids).logits.log_softmax(-1), expected, atol=1e-5, rtol=1e-4)
    fused.save_pretrained(tmp_path / "fused")
    reopened = FusedCausalLM.from_pretrained(tmp_path / "fused")
    assert torch.equal(new_tokens(reopened, "Q: 12")[1], new_tokens(fused, "Q: 12")[1])
    loaded = FusedCausalLM.from_members(reopened.members.strong.model, *members, strategy=ALPHA0)
    loaded.save_pretrained(tmp_path / "again")  # names in memory and in files differ, the weights do not


def changed_config(directory, **change):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def cut_weight(directory):
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :8].contiguous()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


SMALL_T5 = T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
SMALL_BART = BartConfig(vocab_size=V, d_model=8, encoder_layers=1, decoder_layers=1, **HEADS)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
REFUSED = {  # what is done to a good checkpoint -> kind of error, message
    "t5": (
        lambda d: T5ForConditionalGeneration(SMALL_T5).save_pretrained(d),
        MemberMismatch,
        r"(?s)member 'strong' is an encoder-decoder model \(t5\).*decoder-only",
    ),
    "bart": (
        lambda d: BartForConditionalGeneration(SMALL_BART).save_pretrained(d),
        MemberMismatch,
        r"(?s)encoder-decoder model \(bart\).*decoder-only",
    ),
    "no text": (lambda d: CLIPConfig().save_pretrained(d), MemberMismatch, r"is a 'clip' model, which writes no text"),
    "gptq": (
        lambda d: changed_config(d, quantization_config=GPTQ),
        MissingPackage,
        r"(?s)quantized with gptq, which needs gptqmodel and optimum.*Fix: pip install gptqmodel optimum, or",
    ),
    "awq": (
        lambda d: changed_config(d, quantization_config={"quant_method": "awq", "bits": 4, "zero_point": True}),
        MissingPackage,
        r"(?s)quantized with awq, which needs gptqmodel: .*Fix: pip install gptqmodel, or",
    ),
    "code of its own": (
        lambda d: changed_config(d, model_type="chatglm", auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
        UnreadableModel,
        r"(?s)'chatglm', which comes with code of its own.*never run.*-hf\)",
    ),
    "newer": (
        lambda d: changed_config(d, model_type="llama17"),
        UnreadableModel,
        r'(?s)"llama17", which transformers 5\S+ does not have.*pip install -U transformers',
    ),
    "no model type": (
        lambda d: (d / "config.json").write_text("{}"),
        UnreadableModel,
        r"(?s)does not say which model it is.*bring back",
    ),
    "other shapes": (cut_weight, UnreadableModel, r"(?s)other shapes than its config.json says.*bring back"),
    "wrong settings": (
        lambda d: changed_config(d, num_attention_heads="many"),
        UnreadableModel,
        r"(?s)configuration of member 'strong' .* cannot be read: .*bring back",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_each_checkpoint_that_cannot_be_opened_hears_its_own_reason(members_dir, tmp_path, what):
    change, error, message = REFUSED[what]
    shutil.copytree(members_dir / "strong", tmp_path / "strong")
    change(tmp_path / "strong")
    with pytest.raises(error, match=message) as caught:
        FusedCausalLM.from_members(tmp_path / "strong", members_dir / "base", {"math": members_dir / "math"})
    assert type(caught.value) is error
    assert caught.value.exit_code == 2


def test_code_that_is_not_needed_is_not_run(members_dir, tmp_path):
    shutil.copytree(members_dir / "strong", tmp_path / "strong")
    changed_config(tmp_path / "strong", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert opening.load_model("strong", tmp_path / "strong").config.model_type == "llama"


def test_members_without_any_tokenizer_say_where_one_belongs(tmp_path):
    base = tiny.make(seed=1)
    for name, model in {"strong": tiny.make(seed=0), "base": base, "math": tiny.tuned(base, 10)}.items():
        model.save_pretrained(tmp_path / name)
    members = tmp_path / "strong", tmp_path / "base", {"math": tmp_path / "math"}
    with pytest.raises(BadSetting, match=r"(?s)no tokenizer.*copy tokenizer.json and tokenizer_config.json beside the"):
        FusedCausalLM.from_members(*members).encode("Q: 12")
    tiny.make_tokenizer().save_pretrained(tmp_path / "strong")  # the fix
    assert FusedCausalLM.from_members(*members).encode("Q: 12")["input_ids"].shape == (1, 5)


# ---- quantization


def test_quantization_is_chosen_for_all_members_or_for_one(members_dir):
    members = members_dir / "strong", members_dir / "base", {"math": members_dir / "math"}
    quanto = {"quant_method": "quanto", "weights": "int8"}
    with pytest.raises(MissingPackage, match=r"(?s)member 'base' is quantized with quanto, .*pip install optimum-quan"):
        FusedCausalLM.from_members(*members, quantization_config={"base": quanto})
    with pytest.raises(MissingPackage, match=r"member 'strong' is quantized with quanto"):
        FusedCausalLM.from_members(*members, quantization_config=quanto)
    with pytest.raises(UnknownName, match=r"(?s)no member \(in quantization_config\) 'stron'.*did you mean 'strong'"):
        FusedCausalLM.from_members(*members, quantization_config={"stron": quanto})


def test_a_method_is_read_from_any_form_of_a_quantization_config():
    assert quantization.method_of({"load_in_4bit": True}) == "bitsandbytes"
    assert quantization.method_of({"quant_method": "awq"}) == "awq"
    assert quantization.method_of(None) is None
    assert quantization.is_per_member({"strong": {"quant_method": "awq"}})
    assert not quantization.is_per_member({"quant_method": "awq"})


def test_a_checkpoint_in_8_bit_floats_is_a_member(members_dir, tmp_path):
    model = tiny.make(seed=0, width=64)
    model.save_pretrained(tmp_path / "strong")
    tiny.make_tokenizer().save_pretrained(tmp_path / "strong")
    weights = load_file(tmp_path / "strong" / "model.safetensors")
    for name in [name for name in weights if "proj" in name]:
        scale = weights[name].abs().max() / 448
        packed = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights |= {name: packed, f"{name}_scale_inv": scale.reshape(1, 1)}
        model.get_parameter(name).data = packed.float() * scale
    save_file(weights, tmp_path / "strong" / "model.safetensors", {"format": "pt"})
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    changed_config(tmp_path / "strong", quantization_config=fp8)
    members = tmp_path / "strong", members_dir / "base", {"math": members_dir / "math"}
    fused = FusedCausalLM.from_members(*members, strategy=ALPHA0)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits.detach().log_softmax(-1)
    torch.testing.assert_close(fused(ids).logits.log_softmax(-1), expected, atol=1e-5, rtol=1e-4)
    fused.save_pretrained(tmp_path / "fused")
    write_fused(tmp_path / "written", *members, strategy=ALPHA0)
    assert (tmp_path / "fused" / "config.json").read_bytes() == (tmp_path / "written" / "config.json").read_bytes()
    assert torch.equal(FusedCausalLM.from_pretrained(tmp_path / "written")(ids).logits, fused(ids).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_a_model_that_torch_quantized_in_memory_is_read_and_not_saved(members_dir, tmp_path):
    strong = AutoModelForCausalLM.from_pretrained(members_dir / "strong")
    packed = torch.ao.quantization.quantize_dynamic(strong, {torch.nn.Linear}, dtype=torch.qint8)
    members = members_dir / "base", {"math": members_dir / "math"}
    fused = FusedCausalLM.from_members(packed, *members, strategy=ALPHA0, tokenizer=tiny.make_tokenizer())
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = packed(ids).logits.detach().log_softmax(-1)
    torch.testing.assert_close(fused(ids).logits.log_softmax(-1), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(MemberMismatch, match=r"(?s)'strong' was quantized in memory, .*quantization_config="):
        fused.save_pretrained(tmp_path / "fused")


# ---- GGUF


def permuted(weight, heads):
    """Rows of a query or key projection in llama.cpp's order."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file, model, tokenizer):
    """A model as llama.cpp's converter writes it."""
    config, writer = model.config, gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_scores([0.0] * len(tokens))
    for name, index in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{name}_token_id")(index)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        for part, count in heads.items():
            weight = permuted(weight, count) if part in name else weight
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_member(members_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(members_dir / "strong")
    file = tmp_path / "strong-F32.gguf"
    write_gguf(file, model, tiny.make_tokenizer())
    assert opening.load_outline("strong", file).get_output_embeddings().weight.shape == (V, 48)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    members = members_dir / "base", {"math": members_dir / "math"}
    fused = FusedCausalLM.from_members(file, *members, strategy=ALPHA0)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits.detach().log_softmax(-1)
    torch.testing.assert_close(fused(ids).logits.log_softmax(-1), expected, atol=1e-5, rtol=1e-4)
    fused.save_pretrained(tmp_path / "fused")
    content = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert content["strong"]["where"] == "../strong-F32.gguf"
    assert torch.equal(FusedCausalLM.from_pretrained(tmp_path / "fused")(ids).logits, fused(ids).logits)
    with file.open("r+b") as stream:
        stream.seek(-3, 2)
        stream.write(b"abc")
    with pytest.raises(MemberMismatch, match="member 'strong' has changed"):
        FusedCausalLM.from_pretrained(tmp_path / "fused")


# ---- placement


def test_each_member_has_a_device_map_of_its_own(members_dir):
    members = members_dir / "strong", members_dir / "base", {"math": members_dir / "math"}
    plain = FusedCausalLM.from_members(*members)
    spread = FusedCausalLM.from_members(
        *members,
        device={"strong": "auto", "base": "cpu", "math": {"": "cpu"}},
        dtype={"math": torch.bfloat16},
        max_memory={"cpu": "4GiB"},
    )
    assert [member.model.dtype for member in spread.members] == [torch.float32, torch.float32, torch.bfloat16]
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(spread.members.strong.model(ids).logits, plain.members.strong.model(ids).logits)
    with pytest.raises(BadSetting, match=r"(?s)max_memory is given, but no member is spread.*device='auto'"):
        FusedCausalLM.from_members(*members, max_memory={"cpu": "4GiB"})
