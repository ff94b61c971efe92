"""Members in 16 bits, whose heads are of a size that vLLM's kernels lack."""

import torch
from engines import engine, served

from trimtab import FusedCausalLM
from trimtab.zoo import load_items

COUNT = 20


def test_members_of_16_bits_say_what_those_of_32_say(tmp_path):
    fused = FusedCausalLM.from_members("zoo:strong", "zoo:small", {"facts": "zoo:small/facts"})
    assert fused.members.base.model.config.head_dim == 24  # of which a half is no multiple of 8
    fused.save_pretrained(tmp_path / "fused")
    prompts = [fused.tokenizer(item.prompt)["input_ids"] for item in load_items("facts")[:COUNT]]
    with engine(tmp_path / "fused", dtype="bfloat16") as llm:
        outputs = served(llm, prompts, max_tokens=4)
    agree = 0
    for ids, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            law = fused(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
        said = output.outputs[0]
        token = said.token_ids[0]
        agree += token == int(law.argmax())
        assert abs(said.logprobs[0][token].logprob - float(law[token])) < 0.5
    assert agree >= COUNT - 1
