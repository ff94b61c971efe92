"""fuse, generate, chat, explain and eval on tiny real models."""

import io
import json
import random
from pathlib import Path

import pytest
import requests

from trimtab import FusedCausalLM
from trimtab.logits.speculation.decode import SpeculativeDecoder
from trimtab.logits.speculation.length import FIRST, Costs
from trimtab.models.references import http_error

PROMPT = "Q: Where does Ada Moss live?\nA:"
TYPED = PROMPT.replace("\n", "\\n")  # read so with --escapes


def greedy(fused, prompt: str, count: int = 6) -> str:
    return fused.generate_text(prompt, max_new_tokens=count, do_sample=False)[0]


# --- fuse ----------------------------------------------------------------------------------------------------------


def test_a_fused_directory_opens_with_the_settings_it_was_given(run, inline, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    ran = run(
        "fuse", *inline, "--strategy", "dynamic", "--chooser", "confident", "--alpha-max", "1.5", "-o", folder, "--json"
    )
    assert ran.code == 0
    document = ran.json()
    assert document["result"]["directory"] == str(folder)
    strategy = FusedCausalLM.from_pretrained(folder).strategy.to_dict()
    assert strategy == document["settings"]["strategy"]
    assert strategy == {"amount": "dynamic", "chooser": "confident", "settings": {"alpha_max": 1.5}}
    assert not list(folder.glob("*.safetensors"))


def test_alphas_can_be_given_per_expert(run, inline, tmp_path: Path) -> None:
    words = ["--strategy", "static", "--chooser", "sum", "--alpha", "facts=0.5,sums=1.5"]
    assert run("fuse", *inline, *words, "-o", tmp_path / "made").code == 0
    settings = FusedCausalLM.from_pretrained(tmp_path / "made").strategy.to_dict()["settings"]
    assert settings["alpha"] == {"facts": 0.5, "sums": 1.5}


def strategy_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["strategy"]


def test_a_setting_means_the_same_as_set_as_flag_and_from_a_file(run, inline, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("alpha: {facts: 0.5, sums: 1e-1}\n")
    ways = {
        "set": ["--set", "alpha=facts=0.5,sums=0.1"],
        "flag": ["--alpha", "facts=0.5,sums=0.1"],
        "equals": ["--alpha=facts=0.5,sums=0.1"],
        "file": ["--settings", file],
    }
    for name, words in ways.items():
        assert run("fuse", *inline, "--strategy", "static", *words, "-o", tmp_path / name).code == 0
        assert strategy_of(tmp_path / name)["settings"] == {"alpha": {"facts": 0.5, "sums": 0.1}}
    assert (
        run("fuse", *inline, "--strategy", "static", *ways["file"], "--set", "alpha=2", "-o", tmp_path / "b").code == 0
    )
    assert strategy_of(tmp_path / "b")["settings"] == {"alpha": 2.0}  # --set wins


def test_the_former_name_of_a_chooser_is_written_as_todays(run, inline, tmp_path: Path) -> None:
    assert run("fuse", *inline, "--chooser", "paper", "--draft", "lately", "-o", tmp_path / "made").code == 0
    assert strategy_of(tmp_path / "made")["chooser"] == "joint_objective"
    assert json.loads((tmp_path / "made" / "config.json").read_text())["speculate_draft"] == "recent"


def test_the_speaker_of_the_chooser_only_has_its_own_flag(run, inline, tmp_path: Path) -> None:
    assert run("fuse", *inline, "--chooser", "only", "--speaker", "sums", "-o", tmp_path / "made").code == 0
    assert FusedCausalLM.from_pretrained(tmp_path / "made").strategy.to_dict()["settings"]["expert"] == "sums"


def test_drafts_can_be_asked_for(run, inline, tmp_path: Path) -> None:
    words = ["--speculate", "3", "--draft", "sums"]
    assert run("fuse", *inline, *words, "-o", tmp_path / "made").code == 0
    opened = FusedCausalLM.from_pretrained(tmp_path / "made")
    assert (opened.speculate, opened.speculate_draft) == (3, "sums")
    words = ["generate", tmp_path / "made", PROMPT, "--max-new-tokens", "12", "--json"]
    drafted = run(*words).json()
    assert drafted["settings"]["speculation"]["on"] is True
    assert drafted["settings"]["speculation"]["drafters"] == {"sums": drafted["settings"]["speculation"]["rounds"] - 1}
    plain = run(*words, "--speculate", "0").json()
    assert plain["settings"]["speculation"] == {"on": False, "reason": "speculate is 0"}
    assert plain["result"] == drafted["result"]


def test_small_members_can_be_read_in_one_forward_or_not(run, inline, tmp_path: Path) -> None:
    assert run("fuse", *inline, "--one-pass", "off", "-o", tmp_path / "made").code == 0
    opened = FusedCausalLM.from_pretrained(tmp_path / "made")
    assert opened.one_pass is False
    words = ["generate", tmp_path / "made", PROMPT, "--max-new-tokens", "12", "--json"]
    apart, joint = run(*words).json(), run(*words, "--one-pass", "on").json()
    assert apart["result"] == joint["result"]
    ran = run("fuse", *inline, "--one-pass", "perhaps", "-o", tmp_path / "other")
    assert ran.code == 2
    assert "invalid choice: 'perhaps'" in ran.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--speculate", "much"], "Expected: auto or a number"),
        (["--speculate", "-1"], "speculate is -1"),
        (["--draft", "fact"], "did you mean 'facts'?"),
    ],
)
def test_drafts_that_cannot_be_are_refused(run, inline, words, message) -> None:
    ran = run("generate", *inline, *words, PROMPT)
    assert ran.code == 2
    assert message in ran.err


def test_a_directorys_chooser_is_dropped_where_no_expert_is_used(run, inline, tmp_path: Path) -> None:
    assert run("fuse", *inline, "--chooser", "confident", "-o", tmp_path / "made").code == 0
    words = ["generate", tmp_path / "made", PROMPT, "--max-new-tokens", "2", "--strategy", "contrastive"]
    assert run(*words).code == 0
    ran = run(*words, "--chooser", "sum")
    assert ran.code == 2
    assert "chooser 'sum' has nothing to choose" in ran.err


def test_members_can_be_spread_over_devices(run, inline) -> None:
    words = ["generate", *inline, PROMPT, "--max-new-tokens", "4", "--json"]
    assert run(*words, "--device", "auto").json()["result"] == run(*words).json()["result"]


def test_nothing_is_overwritten_without_force(run, inline, fused_dir, tmp_path: Path) -> None:
    ran = run("fuse", *inline, "-o", fused_dir)
    assert ran.code == 2
    assert "--force" in ran.err
    assert run("fuse", *inline, "-o", fused_dir, "--force").code == 0
    (tmp_path / "file").write_text("x")
    assert run("fuse", *inline, "-o", tmp_path / "file", "--force").code == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--beta", "0.5"], "has no setting"),
        (["--alpha-max", "99"], "0 to 10"),
        (["--alpha-max", "much"], "alpha_max is 'much'"),
        (["--set", "alpha_mx=1"], "did you mean 'alpha_max'?"),
        (["--set", "alpha_max"], "Expected: NAME=VALUE"),
        (["--set", "alpha_max=1", "--alpha-max", "2"], "given twice"),
        (["--settings", "no/where.yaml"], "cannot be read"),
        (["--chooser", "sum"], "cannot let all experts speak at once"),
        (["--chooser", "loud"], "there is no chooser 'loud'"),
        (["--chooser", "only", "--speaker", "fact"], "did you mean 'facts'?"),
        (["--expert", "=x"], "NAME=VALUE"),
        (["--expert", "facts=elsewhere"], "two experts have the same name"),
        (["--prompt", "facts"], "NAME=VALUE"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(run, inline, tmp_path: Path, change, message) -> None:
    ran = run("fuse", *inline, *change, "-o", tmp_path / "made")
    assert ran.code == 2
    assert message in ran.err
    assert not (tmp_path / "made").exists()


def test_missing_members_are_named(run, members, tmp_path: Path) -> None:
    ran = run("fuse", "--strong", members["strong"], "-o", tmp_path / "made")
    assert ran.code == 2
    assert "no --base and no --expert" in ran.err


def test_a_member_that_is_not_there_is_named(run, inline, tmp_path: Path) -> None:
    ran = run("fuse", *inline, "--expert", f"gone={tmp_path / 'gone'}", "-o", tmp_path / "made")
    assert ran.code == 2
    assert "gone" in ran.err
    assert not (tmp_path / "made").exists()
    (tmp_path / "empty").mkdir()
    assert run("fuse", *inline, "--expert", f"gone={tmp_path / 'gone'}", "-o", tmp_path / "empty").code == 2
    assert not list((tmp_path / "empty").iterdir())
    assert run("fuse", *inline, "-o", tmp_path / "empty").code == 0


def test_members_may_read_prompts_of_their_own(run, inline, tmp_path: Path) -> None:
    assert (
        run("fuse", *inline, "--prompt", "facts=chat", "--prompt", "strong=Say: {prompt}", "-o", tmp_path / "m").code
        == 0
    )
    assert FusedCausalLM.from_pretrained(tmp_path / "m").has_own_prompts
    assert run("generate", tmp_path / "m", "where?", "--max-new-tokens", "3").code == 0


# --- generate ------------------------------------------------------------------------------------------------------


def test_generate_prints_what_the_model_writes(run, fused_dir) -> None:
    fused = FusedCausalLM.from_pretrained(fused_dir)
    ran = run("generate", fused_dir, PROMPT, "the city", "--max-new-tokens", "6", "--json")
    assert ran.code == 0
    texts = [row["texts"] for row in ran.json()["result"]]
    assert texts == [[greedy(fused, PROMPT)], [greedy(fused, "the city")]]
    assert ran.json()["result"][0]["prompt"] == PROMPT


def test_a_directory_and_the_same_members_inline_write_the_same(run, fused_dir, inline) -> None:
    words = [PROMPT, "--max-new-tokens", "6", "--json"]
    assert run("generate", fused_dir, *words).json()["result"] == run("generate", *inline, *words).json()["result"]


def test_prompts_may_stand_before_and_after_options(run, fused_dir) -> None:
    words = ["--max-new-tokens", "3", "--json"]
    usual = run("generate", fused_dir, "the", "city", *words).json()["result"]
    assert run("generate", fused_dir, "the", *words, "city").json()["result"] == usual
    assert run("generate", fused_dir, *words, "the", "city").json()["result"] == usual


def test_another_strategy_overrides_the_directorys(run, fused_dir) -> None:
    words = ["generate", fused_dir, PROMPT, "--max-new-tokens", "2", "--json"]
    strategies = {
        "kept": run(*words).json()["settings"]["strategy"],
        "setting": run(*words, "--alpha-max", "0.7").json()["settings"]["strategy"],
        "amount": run(*words, "--strategy", "filter", "--beta", "0.5").json()["settings"]["strategy"],
    }
    assert strategies["kept"]["amount"] == strategies["setting"]["amount"] == "dynamic"
    assert strategies["setting"]["settings"]["alpha_max"] == 0.7
    assert strategies["amount"] == {"amount": "filter", "chooser": "joint_objective", "settings": {"beta": 0.5}}


def test_prompts_come_from_a_file_or_from_stdin(run, fused_dir, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": PROMPT}) + "\n\n" + json.dumps("the city") + "\n")
    words = ["generate", fused_dir, "--max-new-tokens", "3", "--json"]
    from_file = run(*words, "--file", file).json()["result"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TYPED}\n\nthe city\n"))
    assert run(*words, "--escapes").json()["result"] == from_file
    assert [row["prompt"] for row in from_file] == [PROMPT, "the city"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{no json", "line 1 is no JSON"), ('{"text": "x"}', 'line 1 has no "prompt"'), (None, "cannot be read")],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(run, fused_dir, tmp_path, content, message) -> None:
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_text(content)
    ran = run("generate", fused_dir, "--file", file)
    assert ran.code == 2
    assert message in ran.err


def test_sampling_repeats_with_its_seed_and_not_with_another(run, fused_dir) -> None:
    words = ["generate", fused_dir, PROMPT, "--temperature", "1", "--samples", "3", "--max-new-tokens", "8", "--json"]
    first, again, other = (run(*words, "--seed", seed).json() for seed in ("1", "1", "2"))
    assert first["result"] == again["result"] != other["result"]
    assert len(set(first["result"][0]["texts"])) == 3
    assert first["seed"] == 1


@pytest.fixture
def costs_that_waver(monkeypatch) -> None:
    """Small members are worth drafts, and what forwards seem to cost is another at each measurement."""
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_BYTES", 0)
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_RATIO", 0)
    numbers = random.Random()  # seeded by the system: what is measured can be foreseen by nobody
    monkeypatch.setattr(Costs, "of", lambda self, tokens: numbers.random())


@pytest.mark.parametrize("asked", [[], ["--speculate", "auto"]], ids=["default", "auto"])
def test_sampling_repeats_with_its_seed_while_drafting(run, fused_dir, costs_that_waver, asked) -> None:
    words = ["generate", fused_dir, PROMPT, "--temperature", "1", "--samples", "3", "--max-new-tokens", "40", "--json"]
    ran = [run(*words, *asked, "--seed", "1").json() for _ in range(3)]
    assert ran[0]["result"] == ran[1]["result"] == ran[2]["result"]
    drafts = [each["settings"]["speculation"] for each in ran]
    assert drafts[0] == drafts[1] == drafts[2]
    assert drafts[0]["drafted"] > drafts[0]["accepted"] > 0
    assert max(map(int, drafts[0]["lengths"])) == FIRST
    assert run(*words, *asked, "--seed", "2").json()["result"] != ran[0]["result"]


def test_a_number_of_drafted_tokens_stays_as_asked_and_greedy_drafts_stay_free(run, fused_dir, costs_that_waver):
    words = ["generate", fused_dir, PROMPT, "--max-new-tokens", "40", "--json"]
    sampled = run(*words, "--temperature", "1", "--speculate", "2").json()["settings"]["speculation"]
    assert max(map(int, sampled["lengths"])) == 2
    greedily = run(*words).json()["settings"]["speculation"]
    assert len(set(greedily["lengths"]) - {"0", str(FIRST)}) > 1


def test_sampling_without_drafts_repeats_and_says_why_there_are_none(run, fused_dir) -> None:
    words = ["generate", fused_dir, PROMPT, "--temperature", "1", "--max-new-tokens", "8", "--json"]
    first, again = (run(*words).json() for _ in range(2))
    assert first["result"] == again["result"]
    assert "too small for drafts to pay" in first["settings"]["speculation"]["reason"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-p", "0.5"], "add --temperature"),
        (["--samples", "2"], "add --temperature"),
        (["--temperature", "-1"], "not a number of at least 0"),
        (["--temperature", "1", "--top-p", "2"], "(0, 1]"),
    ],
)
def test_options_that_would_change_nothing_or_cannot_be_are_refused(run, fused_dir, words, message) -> None:
    ran = run("generate", fused_dir, PROMPT, *words)
    assert ran.code == 2
    assert message in ran.err


def test_generation_stops_at_a_text_and_leaves_it_out(run, fused_dir) -> None:
    whole = greedy(FusedCausalLM.from_pretrained(fused_dir), PROMPT, 12)
    stop = whole[3:5]
    ran = run("generate", fused_dir, PROMPT, "--max-new-tokens", "12", "--stop", stop, "--json")
    assert ran.json()["result"][0]["texts"] == [whole[: whole.index(stop)]]


@pytest.mark.parametrize(
    ("words", "message"),
    [([""], "empty"), ([], "no prompt")],
)
def test_nothing_to_continue_is_refused(run, fused_dir, words, message, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    ran = run("generate", fused_dir, *words)
    assert ran.code == 2
    assert message in ran.err


def test_a_directory_that_is_no_model_is_refused(run, tmp_path: Path) -> None:
    assert run("generate", tmp_path / "nothing", "x").code == 2
    assert run("generate").code == 2
    ran = run("generate", tmp_path, "x")
    assert ran.code == 2
    assert "Traceback" not in ran.err


def test_members_and_a_directory_at_once_are_one_too_many(run, fused_dir, inline) -> None:
    ran = run("chat", fused_dir, *inline)
    assert ran.code == 2
    assert "not both" in ran.err


# --- chat ----------------------------------------------------------------------------------------------------------


def talk(run, monkeypatch, fused_dir, lines: list[str], *words: str):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return run("chat", fused_dir, "--max-new-tokens", "5", *words)


def test_chat_remembers_until_it_is_told_to_forget(run, monkeypatch, fused_dir) -> None:
    fused = FusedCausalLM.from_pretrained(fused_dir)
    ran = talk(run, monkeypatch, fused_dir, ["where?", "and then?", "/reset", "where?", "/quit", "unheard"], "--json")
    assert ran.code == 0
    said = ran.json()["result"]
    assert [turn["role"] for turn in said] == ["user", "assistant"] * 3
    first, second, third = (turn["content"] for turn in said[1::2])
    assert first == third == greedy(fused, [{"role": "user", "content": "where?"}], 5).strip()
    whole = [*said[:2], {"role": "user", "content": "and then?"}]
    assert second == greedy(fused, whole, 5).strip()
    assert "forgotten." in ran.err


def test_chat_streams_the_same_answers(run, monkeypatch, fused_dir) -> None:
    answers = [
        turn["content"]
        for turn in talk(run, monkeypatch, fused_dir, ["where?", "what?"], "--json").json()["result"][1::2]
    ]
    streamed = talk(run, monkeypatch, fused_dir, ["where?", "what?"])
    assert streamed.code == 0
    assert "".join(streamed.out.split()) == "".join("".join(answers).split())


def test_chat_repeats_what_it_sampled_while_drafting(run, monkeypatch, fused_dir, costs_that_waver) -> None:
    drafted = []
    decode = SpeculativeDecoder.run
    monkeypatch.setattr(SpeculativeDecoder, "run", lambda self: (decode(self), drafted.append(self.report.drafted)))
    words = ["--temperature", "1", "--max-new-tokens", "30", "--json"]
    talks = [talk(run, monkeypatch, fused_dir, ["where?", "what?"], *words).json()["result"] for _ in range(3)]
    assert talks[0] == talks[1] == talks[2]
    assert len(drafted) == 6
    assert all(drafted)


def test_chat_drops_the_oldest_turns_and_says_so(run, monkeypatch, fused_dir) -> None:
    long = "where does Ada Moss live in the city of Port Elm? " * 6
    ran = talk(run, monkeypatch, fused_dir, [long, long, "and?"])
    assert ran.code == 0
    assert "oldest turns no longer fit" in ran.err


# --- explain -------------------------------------------------------------------------------------------------------


def test_explain_writes_a_page_and_a_plot_of_the_models_own_trace(run, fused_dir, tmp_path: Path) -> None:
    page = tmp_path / "deep" / "page.html"
    ran = run("explain", fused_dir, PROMPT, "-o", page, "--max-new-tokens", "5", "--json")
    assert ran.code == 0
    trace = FusedCausalLM.from_pretrained(fused_dir).trace(PROMPT, max_new_tokens=5, do_sample=False).to_dict()
    assert ran.json()["result"]["trace"]["text"] == trace["text"]
    html = page.read_text(encoding="utf-8")
    assert html.count('class="token ') == len(trace["steps"])
    assert page.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert run("explain", fused_dir, PROMPT, "-o", page).code == 2
    assert (
        run("explain", fused_dir, PROMPT, "-o", page, "--force", "--max-new-tokens", "2", "--strategy", "mixture").code
        == 0
    )
    assert 'class="token nobody"' not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("words", "message"), [([], "0 prompts"), (["a", "b"], "2 prompts"), ([""], "empty")])
def test_explain_wants_one_prompt(run, fused_dir, tmp_path: Path, words, message) -> None:
    ran = run("explain", fused_dir, *words, "-o", tmp_path / "page.html")
    assert ran.code == 2
    assert message in ran.err
    assert not list(tmp_path.iterdir())


# --- all of them ---------------------------------------------------------------------------------------------------


def test_loading_is_silent(run, fused_dir) -> None:
    ran = run("generate", fused_dir, "the", "--max-new-tokens", "2")
    assert ran.code == 0
    assert ran.err == ""


@pytest.fixture
def told_without_data(run, fused_dir, monkeypatch):
    """What `eval` says on stderr where fetching a task's data ends with an error."""

    def told(error):
        def away(**_):
            raise error

        monkeypatch.setattr("lm_eval.simple_evaluate", away)
        ran = run("eval", fused_dir, "--tasks", "facts", "--limit", "1")
        assert ran.code == 2
        assert "those of the zoo need no network" in ran.err
        return ran.err

    return told


@pytest.mark.parametrize("kind", [ConnectionError, requests.ConnectionError, http_error()])
def test_tasks_whose_data_cannot_be_had_are_told_so(told_without_data, kind) -> None:
    told = told_without_data(kind("Couldn't reach the hub"))
    assert "OfflineError: the data of a task cannot be had: Couldn't reach the hub" in told
    assert "connect, or ask for one of" in told


def test_who_refuses_the_data_of_a_task_is_told_with_what_to_do(told_without_data) -> None:
    said = "503 Server Error: Unavailable\n\nfor url: https://the.hub/data\nFor more information check: https://a.b"
    told = told_without_data(requests.HTTPError(said, response=requests.Response()))
    assert "cannot be had: 503 Server Error: Unavailable for url: https://the.hub/data\n" in told
    assert "try again later, or see to the name of the data" in told
