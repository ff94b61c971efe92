"""The page about strategies is generated: it says what the code says."""

from trimtab.logits import docs
from trimtab.logits.registry import AMOUNTS, CHOOSERS
from trimtab.logits.strategy.fusion import describe_settings


def test_the_page_is_not_stale(request):
    written = (request.config.rootpath / "docs" / "strategies.md").read_text(encoding="utf-8")
    assert written == docs.render(), "run: python -m trimtab.logits.docs > docs/strategies.md"


def test_every_name_and_setting_is_there():
    page = docs.render()
    for name in (*AMOUNTS, *CHOOSERS):
        assert f"### `{name}`" in page
        for setting in describe_settings(name):
            assert setting.doc in page
