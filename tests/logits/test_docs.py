"""The page about strategies is generated: it says what the code says."""

from trimtab.logits import docs
from trimtab.logits.registry import AMOUNTS, CHOOSERS
from trimtab.logits.strategy.fusion import describe_settings


def test_every_name_and_setting_is_there():
    page = docs.render()
    for name in (*AMOUNTS, *CHOOSERS):
        assert f"### `{name}`" in page
        for setting in describe_settings(name):
            assert setting.doc in page
