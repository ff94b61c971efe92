"""demo, eval and results on the embedded zoo, with few items."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from trimtab import FusedCausalLM, zoo
from trimtab.cli.eval import Prompting, evaluate, generation_arguments
from trimtab.logits.speculation.length import Costs
from trimtab.measure import evaluate as measuring
from trimtab.measure.scores import ANSWER_METRICS
from trimtab.studies.dlf.conditions import MULTI, SINGLE, SLOW
from trimtab.studies.dlf.page import END, START
from trimtab.studies.models import load_models, load_tokenizer, solved_examples

DEMO_MULTI = set(MULTI) - set(SLOW)

NUM_ITEMS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reports") / "demo"


@pytest.fixture(scope="module")
def document(folder) -> dict:
    """One run of the demo with every task, shared by the tests that read its outcome."""
    from trimtab.cli.main import main

    assert main(["demo", "--items", str(NUM_ITEMS), "--seed", "1", "-o", str(folder)]) == 0
    return json.loads((folder / "results.json").read_text())


def test_the_demo_has_every_column_of_every_task(document) -> None:
    single = {"base", "expert", "strong", "latent", "ceiling", *SINGLE}
    assert list(document["single"]) == list(zoo.TUNED_TASKS)
    assert all(set(columns) == single for columns in document["single"].values())
    assert {"base", "strong", "mixed", "ceiling", *DEMO_MULTI} == set(document["multi"]) - {
        f"expert/{task}" for task in zoo.TUNED_TASKS
    }
    assert all(set(document["multi"][column]) == set(zoo.TASKS) for column in (*DEMO_MULTI, "mixed", "ceiling"))
    assert {"base", "strong", "mixed", "ceiling", "dynamic"} <= set(document["unseen"]["domains"])
    assert (document["pair"], document["items"], document["seed"]) == ("far", NUM_ITEMS, 1)
    assert document["seconds"] > 0
    assert {"trimtab", "torch", "transformers"} <= set(document["versions"])


def test_every_score_is_a_share_of_the_items(document) -> None:
    for task, columns in document["single"].items():
        for value in columns.values():
            assert 0 <= value <= 100
            if zoo.TASKS[task].metric != "rouge2":
                assert math.isclose(value * NUM_ITEMS / 100, round(value * NUM_ITEMS / 100), abs_tol=1e-2)


def test_exact_solution_and_grid_hardly_differ(document) -> None:
    """The grid is 0.1 wide, so alpha is off by 0.05: more than two items of eight in a task would be a bug."""
    for columns in document["single"].values():
        assert abs(columns["dynamic"] - columns["grid"]) <= 200 / NUM_ITEMS + 1e-6


def test_the_report_is_complete_and_not_overwritten(run, document, folder) -> None:
    written = {file.name for file in folder.iterdir()}
    shown = {f"explain-{task}.html" for task in ("arithmetic", "facts", "summary")}
    assert written >= {"index.html", "single.png", "multi.png", "results.json", *shown}
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert "http://" not in html
    assert "https://" not in html
    ran = run("demo", "--items", "1", "-o", folder)
    assert ran.code == 2
    assert "--force" in ran.err


def test_json_prints_the_document_and_writes_nothing(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("demo", "--items", "2", "--tasks", "facts,domains", "--json")
    assert ran.code == 0
    assert set(ran.json()["single"]) == {"facts"}
    assert set(ran.json()["unseen"]) == {"domains"}
    assert not list(tmp_path.iterdir())


def test_an_unknown_task_has_a_nearest_spelling(run) -> None:
    ran = run("demo", "--tasks", "fact", "--json")
    assert ran.code == 2
    assert "did you mean 'facts'?" in ran.err


@pytest.fixture(scope="module")
def fused():
    return load_models("far", ("facts",)).fuse(("facts",))


@pytest.mark.parametrize("task", zoo.TASKS)
def test_the_harness_and_our_own_loop_agree_item_by_item(fused, task: str, tmp_path: Path) -> None:
    found = evaluate(fused, [task], tmp_path, limit=NUM_ITEMS, seed=1, batch_size=4, asked=Prompting())[0][task]
    items = zoo.load_items(task, "test", limit=NUM_ITEMS, seed=1)
    kind = zoo.TASKS[task]
    if kind.kind == "generate":
        prefixes = measuring.read_prompts(fused, fused.tokenizer, [item.prompt for item in items], kind.max_new_tokens)
        answers = measuring.answer_prompts(fused, fused.tokenizer, prefixes, kind.max_new_tokens)
        points = [ANSWER_METRICS[kind.metric](answer, item.target) for answer, item in zip(answers, items, strict=True)]
    else:
        choices = measuring.encode_choices(fused.tokenizer, items)
        chosen = measuring.choose(choices, measuring.read_choices(fused, fused.tokenizer, choices))
        points = [float(place == item.label) for place, item in zip(chosen, items, strict=True)]
    metric = "acc" if kind.kind == "choose" else kind.metric
    assert found["items"] == NUM_ITEMS
    assert found["metrics"][metric]["score"] == pytest.approx(100 * sum(points) / len(points), abs=1e-3)
    low, high = found["metrics"][metric]["interval"]
    assert low <= found["metrics"][metric]["score"] <= high


def test_eval_prints_scores_with_intervals(run) -> None:
    members = ["--strong", "zoo:strong", "--base", "zoo:small", "--expert", "facts=zoo:small/facts"]
    ran = run("eval", *members, "--tasks", "facts,zoo_truth", "--limit", "2", "--json")
    assert ran.code == 0
    assert set(ran.json()["result"]) == {"facts", "zoo_truth"}
    assert ran.json()["versions"]["lm_eval"]
    assert ran.err == ""


def test_eval_scores_the_same_with_and_without_drafts_and_says_what_they_did(run) -> None:
    members = ["--strong", "zoo:strong", "--base", "zoo:small", "--expert", "facts=zoo:small/facts"]
    words = ["eval", *members, "--tasks", "facts,arithmetic,truth", "--limit", "6", "--batch-size", "4"]
    plain, drafted = (run(*words, "--speculate", length, "--json").json() for length in ("0", "4"))
    assert plain["result"] == drafted["result"]
    done = drafted["settings"]["speculation"]
    assert done["generations"] == done["drafted_in"] == 4  # two batches of each task that generates
    assert done["drafted"] > done["accepted"] > 0
    assert done["emitted"] > done["rounds"] > 0
    assert done["acceptance"] == done["accepted"] / done["drafted"]
    none = plain["settings"]["speculation"]
    assert none["reasons"] == {"speculate is 0": 4}
    assert none["drafted"] == 0
    shown = run(*words, "--speculate", "4").out
    assert f"drafts: {done['accepted']} of {done['drafted']} tokens were accepted, in {done['rounds']} rounds" in shown
    assert "drafts: none (speculate is 0)" in run(*words, "--speculate", "0").out
    assert "drafts:" not in run("eval", *members, "--tasks", "truth", "--limit", "2").out


class Asking:
    """Prompts as lm-evaluation-harness puts them to a model."""

    def __init__(self, prompt: str, **options) -> None:
        self.args = (prompt, options)


def answers_of(model, until: list[str], **options) -> list[str]:
    prompts = [item.prompt for task in ("facts", "summary") for item in zoo.load_items(task, "test", limit=3, seed=3)]
    return model.generate_until([Asking(prompt, until=until, **options) for prompt in prompts], disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("until", [["\n"], ["\n\n"], [" ", "never said"], ["a", ". "], ["Ada Moss"], [":"], ["<eos>"]])
def test_answers_are_cut_as_the_harness_cuts_them(fused, until: list[str], batch_size: int) -> None:
    from lm_eval.models.huggingface import HFLM

    from trimtab.logits.lm_eval import TrimtabLM

    options = {"do_sample": False, "max_gen_toks": 24}
    fused.speculate = 0
    theirs = answers_of(HFLM(pretrained=fused, tokenizer=fused.tokenizer, batch_size=batch_size), until, **options)
    ours = answers_of(TrimtabLM(fused, batch_size=batch_size), until, **options)
    fused.speculate = 4
    drafting = TrimtabLM(fused, batch_size=batch_size)
    drafted = answers_of(drafting, until, **options)
    fused.speculate = "auto"
    assert drafted == ours == theirs
    assert sum(report.drafted for report in drafting.speculation) > 0


def test_sampled_answers_of_the_harness_repeat_with_its_seed(fused, monkeypatch) -> None:
    from trimtab.logits.lm_eval import TrimtabLM

    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_BYTES", 0)
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_RATIO", 0)
    numbers = random.Random()  # seeded by the system: what a forward seems to cost is another at each measurement
    monkeypatch.setattr(Costs, "of", lambda self, tokens: numbers.random())
    model, found = TrimtabLM(fused, batch_size=4), []
    for seed in (1, 1, 1, 2):
        torch.manual_seed(seed)
        found.append(answers_of(model, ["\n"], do_sample=True, temperature=1.0, max_gen_toks=24))
    assert found[0] == found[1] == found[2] != found[3]
    assert all(report.is_on for report in model.speculation)


@pytest.mark.parametrize("begun", [True, False])
def test_the_harness_renders_conversations_as_hflm_does(fused, begun: bool) -> None:
    from lm_eval.models.huggingface import HFLM

    from trimtab.logits.lm_eval import TrimtabLM

    talk = [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(("user", "assistant", "user"))]
    talk += [{"role": "assistant", "content": "The answer is"}] if begun else []
    models = (TrimtabLM(fused, batch_size=4), HFLM(pretrained=fused, tokenizer=fused.tokenizer))
    ours, theirs = (model.apply_chat_template(talk, add_generation_prompt=not begun) for model in models)
    assert ours == theirs
    assert ours.endswith("The answer is") == begun


def test_eval_asks_as_lm_eval_does_with_these_options(run) -> None:
    members = ["--strong", "zoo:strong", "--base", "zoo:small", "--expert", "facts=zoo:small/facts"]
    words = ["eval", *members, "--tasks", "facts", "--limit", "6", "--json"]
    ran = run(*words, "--num-fewshot", "3", "--apply-chat-template", "--system-instruction", "Be brief.")
    assert (ran.code, "in the chat template, with a system instruction, after 3 examples" in ran.err) == (0, True)
    assert ran.json()["result"]["facts"]["num_fewshot"] == 3
    settings = ran.json()["settings"]
    assert (settings["apply_chat_template"], settings["fewshot_as_multiturn"]) == (True, True)
    ran = run(*words, "--gen-kwargs", "do_sample=true,temperature=90")
    assert ran.json()["result"]["facts"]["metrics"]["exact_match"]["score"] == 0, "no answer comes by chance"
    assert ran.json()["settings"]["gen_kwargs"] == {"do_sample": True, "temperature": 90}


def test_a_batch_size_is_found(fused, capsys) -> None:
    from trimtab.logits.lm_eval import TrimtabLM

    requests = [type("Request", (), {"args": ("Q: Who?\nA:", answer)})() for answer in (" Ada", " Ben")]
    found, wanted = (
        TrimtabLM(fused, batch_size=size, max_batch_size=8).loglikelihood(requests, disable_tqdm=True)
        for size in ("auto", 2)
    )
    assert "Determined largest batch size: 8" in capsys.readouterr().out
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fewshot-as-multiturn"], "--fewshot-as-multiturn was given without a chat template"),
        (["--template-arg", "x=1"], "--template-arg was given without a chat template"),
        (["--batch-size", "many"], "--batch-size"),
        (["--num-fewshot", "-1"], "less than 0"),
        (["--gen-kwargs", "{no"], "--gen-kwargs {no cannot be read"),
        (["--gen-kwargs", "temprature=1"], "generate refuses the arguments"),
        (["--apply-chat-template", "tool_use"], "no chat template 'tool_use'"),
    ],
)
def test_eval_refuses_what_cannot_be(run, words, message) -> None:
    members = ["--strong", "zoo:strong", "--base", "zoo:small", "--expert", "facts=zoo:small/facts"]
    ran = run("eval", *members, "--tasks", "facts", "--limit", "1", *words)
    assert (ran.code, message in ran.err) == (2, True), ran.err


def test_generation_arguments_are_read_as_lm_eval_reads_them() -> None:
    read = generation_arguments(["temperature=0.5,do_sample=true", '{"until": ["a, b"]}'])
    assert read == {"temperature": 0.5, "do_sample": True, "until": ["a, b"]}


def test_eval_names_the_nearest_task(run) -> None:
    members = ["--strong", "zoo:strong", "--base", "zoo:small", "--expert", "facts=zoo:small/facts"]
    ran = run("eval", *members, "--tasks", "fcats", "--limit", "2")
    assert ran.code == 2
    assert "did you mean 'facts'?" in ran.err


def test_the_task_files_can_be_kept_for_the_harness_itself(run, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    ran = run("eval", "--tasks", "facts,truth", "--limit", "3", "--write-tasks", tmp_path / "tasks", "--json")
    assert ran.code == 0
    assert ran.json()["result"]["tasks"] == ["zoo_facts", "zoo_truth"]
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    assert {"zoo_facts", "zoo_truth"} <= set(manager.all_tasks)


def test_the_harness_finds_the_model_by_its_name(tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model

    import trimtab.logits.lm_eval

    experts = {"facts": "zoo:small/facts"}
    FusedCausalLM.from_members("zoo:strong", "zoo:small", experts).save_pretrained(tmp_path / "model")
    kind = get_model("trimtab")
    assert kind is trimtab.logits.lm_eval.TrimtabLM
    opened = kind(pretrained=str(tmp_path / "model"), strategy="mixture")
    assert opened.model.strategy.to_dict()["amount"] == "mixture"
    assert opened.max_length == opened.model.config.max_position_embeddings


def test_results_are_written_from_all_distinct_items_and_reach_the_readme(run, tmp_path: Path) -> None:
    page, readme = tmp_path / "docs" / "results.md", tmp_path / "README.md"
    words = ["--items", "3", "--seeds", "0,1", "--pairs", "far", "--tasks", "facts,truth,domains", "-o", page]
    ran = run("results", *words)
    assert ran.code == 0, ran.err
    found = json.loads(page.with_suffix(".json").read_text())
    assert [draw["seed"] for draw in found["far"]["draws"]] == [0, 1]
    assert 3 <= found["far"]["pooled"]["num_items"]["facts"] <= 6
    text = page.read_text()
    assert set(MULTI) <= set(found["far"]["pooled"]["multi"])
    assert "| DLF, solved exactly |" in text
    assert "95% bootstrap intervals" in text
    for table in ("single", "multi"):
        assert f"](results-far-{table}.png)" in text
        assert (page.parent / f"results-far-{table}.png").read_bytes().startswith(b"\x89PNG")
    assert run("results", *words).code == 2  # not overwritten
    page.write_text("spoilt")
    assert run("results", "--redraw", "--force", "-o", page).code == 0
    assert page.read_text() == text
    readme.write_text(f"# x\n{START}\nold\n{END}\ny\n")
    assert run("results", "-o", page, "--update-readme", readme).code == 0
    assert "old" not in readme.read_text()
    assert "Dynamic Logits Fusion" in readme.read_text()
    assert readme.read_text().startswith("# x\n")
    assert readme.read_text().endswith("y\n")
    readme.write_text("no markers")
    ran = run("results", "-o", page, "--update-readme", readme)
    assert ran.code == 2
    assert START in ran.err


def test_solved_examples_fit_the_context() -> None:
    tokenizer = load_tokenizer()
    items = {task: zoo.load_items(task, "test", limit=20) for task in zoo.TUNED_TASKS}
    found = solved_examples(tokenizer, zoo.TASKS, items, context=256)
    assert "facts" in found
    for task, prefix in found.items():
        for item in items[task]:
            length = len(tokenizer(prefix + item.prompt + max(item.choices or ("",), key=len))["input_ids"])
            assert length + zoo.TASKS[task].max_new_tokens <= 256
    assert found["facts"].count("Q: ") == 3
