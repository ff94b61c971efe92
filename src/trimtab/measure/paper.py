"""The figures of Fan et al. 2024 (arXiv 2406.15480) that stand beside ours.

Their large model is Llama-2-13B; the close pair is Llama-2-7B, the far one TinyLlama-1.1B. Averages in points of 100:
single task over GSM8K, TruthfulQA, TriviaQA, CNN/DM and MMLU; several tasks as the mean of the first four and MMLU,
which no expert was tuned on. Ratios and recovered gaps follow from the averages.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperPair:
    """One pair: averages of the small expert alone, proxy-tuning, the paper's rule, and the tuned strong model."""

    expert: float
    static_1: float | None
    dynamic: float
    ceiling: float

    @property
    def ratio(self) -> float:
        return self.dynamic / self.ceiling

    @property
    def gap_recovered(self) -> float:
        return (self.dynamic - self.expert) / (self.ceiling - self.expert)


SINGLE = {
    "far": PaperPair(expert=25.33, static_1=31.74, dynamic=34.86, ceiling=47.79),
    "close": PaperPair(expert=44.13, static_1=44.43, dynamic=46.09, ceiling=47.79),
}
PRINTED_RATIOS = {"single": {"close": 0.964, "far": 0.729}, "multi": {"close": 0.863, "far": 0.713}}
PRINTED_PGR = {"single": {"close": 0.54, "far": 0.42}}
MULTI_EXPERT = {"close": 34.89}  # the small model tuned on all tasks; none is printed for the far pair here
MULTI_DYNAMIC = {"close": 39.42, "far": 32.59}
MULTI_CEILING = 45.68
