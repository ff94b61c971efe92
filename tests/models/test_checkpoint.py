"""What a checkpoint's files say: which are read, and what is wrong with those that are not whole."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tiny
from trimtab.core.errors import UnreadableModel
from trimtab.models import checkpoint, references
from trimtab.models.context import context_of


@pytest.fixture
def sharded(tmp_path):
    """A model of several shards."""
    tiny.make(seed=1).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


@pytest.fixture
def whole(members_dir, tmp_path):
    """A model of one file."""
    return shutil.copytree(members_dir / "base", tmp_path / "model")


def shards(directory):
    return sorted(directory.glob("model-*.safetensors"))


def rewrite_index(directory, change):
    content = json.loads((directory / checkpoint.INDEX).read_text())
    (directory / checkpoint.INDEX).write_text(json.dumps(change(content)))


def test_headers_tell_every_tensor_without_reading_it(sharded):
    stored = checkpoint.tensors(sharded)
    expected = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    assert {name: part.shape for name, part in stored.items()} == {n: tuple(t.shape) for n, t in expected.items()}
    assert {part.dtype for part in stored.values()} == {torch.float32}
    name = "model.embed_tokens.weight"
    pieces = checkpoint.slices({name: (stored[name], tiny.VOCAB)}, pieces=3, piece_numbers=5)
    assert torch.equal(pieces[name], expected[name][[0, (tiny.VOCAB - 1) // 2, tiny.VOCAB - 1], :5].flatten().double())


def test_only_what_transformers_reads_counts_as_weights(whole):
    before = references.digest(whole)
    (whole / "original").mkdir()
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "original/model.safetensors"):
        shutil.copy(whole / "model.safetensors", whole / name)
    assert checkpoint.weight_files(whole) == [whole / "model.safetensors"]
    assert references.digest(whole) == before


def test_digests_that_counted_other_copies_stay_valid(whole):
    shutil.copy(whole / "model.safetensors", whole / "consolidated.safetensors")
    recorded = references.Reference(str(whole), digest=references._earlier_digest(whole))
    assert recorded.digest != references.digest(whole)
    references.check_digest("strong", recorded, whole)


def lfs(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n")


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {  # what happens to a model of several shards -> what is said
    "shard missing": (
        lambda d: shards(d)[1].unlink(),
        r"(?s)lacks 1 of its \d+ weight files: .*-00002-of.*copy",
    ),
    "shard cut short": (
        lambda d: cut_short(shards(d)[1]),
        r"(?s)-00002-of.*header speaks of .*cut short.*fetch the",
    ),
    "shard empty": (lambda d: shards(d)[0].write_bytes(b""), r"is empty \(0 bytes\)"),
    "shard of other content": (
        lambda d: shards(d)[0].write_text("no weights here" * 99),
        "no safetensors header",
    ),
    "shard is a pointer": (lambda d: lfs(shards(d)[0]), r"(?s)-00001-of.* is a Git LFS pointer.*git lfs pull"),
    "config is a pointer": (lambda d: lfs(d / "config.json"), r"(?s)config.json' is a Git LFS pointer.*git lfs pull"),
    "index is a pointer": (lambda d: lfs(d / checkpoint.INDEX), r"(?s)index.json' is a Git LFS pointer.*git lfs pull"),
    "index is another's": (
        lambda d: rewrite_index(d, lambda c: c | {"weight_map": dict.fromkeys(c["weight_map"], shards(d)[0].name)}),
        r"(?s)does not belong to the files beside it: model-00001.* does not hold .*index and files",
    ),
    "index without metadata": (
        lambda d: rewrite_index(d, lambda c: {"weight_map": c["weight_map"]}),
        r'(?s)has no metadata.*add the entry "metadata": \{\}',
    ),
    "index without a map": (lambda d: rewrite_index(d, lambda c: {}), r"(?s)has no weight_map.*copy the index"),
    "index missing": (
        lambda d: (d / checkpoint.INDEX).unlink(),
        r"(?s)no index: model-00001.*not be read.*fetch",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_each_damage_is_told_by_its_own_reason(sharded, what):
    damage, message = DAMAGES[what]
    checkpoint.check_directory(sharded)
    damage(sharded)
    with pytest.raises(UnreadableModel, match=message):
        checkpoint.check_directory(sharded)


def test_what_lies_in_place_of_a_model_is_told(tmp_path):
    with pytest.raises(UnreadableModel, match=r"(?s)It is empty.*copy or fetch the model there"):
        checkpoint.check_directory(tmp_path)
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(UnreadableModel, match=r"(?s)publisher's own format \(consolidated.safetensors, params.json\)"):
        checkpoint.check_directory(tmp_path)
    (tmp_path / "small-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnreadableModel, match=r"(?s)holds GGUF files: small-Q4.*pass the file: '.*/small-Q4_K_M.gguf'"):
        checkpoint.check_directory(tmp_path)
    checkpoint.check_directory(tmp_path / "small-Q4_K_M.gguf")  # the fix
    (tmp_path / "other.gguf").write_bytes(b"PK")
    with pytest.raises(UnreadableModel, match="is a file, and no GGUF file"):
        checkpoint.check_directory(tmp_path / "other.gguf")


def test_a_training_run_points_to_its_checkpoints(whole):
    run = whole.parent / "run"
    shutil.copytree(whole, run / "checkpoint-20")
    with pytest.raises(UnreadableModel, match=r"(?s)subdirectories these do: checkpoint-20.*pass one.*checkpoint-20'"):
        checkpoint.check_directory(run)
    checkpoint.check_directory(run / "checkpoint-20")  # the fix


def test_pickled_weights_are_refused_with_a_line_that_converts_them(whole):
    (whole / "model.safetensors").unlink()
    torch.save(tiny.make(seed=1).state_dict(), whole / "pytorch_model.bin")
    with pytest.raises(UnreadableModel, match=r"pickled weights only \(pytorch_model.bin\)") as caught:
        checkpoint.check_directory(whole)
    line = caught.value.fix.partition("safetensors: ")[2].removesuffix(".")
    namespace = {"AutoModelForCausalLM": AutoModelForCausalLM, "NEW_DIRECTORY": whole.parent / "new"}
    eval(line, namespace)  # the fix
    checkpoint.check_directory(whole.parent / "new")


def test_an_odd_file_name_is_read_where_the_index_names_it(sharded):
    shards(sharded)[0].rename(sharded / "weights_a.safetensors")
    odd = {shards(sharded)[0].name.replace("00002", "00001"): "weights_a.safetensors"}
    rewrite_index(sharded, lambda c: c | {"weight_map": {n: odd.get(f, f) for n, f in c["weight_map"].items()}})
    checkpoint.check_directory(sharded)
    assert sharded / "weights_a.safetensors" in checkpoint.weight_files(sharded)
    assert AutoModelForCausalLM.from_pretrained(sharded).get_output_embeddings().weight.shape[0] == tiny.VOCAB


def test_a_file_with_bytes_too_many_is_damaged(whole):
    save_file({"a": torch.zeros(3)}, whole / "model.safetensors")
    with (whole / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(UnreadableModel, match="the file is damaged"):
        checkpoint.check_directory(whole)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
CONTEXTS = {  # (rope, max_position_embeddings) -> tokens that can be read
    "none": ({}, 64, 64),
    "yarn beyond the limit": (YARN, 32, 128),
    "yarn within the limit": (YARN, 128, 128),
    "yarn without its original length": ({"rope_type": "yarn", "factor": 4.0}, 64, 256),
    "linear": ({"rope_type": "linear", "factor": 2.0}, 64, 128),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 64, None),
    "llama3": (LLAMA3 | {"original_max_position_embeddings": 16}, 128, 128),
    "longrope": (LONG | {"factor": 4.0, "original_max_position_embeddings": 32}, 128, 128),
}


@pytest.mark.parametrize("what", CONTEXTS)
def test_a_context_is_what_scaled_positions_reach(what):
    rope, limit, expected = CONTEXTS[what]
    config = tiny.config_of("llama").to_dict() | {"max_position_embeddings": limit}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | rope}
    assert context_of(type(tiny.config_of("llama"))(**config)) == expected
