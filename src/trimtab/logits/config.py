"""What a fused directory says about itself: references to the members, the strategy, the prompts. No weights."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class FusedConfig(PreTrainedConfig):  # type: ignore[misc]
    """`config.json` of a fused model.

    strong, base            references: {"where": path, hub id or zoo: name; "revision"; "digest"}
    experts                 [{"name", and a reference}]: their order is that of the expert axis
    strategy                {"amount", "chooser", "settings"}
    prompts                 {member: prompt form}, for members that read a prompt of their own
    speculate               "auto", 0 or the number of tokens that a draft has; speculate_draft: who drafts
    one_pass                "auto", True or False: whether small members are read in one forward
    vocab_size              columns of the fused logits: the strong model's tokens, without padding rows
    vocabulary              which ids are cut or have delta 0, and members' own ids, see `models.token_ids`; None: all
                            members have the same
    token_map               {member: {its token: the strong model's}}, special tokens that were renamed
    special_tokens          "strong": ids of special tokens mean what they mean in the strong model
    max_position_embeddings  tokens that the member of the shortest context can read; None: no limit
    """

    model_type = "trimtab"

    def __init__(
        self,
        strong: dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
        experts: list[dict[str, Any]] | None = None,
        strategy: dict[str, Any] | None = None,
        prompts: dict[str, Any] | None = None,
        speculate: str | int = "auto",
        speculate_draft: str = "auto",
        one_pass: bool | str = "auto",
        vocab_size: int = 0,
        vocabulary: dict[str, Any] | None = None,
        token_map: dict[str, dict[str, str]] | None = None,
        special_tokens: str | None = None,
        max_position_embeddings: int | None = None,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.strong, self.base, self.experts = strong, base, experts
        self.strategy, self.prompts = strategy, prompts
        self.speculate, self.speculate_draft = speculate, speculate_draft
        self.one_pass = one_pass
        self.vocabulary, self.token_map, self.special_tokens = vocabulary, token_map, special_tokens
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.use_cache = use_cache
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        super().__init__(**kwargs)


# Here, since tokenizers too are read from fused directories, and without a model.
AutoConfig.register(FusedConfig.model_type, FusedConfig, exist_ok=True)
