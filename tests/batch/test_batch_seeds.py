"""Seeds of the transformers engine where it drafts: what forwards seem to cost decides nothing."""

import random

from asking import complete
from trimtab.batch.rows import Row, answered
from trimtab.batch.transformers_engine import TransformersEngine
from trimtab.batch.worker import Answering
from trimtab.logits.speculation.length import Costs


def test_a_seeded_row_has_the_same_text_again_while_drafting(fused_dir, monkeypatch):
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_BYTES", 0)
    monkeypatch.setattr("trimtab.logits.speculation.plan.WORTH_RATIO", 0)
    numbers = random.Random()  # seeded by the system: what a forward seems to cost is another at each measurement
    monkeypatch.setattr(Costs, "of", lambda self, tokens: numbers.random())
    engine = TransformersEngine(fused_dir)
    row = complete("s", "Where is Ada?", temperature=1.0, max_tokens=40, seed=5, n=3)
    answers, drafted = [], []
    for _ in range(3):
        (outcome,) = answered(Answering(engine, ["fused"]), [Row(row["custom_id"], row)])
        assert outcome.error is None
        answers.append(outcome.value["choices"])
        drafted.append(engine._fused.last_speculation.drafted)
    assert answers[0] == answers[1] == answers[2]
    assert drafted[0] == drafted[1] == drafted[2] > 0
