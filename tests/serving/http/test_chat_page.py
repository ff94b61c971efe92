"""The chat page in a real headless Chromium: streams, colours by alpha, steers, and loads nothing from elsewhere."""

import re

import pytest
from servers import KEY

from browsing import open_browser

QUESTION = "Which pet does Jakob Brulman keep?"
EVIL = "<img src=x onerror=\"document.title='gone'\"></p><script>document.title='gone'</script>"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture
def page(browser, server):
    """The page with the key typed in; fails on any script error or request to another place."""
    troubles: list[str] = []
    page = browser.new_page(viewport={"width": 1180, "height": 760})
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(server.root) else troubles.append(asked.url))
    page.goto(f"{server.root}/")
    page.locator("#key").fill(KEY)
    page.locator("#key").press("Tab")
    page.wait_for_selector("input[name=expert][value=facts]")
    yield page
    page.close()
    assert [trouble for trouble in troubles if not trouble.startswith("data:")] == []


def ask(page, text: str = QUESTION):
    """Types a question; returns the answer's element, once it is complete."""
    done = page.locator(".turn.assistant[data-done]").count()
    page.locator("#question").fill(text)
    page.locator("#question").press("Enter")
    page.wait_for_function(
        "count => document.querySelectorAll('.turn.assistant[data-done]').length > count", arg=done, timeout=90_000
    )
    return page.locator(".turn.assistant").last


def wanted(server, **xargs):
    """The same answer without the page, with its trace."""
    body = {"model": "zoo", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 128}
    answer = server.ask("/v1/chat/completions", body | {"vllm_xargs": {"trace": 1, **xargs}})
    return answer["choices"][0]["message"]["content"], server.ask(f"/v1/traces/{answer['id']}")["choices"][0]["tokens"]


def test_an_answer_streams_and_its_tokens_are_coloured_by_alpha(page, server) -> None:
    answer = ask(page)
    text, steps = wanted(server)
    assert answer.locator(".text").text_content() == text
    spans = answer.locator(".token")
    assert spans.count() >= 1
    for place in range(spans.count()):
        span, step = spans.nth(place), steps[place]
        who = max(step["chosen"], key=lambda name: step["alpha"][name])
        assert span.get_attribute("data-expert") == who
        assert float(span.get_attribute("data-alpha")) == pytest.approx(step["alpha"][who], abs=1e-2)
        loud = float(span.evaluate("node => getComputedStyle(node).getPropertyValue('--loud')"))
        assert loud == pytest.approx(min(1, step["alpha"][who] / 2), abs=1e-2)
    colour = spans.first.evaluate("node => getComputedStyle(node).backgroundColor")
    assert colour != page.locator("body").evaluate("node => getComputedStyle(node).backgroundColor")
    assert "tokens in" in answer.locator(".note").text_content()


def test_pointing_at_a_token_and_the_arrow_keys_show_its_alphas(page, server) -> None:
    answer = ask(page)
    _, steps = wanted(server)
    answer.locator(".token").first.hover()
    shown = page.locator("#inspector").text_content()
    alphas = [float(number) for number in re.findall(r"α ([\d.]+)", shown)]
    assert alphas == pytest.approx([steps[0]["alpha"][name] for name in ("math", "facts")], abs=1e-2)
    assert "nats" in shown
    page.locator("h1").hover()
    answer.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".token.is-current").count() == 1


def test_slider_and_expert_change_the_answer(page, server) -> None:
    page.locator("#alpha").fill("0")
    assert page.locator("#alpha-shown").text_content() == "0.00"
    strong = ask(page)
    assert strong.locator(".text").text_content() == wanted(server, alpha=0)[0]
    assert float(strong.locator(".token").first.get_attribute("data-alpha")) == 0
    page.locator("#fresh").click()
    page.locator("#alpha").fill("1.5")
    page.locator("input[name=expert][value=math]").check()
    steered = ask(page)
    assert steered.locator(".text").text_content() == wanted(server, alpha=1.5, expert="math")[0]
    assert steered.locator(".token").first.get_attribute("data-expert") == "math"


def test_texts_are_texts_and_troubles_are_told(page, server) -> None:
    ask(page, EVIL)
    assert page.locator(".turn.user .text").last.text_content() == EVIL
    page.locator("#fresh").click()
    page.locator("#longest").fill("4000")
    answer = ask(page)
    assert re.search("max_tokens|context", answer.locator(".note.bad").text_content())
    assert page.title() == "trimtab chat"


def posted(page) -> list[list[dict[str, str]]]:
    """The messages of every chat request from now on, as they are sent."""
    found: list[list[dict[str, str]]] = []

    def note(asked) -> None:
        if asked.url.endswith("/chat/completions"):
            found.append(asked.post_data_json["messages"])

    page.on("request", note)
    return found


def test_a_new_chat_leaves_an_answer_that_still_streams_behind(page, server) -> None:
    sent = posted(page)
    page.evaluate(NEVER_ENDING)
    page.locator("#question").fill("Who lives in the north?")
    page.locator("#question").press("Enter")
    page.wait_for_selector(".turn.assistant .token")
    assert page.locator("#send").text_content() == "Stop"
    page.locator("#fresh").click()
    assert page.locator("#send").text_content() == "Send"
    assert page.locator(".turn").count() == 0
    answer = ask(page)
    assert answer.locator(".text").text_content() == wanted(server)[0]
    assert sent[1] == [{"role": "user", "content": QUESTION}]
    ask(page, "And now?")
    assert [message["role"] for message in sent[2]] == ["user", "assistant", "user"]


def test_a_question_that_was_refused_is_not_asked_again(page, server) -> None:
    sent = posted(page)
    page.locator("#longest").fill("4000")
    assert ask(page, "Too long?").locator(".note.bad").count() == 1
    page.locator("#longest").fill("8")
    ask(page)
    assert sent[1] == [{"role": "user", "content": QUESTION}]


# The next answer to a chat arrives as it comes, and then the connection stays open until the page gives it up.
NEVER_ENDING = """() => {
  const real = window.fetch;
  window.fetch = async (url, options) => {
    const response = await real(url, options);
    if (!url.includes("chat/completions")) return response;
    window.fetch = real;
    const reader = response.body.getReader();
    return new Response(new ReadableStream({
      start(controller) {
        options.signal.addEventListener("abort", () => controller.error(new DOMException("left", "AbortError")));
      },
      async pull(controller) {
        const { done, value } = await reader.read();
        if (done) return new Promise(() => {});
        // The word that says that all has come is kept back too.
        controller.enqueue(new TextEncoder().encode(new TextDecoder().decode(value).replace("data: [DONE]", "")));
      },
    }));
  };
}"""


def test_without_a_key_the_page_asks_for_it(browser, server) -> None:
    page = browser.new_page()
    page.goto(f"{server.root}/")
    page.wait_for_function("document.getElementById('model').textContent.includes('key')")
    assert page.locator("#key").is_visible()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(browser, server, scheme: str) -> None:
    """Contrast of at least 4.5 to 1, WCAG 2.2, 1.4.3."""
    page = browser.new_page(color_scheme=scheme)
    page.goto(f"{server.root}/")
    for selector in ("h1", ".empty", ".ends span", "#send", "summary"):
        ratio = page.locator(selector).first.evaluate(CONTRAST)
        assert ratio >= 4.5, (selector, ratio)
    page.close()


CONTRAST = """node => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let ground = node;
  const behind = () => parse(getComputedStyle(ground).backgroundColor);
  while (behind()[3] === 0 && ground.parentElement) ground = ground.parentElement;
  const pair = [light(parse(getComputedStyle(node).color)), light(behind())].sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05);
}"""
