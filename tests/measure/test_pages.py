"""Pages opened in a real headless Chromium, and the texts that try to break them."""

import json
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from trimtab.measure import pages, plots
from trimtab.measure.explain_page import explain_page, speaker_of

EVIL = "Q: </script><script>document.title='gone'</script> & <b>\"bold\"</b> {{style}} \u2028 ?\nA:"
MEMBERS = ("strong", "base", "facts", "sums", "fused")


def make_step(place: int, token: str, alpha: dict[str, float] | None, chosen: list[str]) -> dict:
    top5 = {name: [[token if rank == 0 else f"t{rank}", 0.5 / (rank + 1)] for rank in range(5)] for name in MEMBERS}
    entropies = {name: 0.25 * (index + 1) + 0.01 * place for index, name in enumerate(MEMBERS)}
    return {
        "token_id": 40 + place,
        "token": token,
        "alpha": alpha,
        "chosen": chosen,
        "kl_nats": 0.125 * place,
        "reverse_kl_nats": float("inf") if place == 3 else 0.0625 * place,
        "entropy_nats": entropies,
        "top5": top5,
    }


def make_trace(has_alpha: bool = True, prompt: str = EVIL) -> dict:
    tokens = [" Ada", " lives", "</span>", "\n", "'\"<>&", ""]
    speakers = ["facts", "sums", None, "facts", "sums", "facts"]
    steps = []
    for place, (token, who) in enumerate(zip(tokens, speakers, strict=True)):
        alpha = {name: (0.5 + 0.25 * place if name == who else 0.0) for name in ("facts", "sums")}
        steps.append(make_step(place, token, alpha if has_alpha else None, [who] if who else []))
    return {
        "prompt": prompt,
        "text": "".join(tokens),
        "strategy": {"amount": "dynamic", "chooser": "joint_objective", "settings": {"alpha_max": 2.0}},
        "expert_names": ["facts", "sums"],
        "steps": steps,
    }


@pytest.fixture
def opened(browser, tmp_path: Path):
    """(trace) -> the page in a browser, which fails on any script error or request that leaves the file."""
    troubles: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith("file:") else troubles.append(request.url))

    def open_trace(trace: dict):
        file = tmp_path / "explain.html"
        file.write_text(explain_page(trace), encoding="utf-8")
        page.goto(file.as_uri())
        return page

    yield open_trace
    page.close()
    assert troubles == []


def test_hovering_a_token_shows_its_values(opened) -> None:
    trace = make_trace()
    page = opened(trace)
    tokens = page.locator(".token")
    assert tokens.count() == len(trace["steps"])
    tokens.nth(1).hover()
    panel = page.locator("#inspector")
    assert panel.get_attribute("data-step") == "1"
    assert float(panel.get_attribute("data-kl-nats")) == trace["steps"][1]["kl_nats"]
    assert float(panel.get_attribute("data-reverse-kl-nats")) == trace["steps"][1]["reverse_kl_nats"]
    assert float(panel.locator("[data-expert=sums]").get_attribute("data-alpha")) == 0.75
    assert float(panel.locator("[data-expert=facts]").get_attribute("data-alpha")) == 0.0
    members = panel.locator("[data-member]")
    assert [members.nth(i).get_attribute("data-member") for i in range(members.count())] == list(MEMBERS)
    assert all(members.nth(i).locator(".guess").count() == 5 for i in range(members.count()))
    assert "1.260" in panel.inner_text()  # entropy of fused at step 1


def test_every_value_can_be_read_from_the_tokens_themselves(opened) -> None:
    trace = make_trace()
    page = opened(trace)
    for index, step in enumerate(trace["steps"]):
        token = page.locator(f".token[data-step='{index}']")
        assert int(token.get_attribute("data-token-id")) == step["token_id"]
        assert token.get_attribute("data-expert") == (speaker_of(step) or "")
        assert json.loads(token.get_attribute("data-alphas")) == step["alpha"]
        assert float(token.get_attribute("data-kl-nats")) == pytest.approx(step["kl_nats"])
        assert float(token.get_attribute("data-reverse-kl-nats")) == pytest.approx(step["reverse_kl_nats"])
        assert json.loads(token.get_attribute("data-entropy-nats")) == pytest.approx(step["entropy_nats"])
    whole = json.loads(page.locator("#trace").inner_text())
    assert whole["prompt"] == trace["prompt"]
    assert whole["steps"][3]["reverse_kl_nats"] is None  # JSON has no word for infinity
    assert whole["steps"][0]["top5"] == trace["steps"][0]["top5"]


def test_texts_that_look_like_code_are_shown_as_texts(opened) -> None:
    page = opened(make_trace())
    assert page.title().startswith("trimtab explain")
    assert page.locator(".prompt").inner_text().startswith("Q: </script><script>document.title='gone'</script>")
    assert page.locator(".token").nth(2).inner_text() == "</span>"
    assert page.locator(".token").nth(4).inner_text() == "'\"<>&"


def test_the_keyboard_does_what_the_mouse_does(opened) -> None:
    page = opened(make_trace())
    page.locator(".token").nth(0).focus()
    panel = page.locator("#inspector")
    assert panel.get_attribute("data-step") == "0"
    page.keyboard.press("ArrowRight")
    assert panel.get_attribute("data-step") == "1"
    page.keyboard.press("Enter")
    page.locator(".token").nth(4).hover()
    assert panel.get_attribute("data-step") == "1"  # held
    page.keyboard.press("Escape")
    page.locator(".token").nth(3).hover()
    assert panel.get_attribute("data-step") == "3"
    assert "∞" in panel.inner_text()


def test_colours_follow_the_toggle(opened) -> None:
    page = opened(make_trace())
    first = page.locator(".token").nth(0)
    seen = set()
    for mode in ("expert", "alpha", "kl"):
        page.locator(f"[data-set-mode={mode}]").click()
        assert page.locator("#explain").get_attribute("data-mode") == mode
        assert page.locator(f"[data-set-mode={mode}]").get_attribute("aria-pressed") == "true"
        page.wait_for_timeout(250)  # the colour fades over 150 ms
        seen.add(page.locator(".token").nth(3).evaluate("e => getComputedStyle(e).backgroundColor"))
    assert len(seen) == 3
    page.locator("[data-set-mode=expert]").click()
    page.wait_for_timeout(250)
    colour = "e => getComputedStyle(e).backgroundColor"
    assert first.evaluate(colour) == page.locator(".token").nth(5).evaluate(colour)  # both facts
    assert first.evaluate(colour) != page.locator(".token").nth(1).evaluate(colour)


def test_a_strategy_without_alpha_is_coloured_by_expert_and_distance(opened) -> None:
    page = opened(make_trace(has_alpha=False))
    assert page.locator("[data-set-mode=alpha]").is_disabled()
    page.locator(".token").nth(1).hover()
    assert "has no alpha" in page.locator("#inspector").inner_text()
    assert page.locator(".token").nth(1).get_attribute("data-expert") == "sums"


def test_an_empty_answer_still_makes_a_page(opened) -> None:
    page = opened({**make_trace(), "steps": [], "text": ""})
    assert page.locator(".token").count() == 0


def test_a_page_is_alone_in_the_world() -> None:
    page = explain_page(make_trace(prompt="Q: plain\nA:"))
    assert "http://" not in page
    assert "https://" not in page
    assert "{{" not in page
    assert "{%" not in page


def test_texts_that_look_like_templates_are_shown_as_texts() -> None:
    page = explain_page(make_trace(prompt="{{ title }}{% raw %}\nA:"))
    assert "{{ title }}{% raw %}\nA:" in page


def test_a_name_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'heading' is undefined"):
        pages.render("base.html", title="x", motto="y")


@pytest.mark.parametrize("has_alpha", [True, False])
def test_the_alpha_plot_is_a_picture(tmp_path: Path, has_alpha: bool) -> None:
    trace = make_trace(has_alpha)
    trace["steps"][0]["token"] = "漢$x"  # a glyph that the font lacks and a sign that starts a formula
    plots.alpha_plot(trace, tmp_path / "alpha.png")
    assert (tmp_path / "alpha.png").read_bytes()[:4] == b"\x89PNG"
