"""With drafts everything that `generate` knows gives what it gives without: tokens, stops, streams, scores, caches."""

import contextlib
import copy
import dataclasses
import itertools
from typing import ClassVar

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import tiny
from fusing import PROMPTS, check_same_tokens, fuse, new_tokens
from trimtab import FusedCausalLM
from trimtab.core.errors import BadSetting, UnknownName
from trimtab.logits.forward.reader import InvalidLogits
from trimtab.logits.speculation import plan
from trimtab.logits.speculation.draft import drafter_for, lookup
from trimtab.logits.speculation.length import AcceptanceHistory, Costs, DraftLength
from trimtab.logits.strategy.base import Amount
from trimtab.logits.strategy.fusion import make_strategy
from trimtab.zoo import load_items

PAIRS = [("llama", kind) for kind in tiny.KINDS] + [(kind, "llama") for kind in tiny.KINDS[1:]] + [("gemma2", "gpt2")]
MANY = [*PROMPTS, "abcabcabc, abcabc and so on, abcabc", "Q", "1+1=2, 2+2=4, 3+3="]
DRAFTS = ["auto", "recent", "mixture", "fused", "prompt", "base", "math", "facts"]


def check_with_drafts(model, prompts, drafts=4, most=0, **options):
    """Greedy text with drafts is the text without; returns the report of the former."""
    inputs, plain = new_tokens(model, prompts, speculate=0, **options)
    assert not model.last_speculation.is_on
    _, drafted = new_tokens(model, prompts, speculate=drafts, **options)
    report = model.last_speculation
    assert report.is_on
    check_same_tokens(model, drafted, plain, inputs, most=most)
    return report


# ---- greedy


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@pytest.mark.parametrize("prompts", [MANY[3], MANY], ids=["one", "batch"])
def test_greedy_text_is_that_without_drafts(kinds, prompts):
    report = check_with_drafts(fuse(kinds), prompts, max_new_tokens=40)
    assert report.drafted > 0


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("length", [1, 3, 16])
def test_greedy_text_is_that_without_drafts_whoever_drafts(fused, draft, length):
    report = check_with_drafts(fused, MANY, length, max_new_tokens=40, speculate_draft=draft)
    assert max(report.lengths) <= length
    assert report.accepted > 0 or draft in ("prompt", "base")
    if draft not in ("auto", "recent", "prompt"):
        assert set(report.drafters) == {draft}


LONG_ANSWERS = [pytest.param(task, marks=pytest.mark.thorough) for task in ("arithmetic", "summary")]


@pytest.mark.parametrize("task", ["facts", "truth", *LONG_ANSWERS])
def test_greedy_text_on_the_zoo(task):
    model = FusedCausalLM.from_members("zoo:strong", "zoo:small", {task: f"zoo:small/{task}"}, tokenizer=None)
    items = [*load_items(task, "validation", limit=240), *load_items(task, "test", limit=90)]
    prompts = [item.prompt for item in items]
    assert len(prompts) == {"truth": 210}.get(task, 330)  # 1,200 over the four tasks
    close, accepted, sizes = 0, 0, [1] * 10 + [40] * 8
    for start, size in zip(itertools.accumulate([0, *sizes]), sizes, strict=False):
        rows = prompts[start : start + size]
        if not rows:
            break
        inputs, plain = new_tokens(model, rows, speculate=0, max_new_tokens=24)
        _, drafted = new_tokens(model, rows, speculate=3, max_new_tokens=24)
        close += parted(model, drafted, plain, inputs)
        accepted += model.last_speculation.accepted
        assert 1 <= model.last_speculation.tokens_per_round <= 4
    assert close <= len(prompts) // 100
    assert accepted > len(prompts) / 4


def parted(model, ours, theirs, inputs):
    """How many rows part, each of them at a close call (which is checked)."""
    width = min(ours.shape[1], theirs.shape[1])
    rows = [row for row in range(len(ours)) if not torch.equal(ours[row, :width], theirs[row, :width])]
    for row in rows:
        one = {name: part[row : row + 1] for name, part in inputs.items()}
        check_same_tokens(model, ours[row : row + 1], theirs[row : row + 1], one, tolerance=1e-4, most=1)
    return len(rows)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_experts_draft(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny.make(seed=1)
    base.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("math", "facts")):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(tiny.make(seed=1), config).save_pretrained(tmp_path / name, save_embedding_layers=False)
    strong, adapters = tiny.make(seed=0, width=48), {n: str(tmp_path / n) for n in ("math", "facts")}
    with pytest.warns(match="recorded|base"):
        model = FusedCausalLM.from_members(strong, str(tmp_path / "base"), adapters, tokenizer=tiny.make_tokenizer())
    assert check_with_drafts(model, MANY, max_new_tokens=40).accepted > 0


def test_members_with_prompts_of_their_own_draft():
    model = fuse(prompts={"math": "Sum: {prompt}\n=", "strong": "{prompt}, please:"})
    report = check_with_drafts(model, MANY, max_new_tokens=30)
    assert report.accepted > 0


def test_members_in_bfloat16_draft():
    model = fuse()
    for body in model.bodies:
        body.to(torch.bfloat16)
    inputs, drafted = new_tokens(model, PROMPTS[0], speculate=3)
    _, plain = new_tokens(model, PROMPTS[0], speculate=0)
    check_same_tokens(model, drafted, plain, inputs, tolerance=0.3, most=1)


@contextlib.contextmanager
def breaking_after(token, member, model):
    """Within the block a member gives NaN behind any text with this token."""
    body = next(own.model for name, own in zip(model.member_names, model.members, strict=True) if name == member)
    row = body.get_input_embeddings().weight.data[token]
    usual = row.clone()
    row.fill_(torch.nan)
    yield
    row.copy_(usual)


def rejected_drafts(model, prompts, plain, **options):
    """Tokens that are drafted, and come neither in the prompts nor in the texts."""
    read = set()
    hook = model.members.strong.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.update(kwargs["input_ids"].flatten().tolist()), with_kwargs=True
    )
    inputs, _ = new_tokens(model, prompts, **options)
    hook.remove()
    return sorted(read - set(plain.flatten().tolist()) - set(inputs["input_ids"].flatten().tolist()) - {0, 1})


@pytest.mark.parametrize("prompts", [MANY[0], MANY], ids=["one", "batch"])
@pytest.mark.parametrize("member", ["strong", "math", "facts"])
def test_a_law_that_breaks_behind_a_rejected_token_harms_nobody(prompts, member):
    options = {"speculate": 4, "speculate_draft": "math", "max_new_tokens": 16}
    model = fuse(one_pass=False)  # so that a hook can look at what is read
    inputs, plain = new_tokens(model, prompts, **options | {"speculate": 0})
    tokens = rejected_drafts(model, prompts, plain, **options)[:3]
    assert tokens
    model.one_pass = "auto"
    for token in tokens:
        with breaking_after(token, member, model):
            _, drafted = new_tokens(model, prompts, **options)
        assert model.last_speculation.drafted > model.last_speculation.accepted
        check_same_tokens(model, drafted, plain, inputs)


@pytest.mark.parametrize("draft", ["math", "base"])
@pytest.mark.parametrize("member", ["strong", "math"])
def test_a_law_that_breaks_where_the_text_comes_is_told_of_at_its_step(fused, member, draft):
    _, plain = new_tokens(fused, MANY[0], speculate=0)
    used = fused.encode(MANY[0])["input_ids"].flatten().tolist()
    new = plain[0].tolist()
    at, token = next((at, token) for at, token in enumerate(new) if token not in (*used, *new[:at]) and at > 2)
    model, found = fuse(), []
    for drafts in (0, 4):
        with breaking_after(token, member, model), pytest.raises(InvalidLogits) as error:
            new_tokens(model, MANY[0], speculate=drafts, speculate_draft=draft)
        found.append(str(error.value))
    assert found[0] == found[1]
    assert f"member '{member}' gave logits that are NaN or make no distribution, at step {at + 2} of" in found[0]
    assert model.last_speculation.emitted == at + 1  # what came before is counted


@pytest.mark.parametrize("member", ["strong", "math", "facts"])
def test_a_law_behind_the_end_of_a_text_is_never_needed(fused, member):
    """An end is the last token of a draft that stands as a whole, and nobody goes on from there."""
    inputs, plain = new_tokens(fused, MANY[0], speculate=0)
    used = inputs["input_ids"].flatten().tolist()
    end = next(token for token in plain[0, 3:].tolist() if token not in used)
    model, ends = fuse(), []
    with breaking_after(end, member, model):
        for drafts in (0, 1, 2, 3, 4):
            ends.append(new_tokens(model, MANY[0], speculate=drafts, speculate_draft="math", eos_token_id=end)[1])
    assert all(torch.equal(ids, ends[0]) for ids in ends)
    assert ends[0][0, -1] == end


def test_drafts_stop_where_a_context_ends(fused):
    prompt = "x" * (tiny.CONTEXT - 6)
    with pytest.warns(match="cut after 7 new tokens"):
        check_with_drafts(fused, prompt, 8, max_new_tokens=50)


def test_no_member_reads_a_token_twice():
    """The strong model's forwards are the rounds; the drafter's are its tokens, and one for each bonus."""
    fused = fuse(one_pass=False)  # each member by itself, so that hooks can count what it reads
    read = dict.fromkeys(fused.member_names, 0)
    hooks = [
        member.model.register_forward_pre_hook(
            lambda _, args, kwargs, name=member.name: read.__setitem__(name, read[name] + kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        for member in fused.members
    ]
    inputs, new = new_tokens(fused, PROMPTS[0], speculate=3, speculate_draft="math", max_new_tokens=30)
    for hook in hooks:
        hook.remove()
    report = fused.last_speculation
    prompt, rejected = inputs["input_ids"].shape[1], report.drafted - report.accepted
    assert read["strong"] == prompt + report.drafted + report.rounds - 1  # the first round reads the prompt
    assert read["strong"] - rejected <= prompt + new.shape[1] + 3
    assert report.calls["strong"] == report.rounds
    assert read["math"] <= read["strong"]


# ---- processors, stops, streams, outputs


class OnlyEven(LogitsProcessor):
    """Goes by the row and by the length of the text, as nobody told the decoder that it would."""

    looks_back = False

    def __call__(self, input_ids, scores):
        rows = torch.arange(scores.shape[0]).unsqueeze(-1)
        is_out = (torch.arange(scores.shape[1]) + rows + input_ids.shape[1]) % 2 == 0
        return scores.masked_fill(is_out, -torch.inf)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
        {"bad_words_ids": [[5], [6, 7]], "min_new_tokens": 10, "sequence_bias": [[[9], 2.0]]},
        {"forced_eos_token_id": 1, "suppress_tokens": [8, 9], "begin_suppress_tokens": [10, 11, 12]},
        {"exponential_decay_length_penalty": (5, 1.5), "min_length": 30},
        {"logits_processor": LogitsProcessorList([OnlyEven()])},
        {"encoder_no_repeat_ngram_size": 1},
        {"prefix_allowed_tokens_fn": lambda row, ids: [(row + len(ids)) % 50 + 4, (row * len(ids)) % 50 + 4]},
    ],
    ids=["repetition", "words", "forced", "decay", "own", "ngrams", "prefix"],
)
def test_processors_hear_the_text_before_each_drafted_token(fused, options):
    plain = new_tokens(fused, MANY, speculate=0)[1]
    steered = new_tokens(fused, MANY, speculate=0, **options)[1]
    assert plain.shape != steered.shape or not torch.equal(plain, steered)  # they do something here
    check_with_drafts(fused, MANY, max_new_tokens=24, **options)


def test_nobody_is_asked_about_positions_behind_an_end(fused):
    start = len(fused.encode("Q: and now")["input_ids"][0])
    tree = {(): [10], (10,): [11], (10, 11): [12], (10, 11, 12): [1]}
    allowed = {"prefix_allowed_tokens_fn": lambda row, ids: tree[tuple(ids.tolist()[start:])]}
    _, ids = new_tokens(fused, "Q: and now", speculate=6, **allowed)
    assert ids.tolist() == [[10, 11, 12, 1]]
    assert fused.last_speculation.accepted > 0


def test_nobody_is_asked_about_a_text_behind_its_stop_string(fused):
    start = len(fused.encode("Q: and now")["input_ids"][0])
    tree = {(): [10], (10,): [11], (10, 11): [12]}
    allowed = {"prefix_allowed_tokens_fn": lambda row, ids: tree[tuple(ids.tolist()[start:])]}
    stop = {"stop_strings": [fused.tokenizer.decode(12)], "tokenizer": fused.tokenizer}
    _, ids = new_tokens(fused, "Q: and now", speculate=6, **allowed, **stop)
    assert ids.tolist() == [[10, 11, 12]]
    assert fused.last_speculation.accepted > 0


class OverAtTwelve(StoppingCriteria):
    """Goes by the text alone, and says so; it keeps what it was asked about."""

    is_row_wise, looks_back = True, False

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.extend(map(tuple, input_ids.tolist()))
        return input_ids[:, -1] == 12


class UpToTwelve:
    """Two tokens at each place, until 12 ends the text: behind 3 tokens in the first row, 4 in the second, and so on.
    Any text that cannot be is a KeyError."""

    def __init__(self, width):
        self.width = width

    def __call__(self, row, ids):
        return {place: [10, 11] if place < 3 + row else [12] for place in range(4 + row)}[len(ids) - self.width]

    def of_ended_rows_too(self, row, ids):
        """Without drafts rows that have ended are asked about until all have."""
        return [0] if 12 in ids.tolist()[self.width :] else self(row, ids)


def check_samples(model, prompts, drafts, **options):
    """Nothing is raised."""
    for seed in range(4):
        torch.manual_seed(seed)
        new_tokens(model, prompts, speculate=drafts, do_sample=True, **options)
        assert model.last_speculation.drafted > 0


LIKE_PROMPTS = ["ab ghgi ab ", "cdef ghghi cdef ", "k gghhgi k "]  # what is looked up has an end where the text has


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", ["prompt", "math", "fused"])
@pytest.mark.parametrize("prompts", [LIKE_PROMPTS[:1], LIKE_PROMPTS], ids=["one", "batch"])
@pytest.mark.parametrize("ended_by", ["stop strings", "criteria"])
def test_nobody_is_asked_about_texts_that_have_stopped(fused, ended_by, prompts, draft, do_sample):
    stop = {"stop_strings": [fused.tokenizer.decode(12)], "tokenizer": fused.tokenizer}
    if ended_by == "criteria":
        stop = {"stopping_criteria": StoppingCriteriaList([OverAtTwelve()])}
    allowed = UpToTwelve(fused.encode(prompts)["input_ids"].shape[1])
    options = {"prefix_allowed_tokens_fn": allowed, "speculate_draft": draft, **stop}
    if do_sample:
        check_samples(fused, prompts, 8, **options)
        return
    inputs, drafted = new_tokens(fused, prompts, speculate=8, **options)
    assert fused.last_speculation.drafted > 0
    plain = new_tokens(fused, prompts, speculate=0, prefix_allowed_tokens_fn=allowed.of_ended_rows_too, **stop)[1]
    check_same_tokens(fused, drafted, plain, inputs)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", ["prompt", "math", "fused"])
def test_nobody_is_asked_beyond_the_room_of_a_row(fused, draft, do_sample):
    """Rows that are ahead of others have less room than the draft is long."""
    prompts = [*MANY, *LIKE_PROMPTS, "ghghghghgh"]
    width = fused.encode(prompts)["input_ids"].shape[1]
    places = [[10, 11]] * 13
    options = {"prefix_allowed_tokens_fn": lambda row, ids: places[len(ids) - width], "speculate_draft": draft}
    options["max_new_tokens"] = len(places)
    if do_sample:
        check_samples(fused, prompts, 6, **options)
    else:
        assert check_with_drafts(fused, prompts, 6, **options).drafted > 0


@pytest.mark.parametrize("looks_back", [False, True])
def test_criteria_that_may_look_back_hear_of_no_draft(fused, looks_back):
    prompts = LIKE_PROMPTS
    width = fused.encode(prompts)["input_ids"].shape[1]
    criteria = OverAtTwelve()
    criteria.looks_back = looks_back
    options = {"stopping_criteria": [criteria], "speculate": 6, "speculate_draft": "math"}
    inputs, ids = new_tokens(fused, prompts, prefix_allowed_tokens_fn=lambda row, ids: [10, 11], **options)
    texts = [(*prompt, *new) for prompt, new in zip(inputs["input_ids"].tolist(), ids.tolist(), strict=True)]
    # Nobody is asked about the last tokens, which leave no room.
    emitted = {text[:length] for text in texts for length in range(width + 1, len(text))}
    assert emitted <= set(criteria.asked)
    assert (emitted == set(criteria.asked)) == looks_back
    criteria.asked.clear()
    new_tokens(fused, prompts, **options)  # no processor needs to know
    assert len(criteria.asked) == fused.last_speculation.emitted - len(prompts)


def test_nobody_reads_beyond_an_end_that_was_drafted():
    """What may come is one text of four tokens, which a draft behind the prompt holds with its end."""
    model = fuse(one_pass=False)
    tree = {(): [10], (10,): [11], (10, 11): [12], (10, 11, 12): [1]}
    width = model.encode("Q: and now")["input_ids"].shape[1]
    allowed = {"prefix_allowed_tokens_fn": lambda row, ids: tree[tuple(ids.tolist()[width:])]}
    _, ids = new_tokens(model, "Q: and now", speculate=6, speculate_draft="math", **allowed)
    assert ids.tolist() == [[10, 11, 12, 1]]
    assert model.last_speculation.calls == {"math": 4, "strong": 1, "base": 1, "facts": 1}


def test_the_first_drafter_is_who_weighed_most_behind_the_prompt():
    model = fuse(strategy={"amount": "dynamic", "chooser": "only", "settings": {"expert": "facts"}})
    new_tokens(model, MANY[0], speculate=3, speculate_draft="recent")
    assert set(model.last_speculation.drafters) == {"facts"}


def test_what_is_looked_up_ends_where_a_text_would(fused):
    prompt = torch.tensor([[5, 6, 7, 1, 8, 9, 10, 11, 12]])
    tree = {(): [5], (5,): [6], (5, 6): [7], (5, 6, 7): [1]}
    options = {"prefix_allowed_tokens_fn": lambda row, ids: tree[tuple(ids.tolist()[9:])], "do_sample": False}
    ids = fused.generate(prompt, speculate=6, speculate_draft="prompt", max_new_tokens=9, **options)
    assert ids[0, 9:].tolist() == [5, 6, 7, 1]
    assert (fused.last_speculation.drafted, fused.last_speculation.accepted) == (2, 2)


class ModuleChangeDetector:
    """What may follow a text that can be; any other is a KeyError, as in a walk along a trie."""

    def __init__(self, start, depth=12):
        self.start, self.depth, self.asked = start, depth, 0

    def __call__(self, row, ids):
        new = ids.tolist()[self.start :]
        allowed = self.follow(row, ())
        for depth, token in enumerate(new):
            if token == 1 and depth > 0:
                return [0, 1]
            allowed = dict.fromkeys(allowed, self.follow(row, new[: depth + 1]))[token]
        self.asked += 1
        return allowed if len(new) < self.depth else [1]

    def follow(self, row, new):
        """Five tokens, others in each row and at each step; 10 and 11 are always among them."""
        return [10, 11, *(20 + (7 * row + 3 * len(new) + n) % 40 for n in range(3))]


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", ["prompt", "math", "fused"])
def test_nobody_is_asked_about_texts_that_cannot_be(fused, draft, do_sample):
    prompts = ["abcdef abcdef abc", "gggg(h)gggg(h)gg", "Q"]
    tree = ModuleChangeDetector(fused.encode(prompts)["input_ids"].shape[1])
    options = {"prefix_allowed_tokens_fn": tree, "speculate_draft": draft, "do_sample": do_sample}
    if do_sample:
        for seed in range(4):
            torch.manual_seed(seed)
            new_tokens(fused, prompts, speculate=4, **options)
            assert fused.last_speculation.drafted > 0
    else:
        assert check_with_drafts(fused, prompts, **options).drafted > 0
    assert tree.asked > 0


def test_processors_that_may_keep_account_of_steps_go_without(fused):
    class Counting(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    options = {"logits_processor": LogitsProcessorList([Counting()])}
    with pytest.raises(BadSetting, match="Counting may remember"):
        new_tokens(fused, "Q", speculate=2, **options)
    new_tokens(fused, "Q", speculate="auto", **options)
    assert "Counting" in fused.last_speculation.reason


def test_masks_with_holes_go_without(fused):
    inputs = fused.encode(MANY[0])
    inputs["attention_mask"][0, 3] = 0
    with pytest.raises(BadSetting, match="no padding on the left"):
        fused.generate(**inputs, speculate=2, max_new_tokens=4)


def test_stop_strings_and_criteria_end_each_row_where_they_should(fused):
    _, plain = new_tokens(fused, MANY, speculate=0)
    stop = [fused.tokenizer.decode(plain[0, 5]), fused.tokenizer.decode(plain[3, 8])]
    check_with_drafts(fused, MANY, 6, stop_strings=stop, tokenizer=fused.tokenizer)

    class Long(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([len(set(row.tolist())) >= 14 for row in input_ids])

    check_with_drafts(fused, MANY[0], 6, stopping_criteria=StoppingCriteriaList([Long()]))
    with pytest.raises(BadSetting, match="Long may look at all rows together"):
        new_tokens(fused, MANY, speculate=2, stopping_criteria=StoppingCriteriaList([Long()]))

    class Soon(StoppingCriteria):
        """As lm-eval's: one answer for all rows, and no tensor."""

        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] > 20

    check_with_drafts(fused, MANY[0], 6, stopping_criteria=StoppingCriteriaList([Soon()]))


def test_text_streams(fused):
    seen = []

    class Ear(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            seen.append(text)

    _, ids = new_tokens(fused, MANY[3], streamer=Ear(fused.tokenizer, skip_prompt=True), speculate=4)
    assert "".join(seen) == fused.tokenizer.decode(ids[0])


def test_rows_that_stream_together_go_without(fused):
    class Any(BaseStreamer):
        def put(self, value):
            pass

        def end(self):
            pass

    with pytest.raises(BadSetting, match="6 rows are streamed together"):
        new_tokens(fused, MANY, streamer=Any(), speculate=4)


@pytest.mark.parametrize("prompts", [MANY[0], MANY], ids=["one", "batch"])
def test_scores_and_logits_are_those_without_drafts(fused, prompts):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "temperature": 0.5}
    options |= {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.3}
    inputs = fused.encode(prompts)
    plain, drafted = (fused.generate(**inputs, **options, speculate=n) for n in (0, 3))
    assert torch.equal(plain.sequences, drafted.sequences)
    ended = torch.zeros(len(plain.sequences), dtype=torch.bool)
    for step in range(len(plain.logits)):
        for ours, theirs in ((drafted.logits, plain.logits), (drafted.scores, plain.scores)):
            torch.testing.assert_close(ours[step][~ended], theirs[step][~ended], atol=1e-3, rtol=1e-4)
        ended |= plain.sequences[:, inputs["input_ids"].shape[1] + step] == 1
    assert (drafted.past_key_values is None) == (len(plain.sequences) > 1)


@pytest.mark.parametrize("kinds", [("llama", "llama"), ("mistral", "gemma2")], ids="-".join)
def test_a_cache_carries_a_conversation_on(kinds):
    model = fuse(kinds)
    first = model.encode("Hello, hello, hello. ")
    options = {"do_sample": False, "return_dict_in_generate": True, "speculate": 3}
    opened = model.generate(**first, max_new_tokens=9, **options)
    more = torch.cat([opened.sequences, model.encode("And then?")["input_ids"]], dim=-1)
    options |= {"attention_mask": torch.ones_like(more), "max_new_tokens": 12}
    carried = model.generate(more, past_key_values=opened.past_key_values, **options)
    torch.testing.assert_close(carried.sequences, model.generate(more, **options | {"speculate": 0}).sequences)


@pytest.mark.parametrize("kinds", [("llama", "llama"), ("mistral", "gemma2")], ids="-".join)
def test_a_padded_rows_cache_carries_its_conversation_on(kinds):
    model = fuse(kinds)
    ids = torch.nn.functional.pad(model.encode("Hello, hello, hello. ")["input_ids"], (5, 0))
    mask = (torch.arange(ids.shape[1]) >= 5).long().unsqueeze(0)
    options = {"do_sample": False, "return_dict_in_generate": True, "speculate": 3}
    opened = model.generate(ids, attention_mask=mask, max_new_tokens=9, **options)
    more = torch.cat([opened.sequences, model.encode("And then?")["input_ids"]], dim=-1)
    mask = (torch.arange(more.shape[1]) >= 5).long().unsqueeze(0)
    options |= {"attention_mask": mask, "max_new_tokens": 12}
    carried = model.generate(more, past_key_values=opened.past_key_values, **options)
    torch.testing.assert_close(carried.sequences, model.generate(more, **options | {"speculate": 0}).sequences)


def test_sampled_rows_are_as_many_as_asked_for(fused):
    torch.manual_seed(0)
    _, ids = new_tokens(fused, MANY[:2], speculate=3, do_sample=True, num_return_sequences=4, top_k=5)
    assert ids.shape[0] == 8
    assert len({tuple(row) for row in ids.tolist()}) > 4


# ---- settings


def test_the_model_keeps_its_settings(fused, members_dir, tmp_path):
    members = {name: str(members_dir / name) for name in ("math", "facts")}
    model = FusedCausalLM.from_members(str(members_dir / "strong"), str(members_dir / "base"), members)
    assert (model.speculate, model.speculate_draft) == ("auto", "auto")
    model.speculate, model.speculate_draft = 5, "facts"
    model.save_pretrained(tmp_path / "fused")
    again = FusedCausalLM.from_pretrained(tmp_path / "fused")
    assert (again.speculate, again.speculate_draft) == (5, "facts")
    new_tokens(again, PROMPTS[0])
    assert set(again.last_speculation.drafters) == {"facts"}
    assert max(again.last_speculation.lengths) == 5


@pytest.mark.parametrize("speculate", [-1, 17, "often", True])
def test_settings_that_mean_nothing_are_refused(fused, speculate):
    with pytest.raises(BadSetting, match="speculate is"):
        plan.Plan(speculate).check(fused.expert_names)


def test_an_unknown_drafter_is_refused(fused):
    with pytest.raises(UnknownName, match="did you mean 'math'"):
        new_tokens(fused, "Q", speculate=2, speculate_draft="maths")


@dataclasses.dataclass(frozen=True)
class Fading(Amount):
    """An amount that remembers its last step."""

    looks_back: ClassVar[bool] = True
    has_alpha: ClassVar[bool] = True

    def alphas(self, step, deltas):
        return torch.ones_like(deltas.forward[0])


def obstacles():
    yield {"cache_implementation": "static"}, "cannot take back"
    yield {"use_cache": False}, "no cache"
    yield {"prefill_chunk_size": 2}, "prefill_chunk_size"


@pytest.mark.parametrize(("options", "reason"), list(obstacles()), ids=lambda x: str(x))
def test_what_cannot_be_speculated_says_why(fused, options, reason):
    with pytest.raises(BadSetting, match=reason):
        new_tokens(fused, PROMPTS, speculate=2, **options)
    new_tokens(fused, PROMPTS, speculate="auto", **options)
    assert reason in fused.last_speculation.reason


def test_a_strategy_that_looks_back_is_refused(fused):
    model = fuse()
    model._strategy = dataclasses.replace(model.strategy, amount=Fading())
    with pytest.raises(BadSetting, match="Fading looks back"):
        new_tokens(model, "Q", speculate=2)


def test_auto_goes_without_where_the_strong_model_is_tiny_and_says_so(fused, monkeypatch):
    trace = fused.trace("Q: and now", max_new_tokens=4, do_sample=False)
    assert trace.speculation["on"] is False
    assert "too small for drafts to pay" in trace.speculation["reason"]
    monkeypatch.setattr(plan, "WORTH_BYTES", 0)
    monkeypatch.setattr(plan, "WORTH_RATIO", 0)
    drafted = fused.trace("Q: and now", max_new_tokens=4, do_sample=False)
    assert drafted.speculation["on"] is True
    assert [step.token_id for step in drafted.steps] == [step.token_id for step in trace.steps]


# ---- who drafts, and how much


def test_the_expert_with_most_weight_drafts(fused):
    strategy = make_strategy("dynamic", expert_names=("math", "facts"))
    for weights, name in (([0.1, 0.4], "facts"), ([0.4, 0.1], "math")):
        assert drafter_for("recent", ("math", "facts"), strategy, torch.tensor(weights)).name == name
    alone = fuse(strategy={"amount": "dynamic", "chooser": "only", "settings": {"expert": "facts"}})
    new_tokens(alone, MANY, speculate=2, speculate_draft="recent", max_new_tokens=30)
    assert alone.last_speculation.drafters.most_common(1)[0][0] == "facts"


def test_lookup_finds_what_followed():
    assert lookup([1, 2, 3, 4, 9, 1, 2, 3], 2) == [4, 9]
    assert lookup([5, 6, 7, 1, 5, 6, 8, 1, 5, 6], 9) == [8, 1, 5, 6]  # the last place counts
    assert lookup([1, 2, 3], 4) == []
    assert lookup([1], 4) == []


def test_repeated_text_is_looked_up(fused):
    model = fuse()
    report = check_with_drafts(model, "abcabcabcabcabcabcabc", 8, speculate_draft="prompt", max_new_tokens=60)
    assert report.drafted > 0
    assert report.calls["math"] == report.rounds  # nobody reads while the text drafts


def test_the_length_follows_acceptance_and_costs():
    def best(acceptance, per_draft, per_token=0.0):
        length = DraftLength()
        length.learn(round(acceptance * 1000), 1000)
        return length.next(per_draft, lambda tokens: 1.0 + per_token * tokens, 0.0)

    assert best(0.95, 0.01) > best(0.8, 0.01) > best(0.5, 0.01) > 0
    assert best(0.8, 0.01) > best(0.8, 0.1) > best(0.8, 0.4)
    assert best(0.8, 0.01) > best(0.8, 0.01, per_token=0.3)
    assert best(0.02, 0.9, per_token=0.5) == 0


def test_the_length_that_is_chosen_is_the_best_of_all():
    length = DraftLength()
    length.learn(800, 1000)
    s, drafting, verifying = length.acceptance, 0.05, lambda tokens: 1.0 + 0.02 * tokens

    def simulated(n, rounds=4000):
        generator = torch.Generator().manual_seed(n)
        stood = (torch.rand(rounds, n, generator=generator) < s).long().cumprod(-1).sum(-1)
        seconds = verifying(n + 1) * rounds + drafting * (n * rounds + int((stood == n).sum()))
        return float((stood + 1).sum()) / seconds

    rates = [simulated(n) for n in range(17)]
    assert rates[length.next(drafting, verifying, 0.0)] > 0.99 * max(rates)


def test_drafts_that_never_pay_are_tried_again_now_and_then():
    length = DraftLength()
    length.learn(0, 1000)
    found = [length.next(0.9, lambda tokens: float(tokens), 0.0) for _ in range(60)]
    assert found.count(1) == 2
    assert found.count(0) == 58


def test_idle_rounds_count_across_short_texts():
    """Answers shorter than the wait for another try, one after the other: drafts are tried again all the same."""
    history, found = AcceptanceHistory(acceptance=0.0), []
    for _ in range(20):
        length = DraftLength(history=history)
        found += [length.next(0.9, lambda tokens: float(tokens), 0.0) for _ in range(3)]
        history = length.history
    assert found.count(1) == 2
    assert found.count(0) == 58


def test_a_token_without_a_draft_is_measured_before_drafts_are_judged():
    """Where two tokens cost twice as much as one, and one was never read alone, drafts would never be left out."""
    costs = Costs({2: 2.0, 5: 2.0})
    assert costs.is_blind_at(1)
    assert not costs.is_blind_at(2)
    assert not Costs().is_blind_at(1)
    length = DraftLength(history=AcceptanceHistory(acceptance=0.3))
    assert length.next(0.05, costs.of, 0.0) > 0
    costs.add(1, 1.0)
    assert not costs.is_blind_at(1)
    assert length.next(0.05, costs.of, 0.0) == 0


def test_a_new_model_goes_once_without_a_draft_to_learn_its_cost(monkeypatch):
    monkeypatch.setattr(plan, "WORTH_BYTES", 0)
    monkeypatch.setattr(plan, "WORTH_RATIO", 0)
    monkeypatch.setattr("trimtab.logits.speculation.decode.DraftLength.next", lambda *told: 3)
    model = fuse(one_pass=False)
    for expected in ([1, 4, 4], [4, 4, 4]):
        assert sorted(strong_widths(model, "auto")[1:4]) == expected
    assert strong_widths(fuse(one_pass=False), 3)[1:4] == [4, 4, 4]


def strong_widths(model, speculate):
    """How many tokens the strong model reads in each of its forwards."""
    read = []
    hook = model.members.strong.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    new_tokens(model, PROMPTS[0], speculate=speculate, max_new_tokens=24, do_sample=False)
    hook.remove()
    return read


def test_what_drafts_became_of_is_known_by_rule_and_forgotten_with_the_strategy():
    model = fuse()
    for rule in ("math", "prompt"):
        new_tokens(model, MANY, speculate=3, speculate_draft=rule, max_new_tokens=24)
    histories = model._cost_model.histories
    assert set(histories) == {"math", "prompt"}
    assert histories["math"].acceptance != histories["prompt"].acceptance
    costs = model._cost_model.groups
    model.strategy = "static"
    assert model._cost_model.histories == {}
    assert model._cost_model.groups is costs


def test_auto_counts_all_that_is_read_while_a_draft_grows():
    """Experts of one forward are read together, whoever drafts; apart, one of them is enough."""
    joint, apart = fuse(one_pass=True), fuse(one_pass=False)
    told = [plan.small_strong(model.members, model.reader, model.strategy, "auto") for model in (joint, apart)]
    small = plan.step_bytes([apart.members.experts["math"]])
    assert f"a drafted one through {3 * small / 1e6:.0f} MB" in told[0]
    assert f"a drafted one through {small / 1e6:.0f} MB" in told[1]
    sizes = [plan._drafter_bytes(model.members, model.reader, model.strategy, "auto") for model in (joint, apart)]
    assert sizes == [3 * small, small]
    rules = {rule: plan._drafter_bytes(apart.members, apart.reader, apart.strategy, rule) for rule in DRAFTS}
    assert rules == {
        **dict.fromkeys(("auto", "recent", "base", "math", "facts"), small),
        "mixture": 2 * small, "fused": 3 * small, "prompt": 0,
    }  # fmt: skip


def test_costs_are_read_between_and_beyond_measurements():
    costs = Costs()
    assert costs.of(3) == 0.0
    costs.add(1, 1.0)
    assert costs.of(5) == 1.0
    costs.add(5, 2.0)
    assert costs.of(3) == pytest.approx(1.5)
    assert costs.of(9) == pytest.approx(3.0)
    for _ in range(20):
        costs.add(1, 0.5)
    assert costs.of(1) == pytest.approx(0.5, abs=0.01)
    costs.add(1, 100.0)
    assert costs.of(1) < 0.6


# ---- the first round


def test_the_first_round_drafts_behind_the_prompt():
    """A draft that stands behind the prompt saves the strong model readings: it reads prompt and draft at once."""
    model = fuse(one_pass=False)
    read = []
    hook = model.members.strong.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    inputs, _ = new_tokens(model, PROMPTS[0], speculate=3, speculate_draft="math", max_new_tokens=12)
    hook.remove()
    assert read[0] == inputs["input_ids"].shape[1] + 3
    assert model.last_speculation.rounds == len(read)


def test_a_law_that_breaks_in_the_first_draft_has_the_prompt_read_again():
    """NaN behind a drafted token reaches the prompt's keys and values, which were read with it."""
    model = fuse(one_pass=False)
    inputs, plain = new_tokens(model, MANY, speculate=0)
    used = {*inputs["input_ids"].flatten().tolist(), *plain.flatten().tolist(), 0, 1}
    expert = model.members.experts["math"].model
    own = expert.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    token = next(token for token in own[:, :-1].flatten().tolist() if token not in used)
    read = []
    hook = model.members.strong.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with breaking_after(token, "strong", model):
        _, drafted = new_tokens(model, MANY, speculate=3, speculate_draft="math")
    hook.remove()
    assert read[:2] == [inputs["input_ids"].shape[1] + 3, inputs["input_ids"].shape[1]]
    check_same_tokens(model, drafted, plain, inputs)


@pytest.mark.parametrize("window", [8, 64])
def test_a_prompt_beyond_a_window_is_read_without_a_draft(window):
    """What could be taken back would have to be kept whole, in every sliding layer."""
    config = tiny.config_of("mistral", width=48)
    config.sliding_window = window
    with torch.random.fork_rng():
        torch.manual_seed(0)
        strong = AutoModelForCausalLM.from_config(config).eval()
    base = tiny.make(seed=1)
    experts = {"math": tiny.tuned(base, 10)}
    model = FusedCausalLM.from_members(strong, base, experts, tokenizer=tiny.make_tokenizer())
    read = []
    hook = strong.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    inputs, drafted = new_tokens(model, PROMPTS[0], speculate=3, max_new_tokens=12)
    hook.remove()
    prompt = inputs["input_ids"].shape[1]
    assert 8 < prompt < 64
    assert read[0] == (prompt if window == 8 else prompt + 3)
    check_same_tokens(model, drafted, new_tokens(model, PROMPTS[0], speculate=0, max_new_tokens=12)[1], inputs)


@pytest.mark.filterwarnings("ignore:expert .idle. adds nothing")
def test_who_the_small_members_would_let_speak_drafts_first():
    """Before the strong model has read the prompt nobody knows what it says: the base stands in for it."""
    base = tiny.make(seed=1)
    same, other = copy.deepcopy(base), tiny.tuned(base, 3)
    model = FusedCausalLM.from_members(
        tiny.make(seed=0, width=48),
        base,
        {"idle": same, "busy": other},
        tokenizer=tiny.make_tokenizer(),
        strategy={"amount": "static", "chooser": "confident"},
    )
    new_tokens(model, PROMPTS[0], speculate=3, speculate_draft="recent", max_new_tokens=3)
    assert set(model.last_speculation.drafters) == {"busy"}
