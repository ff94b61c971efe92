"""What `/metrics` says beside vLLM's own counters: alpha and KL(fused || strong) per expert, accepted drafts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric

from trimtab.serving.histograms import ALPHA_EDGES, KL_EDGES

EDGES = {"alpha": ALPHA_EDGES, "kl_nats": KL_EDGES}
TEXTS = {
    "alpha": "alpha of the steps at which an expert was chosen",
    "kl_nats": "KL(fused || strong) in nats, of the steps at which an expert was chosen",
}
LABELS = ("model_name", "engine", "expert")
DRAFTED, ACCEPTED = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"


def render(registry: CollectorRegistry, counted: Sequence[Mapping[str, Any]], model_name: str) -> bytes:
    """vLLM's metrics and ours, in the text format of Prometheus.

    registry    vLLM's
    counted     `Histograms.to_dict` of each engine
    """
    ours = CollectorRegistry()
    ours.register(_Once([*_of_steps(counted, model_name), *_of_drafts(registry, model_name)]))
    return bytes(generate_latest(registry) + generate_latest(ours))


class _Once:
    """A collector of metrics that are there already."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self.metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        return iter(self.metrics)


def _of_steps(counted: Sequence[Mapping[str, Any]], model_name: str) -> Iterator[Metric]:
    for name, edges in EDGES.items():
        histogram = HistogramMetricFamily(f"trimtab:{name}", TEXTS[name], labels=LABELS)
        mean = GaugeMetricFamily(f"trimtab:{name}_mean", f"mean {TEXTS[name]}, since the start", labels=LABELS)
        for engine, histograms in enumerate(counted):
            for who, counts in histograms.get(name, {}).items():
                labels = (model_name, str(engine), who)
                total, buckets = 0, []
                for edge, count in zip((*map(str, edges), "+Inf"), counts["buckets"], strict=True):
                    total += count
                    buckets.append((edge, total))
                histogram.add_metric(labels, buckets, sum_value=counts["sum"])
                if total:
                    mean.add_metric(labels, counts["sum"] / total)
        yield histogram
        yield mean


def _of_drafts(registry: CollectorRegistry, model_name: str) -> Iterator[Metric]:
    counts = {DRAFTED: 0.0, ACCEPTED: 0.0}
    for metric in registry.collect():
        if metric.name in counts:
            counts[metric.name] += sum(s.value for s in metric.samples if s.name == f"{metric.name}_total")
    rate = GaugeMetricFamily(
        "trimtab:draft_acceptance_rate",
        "share of drafted tokens that were accepted, since the start",
        labels=("model_name",),
    )
    if counts[DRAFTED]:
        rate.add_metric((model_name,), counts[ACCEPTED] / counts[DRAFTED])
    yield rate
