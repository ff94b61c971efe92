"""Steps of a model as the bench of servers measures them, in an engine of their own."""

import pytest
from bench.served import share_cores

from bench import served_steps
from trimtab import FusedCausalLM
from trimtab.core.errors import TrimtabError
from trimtab.serving.vllm.speculative_config import drafter_directory
from trimtab.zoo import resolve


@pytest.mark.thorough
def test_every_number_of_rows_has_its_records_and_a_model_that_is_not_there_an_error(tmp_path):
    FusedCausalLM.from_members("zoo:strong", "zoo:small", {"facts": "zoo:small/facts"}).save_pretrained(tmp_path)
    model = drafter_directory(tmp_path, "facts")
    found = served_steps.measured(model, resolve("tokenizer"), (1, 8), repeats=2, cores=share_cores())
    assert {rows: len(records) for rows, records in found.items()} == {1: 2, 8: 2}
    for rows, records in found.items():
        for record in records:
            assert record["engine_itl_ms"] > 0
            assert record["tokens_per_second"] == pytest.approx(1e3 * rows / record["engine_itl_ms"])
    with pytest.raises(TrimtabError, match="could not be measured"):
        served_steps.measured(tmp_path / "nothing", resolve("tokenizer"), (1,), repeats=1, cores=share_cores())
