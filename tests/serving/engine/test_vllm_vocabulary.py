"""Members with other tokens are served by the rule of the transformers engine: what is cut, mapped and read alike."""

import warnings

import pytest
from engines import check_same, engine, expected, served

from other_tokens import MAP, R0, R1, SOFT, make_models, save_members, save_resized_adapter
from trimtab import FusedCausalLM
from trimtab.core.errors import TrimtabWarning
from trimtab.serving.vllm.speculative_config import speculative_config

PROMPTS = [[9, R0, 20, SOFT, R1, 31], [SOFT], [12, R0, 40, 41, 42], [7, 8, 9, 10]]
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    folder = save_members(tmp_path_factory.mktemp("tokens"), make_models())
    save_resized_adapter(folder)
    experts = {name: folder / name for name in ("swapped", "padded", "chatml")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrimtabWarning)
        made = FusedCausalLM.from_members(folder / "strong", folder / "base", experts, "dynamic", token_map=MAP)
    made.save_pretrained(folder / "fused")
    return folder / "fused", made


def test_members_with_other_tokens_and_one_of_them_drafting(fused):
    directory, model = fused
    wanted = expected(model, PROMPTS)
    drafting = speculative_config(directory, "swapped", tokens=3)
    with engine(directory, speculative_config=drafting) as llm:
        check_same(model, PROMPTS, served(llm, PROMPTS, logprobs=None), wanted, most=1)
