"""A fused directory: references and digests, no weights; transformers opens it like any other model."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

import tiny
from fusing import PROMPTS, new_tokens
from trimtab import FusedCausalLM, FusedConfig
from trimtab.core.errors import BadSetting, MemberMismatch, UnknownName, UnreadableModel


@pytest.fixture
def home(tmp_path, members_dir):
    """A folder of one's own with the four members."""
    for name in ("strong", "base", "math", "facts"):
        shutil.copytree(members_dir / name, tmp_path / name)
    return tmp_path


def build(home, **options):
    experts = {name: home / name for name in ("math", "facts")}
    return FusedCausalLM.from_members(home / "strong", str(home / "base"), experts, **options)


def test_what_was_saved_opens_with_the_auto_classes(home):
    made = build(home, strategy={"amount": "static", "settings": {"alpha": 0.75}})
    made.save_pretrained(home / "fused")
    assert not list((home / "fused").glob("*.safetensors"))
    assert isinstance(AutoConfig.from_pretrained(home / "fused"), FusedConfig)
    opened = AutoModelForCausalLM.from_pretrained(home / "fused")
    assert isinstance(opened, FusedCausalLM)
    assert opened.strategy == made.strategy
    assert opened.expert_names == made.expert_names
    inputs, ids = new_tokens(made, PROMPTS)
    assert torch.equal(new_tokens(opened, PROMPTS)[1], ids)
    tokenizer = AutoTokenizer.from_pretrained(home / "fused")
    assert tokenizer(PROMPTS[2])["input_ids"] == inputs["input_ids"][2].tolist()
    _, report = AutoModelForCausalLM.from_pretrained(home / "fused", output_loading_info=True)
    assert not report["missing_keys"]


def test_a_pipeline_generates_from_it(home):
    made = build(home)
    made.save_pretrained(home / "fused")
    texts = pipeline("text-generation", model=str(home / "fused"))(PROMPTS, max_new_tokens=8, do_sample=False)
    expected = made.generate_text(PROMPTS, max_new_tokens=8, do_sample=False)
    assert [text[0]["generated_text"] for text in texts] == [p + e for p, e in zip(PROMPTS, expected, strict=True)]


def test_a_fresh_process_opens_it_after_one_import(home):
    build(home).save_pretrained(home / "fused")
    code = (
        "from trimtab import FusedCausalLM; from transformers import AutoModelForCausalLM; import sys;"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(home / "fused")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "FusedCausalLM"
    assert done.stderr == ""


def test_members_beside_or_below_are_named_relatively_and_may_move_along(home, tmp_path_factory):
    shutil.copytree(home / "math", home / "fused" / "experts" / "math")
    experts = {"math": home / "fused" / "experts" / "math"}
    made = FusedCausalLM.from_members(home / "strong", home / "base", experts)
    made.save_pretrained(home / "fused")
    config = json.loads((home / "fused" / "config.json").read_text())
    assert config["strong"]["where"] == "../strong"
    assert config["experts"][0]["where"] == "./experts/math"
    moved = tmp_path_factory.mktemp("elsewhere") / "all"
    shutil.move(home, moved)
    opened = FusedCausalLM.from_pretrained(moved / "fused")
    assert torch.equal(new_tokens(opened, PROMPTS)[1], new_tokens(made, PROMPTS)[1])


def test_members_elsewhere_are_named_absolutely(home, tmp_path_factory):
    target = tmp_path_factory.mktemp("far") / "deep" / "fused"
    build(home).save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    assert config["strong"]["where"] == str(home / "strong")
    opened = FusedCausalLM.from_pretrained(target)
    opened.save_pretrained(home / "again")
    assert json.loads((home / "again" / "config.json").read_text())["base"]["where"] == "../base"


@pytest.mark.parametrize("member", ["strong", "base", "math"])
def test_a_changed_member_is_refused_by_name(home, member):
    build(home).save_pretrained(home / "fused")
    model = AutoModelForCausalLM.from_pretrained(home / member)
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 0.01
    model.save_pretrained(home / member)
    with pytest.raises(MemberMismatch, match=f"(?s)member '{member}' has changed.*fuse again"):
        FusedCausalLM.from_pretrained(home / "fused")
    build(home).save_pretrained(home / "fused")  # the fix
    FusedCausalLM.from_pretrained(home / "fused")


def test_a_missing_member_is_refused(home):
    build(home).save_pretrained(home / "fused")
    shutil.rmtree(home / "facts")
    with pytest.raises(UnreadableModel, match=r"there is no directory '.*facts'"):
        FusedCausalLM.from_pretrained(home / "fused")


def test_loaded_models_are_saved_by_the_directory_they_came_from(home):
    models = {name: AutoModelForCausalLM.from_pretrained(home / name) for name in ("strong", "base", "math")}
    made = FusedCausalLM.from_members(
        models["strong"], models["base"], {"math": models["math"]}, tokenizer=tiny.make_tokenizer()
    )
    made.save_pretrained(home / "fused")
    assert torch.equal(new_tokens(FusedCausalLM.from_pretrained(home / "fused"), "Q")[1], new_tokens(made, "Q")[1])
    with torch.no_grad():
        models["math"].lm_head.weight[:] += 0.01
    with pytest.raises(MemberMismatch, match=r"(?s)member 'math' lives in memory only, or differs.*save it with"):
        made.save_pretrained(home / "other")
    assert not (home / "other").exists()


def test_models_in_memory_only_cannot_be_saved(fused, tmp_path):
    with pytest.raises(MemberMismatch, match=r"member 'strong' lives in memory only"):
        fused.save_pretrained(tmp_path / "fused")


def test_nothing_else_is_overwritten(home):
    made = build(home)
    with pytest.raises(BadSetting, match=r"'.*strong' is another model"):
        made.save_pretrained(home / "strong")
    (home / "file").write_text("x")
    with pytest.raises(BadSetting, match=r"is a file"):
        made.save_pretrained(home / "file")
    made.save_pretrained(home / "fused")
    (home / "fused" / "notes.txt").write_text("mine")
    with pytest.raises(BadSetting, match=r"holds a fused model already"):
        made.save_pretrained(home / "fused", overwrite=False)
    made.strategy = "static"
    made.save_pretrained(home / "fused")
    assert FusedCausalLM.from_pretrained(home / "fused").strategy == made.strategy
    assert (home / "fused" / "notes.txt").read_text() == "mine"
    assert not [path for path in home.iterdir() if path.name.startswith(".")], "nothing is left beside it"


def test_a_tokenizers_old_files_do_not_stay_beside_a_new_one(home):
    tiny.make_tokenizer(chat_template=tiny.CHAT).save_pretrained(home / "strong")
    made = build(home)
    made.save_pretrained(home / "fused")
    assert (home / "fused" / "chat_template.jinja").is_file()
    made.tokenizer.chat_template = None
    made.save_pretrained(home / "fused")
    assert not (home / "fused" / "chat_template.jinja").exists()


def test_a_save_that_fails_leaves_what_was_there(home, monkeypatch):
    made = build(home)
    made.save_pretrained(home / "fused")
    before = {file.name: file.read_bytes() for file in (home / "fused").iterdir()}
    made.strategy = "static"

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(made.config), "save_pretrained", full)
    for target in (home / "fused", home / "deep" / "new"):
        with pytest.raises(OSError, match="No space left"):
            made.save_pretrained(target)
    assert {file.name: file.read_bytes() for file in (home / "fused").iterdir()} == before
    assert {path.name for path in home.iterdir()} == {"strong", "base", "math", "facts", "fused"}


def test_what_is_no_fused_directory_is_refused(home, tmp_path):
    with pytest.raises(UnreadableModel, match=r"is no fused directory: it holds no config.json"):
        FusedCausalLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UnreadableModel, match=r"is a model of type 'llama', not a fused one"):
        FusedCausalLM.from_pretrained(home / "strong")
    build(home).save_pretrained(home / "fused")
    file = home / "fused" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in content.items() if name != "base"}))
    with pytest.raises(UnreadableModel, match=r"the config.json in '.*fused' lacks base"):
        FusedCausalLM.from_pretrained(home / "fused")
    file.write_text(json.dumps(content | {"base": {"path": "x"}}))
    with pytest.raises(UnreadableModel, match=r"a reference in config.json cannot be read"):
        FusedCausalLM.from_pretrained(home / "fused")
    file.write_text("{")
    with pytest.raises(UnreadableModel, match=r"cannot be read"):
        FusedCausalLM.from_pretrained(home / "fused")


def test_foreign_code_is_never_run(home):
    build(home).save_pretrained(home / "fused")
    with pytest.raises(BadSetting, match=r"trust_remote_code is set"):
        FusedCausalLM.from_pretrained(home / "fused", trust_remote_code=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_size": "1GB"}, r"(?s)max_shard_size is set, which has no meaning .*no weights.*leave it out"),
        ({"state_dict": {"a": torch.zeros(2)}}, "state_dict is set"),
        ({"safe_serialization": False}, "safe_serialization is set"),
        ({"variant": "fp16"}, "variant is set"),
        ({"push_to_hub": True}, r"(?s)push_to_hub is set.*members of this machine"),
        ({"overwite": False}, r"(?s)knows no argument 'overwite'.*did you mean 'overwrite'"),
    ],
)
def test_arguments_that_would_have_no_effect_are_refused_at_saving(home, options, message):
    made = build(home)
    with pytest.raises(BadSetting, match=message):
        made.save_pretrained(home / "fused", **options)
    assert not (home / "fused").exists()


def test_saving_takes_what_transformers_passes_by_itself(home):
    made = build(home)
    made.save_pretrained(home / "other", is_main_process=False)
    assert not (home / "other").exists(), "another process writes it"
    made.save_pretrained(home / "one", is_main_process=True, safe_serialization=True, state_dict=None)
    pipeline("text-generation", model=made, tokenizer=made.tokenizer).save_pretrained(home / "two")
    Trainer(made, TrainingArguments(str(home / "three"), report_to=[])).save_model()
    for name in ("one", "two", "three"):
        assert FusedCausalLM.from_pretrained(home / name).strategy == made.strategy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strateg": "static"}, r"(?s)knows no argument 'strateg'.*Known: .*did you mean 'strategy'"),
        ({"dtyp": torch.bfloat16}, "did you mean 'dtype'"),
        ({"alpha": 1.0}, r"(?s)knows no argument 'alpha'.*leave it out"),
        ({"load_in_8bit": True}, "load_in_8bit is set, which has no meaning"),
        ({"revision": "v2"}, r"(?s)revision is set.*a local one"),
        ({"local_files_only": True}, r"(?s)local_files_only is set.*HF_HUB_OFFLINE=1"),
        ({"torch_dtype": torch.bfloat16, "dtype": torch.float32}, "both dtype and torch_dtype are given"),
        ({"device": "cpu", "device_map": "cpu"}, "both device and device_map are given"),
        ({"config": {"strategy": "static"}}, "config is a dict"),
        ({"adapter_kwargs": {"subfolder": "x"}}, r"knows no argument 'adapter_kwargs\['subfolder'\]'"),
    ],
)
def test_arguments_that_would_have_no_effect_are_refused_at_opening(home, options, message):
    build(home).save_pretrained(home / "fused")
    with pytest.raises(BadSetting, match=message):
        FusedCausalLM.from_pretrained(home / "fused", **options)


def test_what_the_auto_classes_would_lose_is_refused(home):
    build(home).save_pretrained(home / "fused")
    with pytest.raises(BadSetting, match="knows no argument 'strateg'"):
        AutoModelForCausalLM.from_pretrained(home / "fused", strateg="static")
    with pytest.raises(BadSetting, match="1 more positional arguments"):
        AutoModelForCausalLM.from_pretrained(home / "fused", "static")
    with pytest.raises(BadSetting, match="vocab_size is 7 in the configuration, and 84 in the directory"):
        AutoModelForCausalLM.from_pretrained(home / "fused", vocab_size=7)  # becomes part of the configuration
    with pytest.raises(UnknownName, match=r"(?s)no member \(in dtype\) 'stron'.*did you mean 'strong'"):
        AutoModelForCausalLM.from_pretrained(home / "fused", dtype={"stron": torch.bfloat16})


def test_opening_takes_what_harnesses_pass_at_its_default(home):
    build(home).save_pretrained(home / "fused")
    idle = {"revision": "main", "subfolder": "", "gguf_file": None, "quantization_config": None, "max_memory": None}
    opened = AutoModelForCausalLM.from_pretrained(
        home / "fused", trust_remote_code=False, device_map={"": "cpu"}, low_cpu_mem_usage=True, token=None, **idle
    )
    assert opened.config.use_cache
    for opener in (AutoModelForCausalLM, FusedCausalLM):
        opened = opener.from_pretrained(home / "fused", use_cache=False)
        assert opened(torch.tensor([[5, 6]])).past_key_values is None


def test_number_type_and_strategy_can_be_chosen_at_opening(home):
    build(home).save_pretrained(home / "fused")
    opened = AutoModelForCausalLM.from_pretrained(home / "fused", dtype=torch.bfloat16, strategy="static")
    assert {member.model.dtype for member in opened.members} == {torch.bfloat16}
    assert opened.strategy.to_dict()["amount"] == "static"
    mixed = FusedCausalLM.from_pretrained(home / "fused", dtype={"strong": torch.bfloat16}, device="cpu")
    assert [member.model.dtype for member in mixed.members][:2] == [torch.bfloat16, torch.float32]
