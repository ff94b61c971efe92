"""The zoo's tokenizer: byte-level BPE over the corpus, digits one by one, saved as a normal fast tokenizer.

There is no begin token: rows of the pretraining data start where a document starts, so a bare prompt is what models
know.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1536
PAD, EOS = "<pad>", "<eos>"
CONTEXT = 256  # tokens

# A user's turn becomes a question of the tasks' frame, so that chatting and the tasks share one style.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Q: ' + message['content'] + '\\nA:' }}"
    "{% else %}{{ ' ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A fast tokenizer of at most `vocabulary` tokens, pad = 0 and eos = 1, with the zoo's chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=EOS, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
