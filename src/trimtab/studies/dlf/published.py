"""The figures of Fan et al. 2024 (arXiv 2406.15480) that stand beside ours.

Their large model is Llama-2-13B; the close pair is Llama-2-7B, the far one TinyLlama-1.1B. Averages in points of 100:
single task over GSM8K, TruthfulQA, TriviaQA, CNN/DM and MMLU; several tasks as the mean of the first four and MMLU,
which no expert was tuned on. Ratios and recovered gaps follow from the averages.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperPair:
    """One pair: averages of the small model alone, proxy-tuning, the paper's rule, and the tuned strong model.

    expert   one expert per task, or the small model tuned on all tasks; None where the paper prints none
    """

    expert: float | None
    static_1: float | None
    dynamic: float
    ceiling: float

    @property
    def ratio(self) -> float:
        return self.dynamic / self.ceiling

    @property
    def gap_recovered(self) -> float | None:
        """(dynamic - expert) / (ceiling - expert), from the averages: the paper prints none."""
        if self.expert is None:
            return None
        return (self.dynamic - self.expert) / (self.ceiling - self.expert)


SINGLE = {
    "far": PaperPair(expert=25.33, static_1=31.74, dynamic=34.86, ceiling=47.79),
    "close": PaperPair(expert=44.13, static_1=44.43, dynamic=46.09, ceiling=47.79),
}
MULTI = {
    "far": PaperPair(expert=None, static_1=None, dynamic=32.59, ceiling=45.68),
    "close": PaperPair(expert=34.89, static_1=None, dynamic=39.42, ceiling=45.68),
}
PRINTED_RATIOS = {"single": {"close": 0.964, "far": 0.729}, "multi": {"close": 0.863, "far": 0.713}}
