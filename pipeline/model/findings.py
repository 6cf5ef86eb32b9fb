"""From figures to sentences: what an evaluation says, also where a claim fails."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.model.statistics import Key, PairedDifference, figures_of, paired_difference, runs_of
from pipeline.plots import signed
from schemas.evaluation import Family, Summary, SystemScore

FULL_WIDTH = "final-full"
TUNED, FROZEN = "marc-tuned", "marc-final"
CHANGES = {
    "marc-no-constraints": "leaving out the information constraints",
    "marc-keep": "adding the constraint that z keeps what h holds",
    "marc-crossing": "adding a difference in structure",
    "marc-pca-start": "starting from a PCA instead of the regression",
    "marc-final": "reading the final layer instead of the chosen one",
}
"""What each ablation does to the comparison system."""


def findings(summaries: Sequence[Summary], scores: Sequence[SystemScore], *, layers: int, comparison: str) -> list[str]:
    """One sentence per claim: what came out, with its figures, also where the claim fails.

    Every verdict is that of the 95 % interval over seeds: shown where it excludes 0.

    Args:
        summaries: of all systems, from ``summarise``.
        scores: that they were made from.
        layers: blocks of the backbone; the PCA of this layer is that of the final one.
        comparison: the system that the claims are about.
    """
    results = _Results(summaries, runs_of(scores), layers, comparison)
    topics = (_mid_layer_advantage, _rivals, _ablations, _cold_items, _tuned)
    sentences = [sentence for topic in topics for dim in results.dims for sentence in topic(results, dim)]
    if results.get(comparison) is None:
        sentences.append(f"{comparison} was not evaluated: nothing is claimed about it.")
    return [*sentences, *_storage(results)]


@dataclass(frozen=True)
class _Results:
    """All that sentences are made from."""

    summaries: Sequence[Summary]
    runs: Mapping[Key, Mapping[int, SystemScore]]
    layers: int
    comparison: str

    @property
    def dims(self) -> list[int]:
        """Dimensions that systems are compared at: those of layers and of the comparison system."""
        return sorted({s.dim for s in self.summaries if s.family == "layer" or s.system == self.comparison})

    def at(self, dim: int, *families: Family) -> list[Summary]:
        return [s for s in self.summaries if s.dim == dim and s.family in families]

    def get(self, system: str, dim: int | None = None) -> Summary | None:
        """A system at a dimension, by default its largest."""
        found = [s for s in self.summaries if s.system == system and dim in (None, s.dim)]
        return max(found, key=lambda s: s.dim, default=None)

    def best(self, layers: Sequence[Summary]) -> Summary | None:
        """By the mean on the test part: nobody could choose so well beforehand, which makes it the hardest rival."""
        return max(layers, key=lambda s: s.auc, default=None)

    def best_middle(self, dim: int) -> Summary | None:
        return self.best([s for s in self.at(dim, "layer") if s.layer is not None and 0 < s.layer < self.layers])

    def difference(self, one: Summary, other: Summary, name: str = "auc") -> PairedDifference | None:
        first, second = (figures_of(self.runs[s.system, s.dim], name) for s in (one, other))
        return paired_difference(first, second)


def _mid_layer_advantage(results: _Results, dim: int) -> Iterator[str]:
    middle = results.best_middle(dim)
    final = next((s for s in results.at(dim, "layer") if s.layer == results.layers), None)
    if middle is None or final is None:
        return
    difference = results.difference(middle, final)
    verdict = _verdict(difference, "is there", "is not there, on the contrary", "is not shown")
    yield (
        f"The mid-layer advantage at d = {dim} {verdict}: test AUC {middle.auc:.4f} for the PCA of layer "
        f"{middle.layer}, the best middle one, and {final.auc:.4f} for the final layer's, {_words(difference)}"
        f"{_in_deviations(middle, final)}."
    )


def _rivals(results: _Results, dim: int) -> Iterator[str]:
    own = results.get(results.comparison, dim)
    layers = results.at(dim, "layer")
    best = results.best(layers)
    if own is None:
        return
    for rival in [*([best] if best else []), *results.at(dim, "baseline", "bundle")]:
        difference = results.difference(own, rival)
        verdict = _verdict(difference, "beats", "loses to", "does not demonstrably beat")
        # Not "the best layer" alone: that it was chosen by the test makes the claim about it the stronger.
        apposition = f", the best of {len(layers)} layers by test AUC" if rival is best else ""
        users = _users(rival, difference, sign=-1)
        yield f"At d = {dim} {own.system} {verdict} {rival.system}{apposition}: {_words(difference)}{users}."


def _ablations(results: _Results, dim: int) -> Iterator[str]:
    own = results.get(results.comparison, dim)
    if own is None:
        return
    for ablation in results.at(dim, "ablation"):
        difference = results.difference(ablation, own)
        change = CHANGES.get(ablation.system, f"the change to {ablation.system}")
        # "Harmful" is said of what is added or left out, not of doing so.
        adds = change.startswith("adding")
        if_raised, if_lowered = ("worth having", "harmful") if adds else ("harmful", "worth having")
        verdict = _verdict(
            difference,
            f"raises the AUC ({if_raised})",
            f"lowers the AUC ({if_lowered})",
            "makes no difference that can be shown (worth nothing here)",
        )
        figures = f"{_words(difference)}{_users(ablation, difference)}"
        yield f"At d = {dim} {change} {verdict}: {ablation.system} minus {own.system} is {figures}."


def _cold_items(results: _Results, dim: int) -> Iterator[str]:
    own, best = results.get(results.comparison, dim), results.best(results.at(dim, "layer"))
    if own is None or best is None:
        return
    if math.isnan(own.cold_auc):
        yield f"Cold items at d = {dim}: no AUC, for their test rows are none or all of one label."
        return
    difference = results.difference(own, best, "cold_auc")
    verdict = _verdict(difference, "is better", "is worse", "is not demonstrably better or worse")
    yield (
        f"On cold items at d = {dim} {own.system} {verdict} than {best.system}: "
        f"AUC {own.cold_auc:.4f} and {best.cold_auc:.4f}, {_words(difference)}."
    )


def _tuned(results: _Results, dim: int) -> Iterator[str]:
    tuned, frozen, middle = results.get(TUNED, dim), results.get(FROZEN, dim), results.best_middle(dim)
    if tuned is not None and frozen is not None:
        difference = results.difference(tuned, frozen, "validation_auc")
        verdict = _verdict(difference, "raises", "lowers", "does not demonstrably change")
        yield f"At d = {dim} LoRA on the final layer {verdict} the validation AUC, {TUNED} against {FROZEN}: " + (
            f"{_words(difference)}; on the test part {_words(results.difference(tuned, frozen))}."
        )
    if tuned is None or middle is None:
        return
    difference = results.difference(tuned, middle)
    verdict = _verdict(difference, "beats", "loses to", "does not demonstrably beat")
    yield f"At d = {dim} {TUNED} {verdict} {middle.system}, the best middle layer: {_words(difference)}."


def _storage(results: _Results) -> Iterator[str]:
    own, full = results.get(results.comparison), results.get(FULL_WIDTH)
    if own is None or full is None:
        return
    difference = results.difference(own, full)
    verdict = _verdict(difference, "higher", "lower", "not demonstrably different")
    yield (
        f"{own.system} at d = {own.dim} takes {own.bytes_per_item:,} bytes per item and the full-width final layer "
        f"{full.bytes_per_item:,}, {full.bytes_per_item / own.bytes_per_item:.1f} times as much; "
        f"the AUC of {own.system} is {verdict}: {_words(difference)}{_users(full, difference, sign=-1)}."
    )


def _verdict(difference: PairedDifference | None, above: str, below: str, neither: str) -> str:
    if difference is None or difference.low is None or difference.high is None:
        return f"{neither} (there is no interval to judge by)"
    return above if difference.low > 0 else below if difference.high < 0 else neither


def _words(difference: PairedDifference | None) -> str:
    if difference is None:
        return "without a seed in common"
    mean = signed(difference.mean)
    if difference.low is None or difference.high is None or difference.p_value is None:
        return f"{mean} (one seed)"
    p_value = "p < 0.001" if difference.p_value < 0.001 else f"p = {difference.p_value:.3f}"
    interval = f"{signed(difference.low)} to {signed(difference.high)}"
    return f"{mean} (95 % interval {interval}, {p_value}, {difference.seeds} seeds)"


def _users(summary: Summary, difference: PairedDifference | None, *, sign: int = 1) -> str:
    """How the difference moves with the test users; sign −1 where the summary subtracts the other way round."""
    if summary.user_low is None or summary.user_high is None or difference is None:
        return ""
    low, high = sorted((sign * summary.user_low, sign * summary.user_high))
    doubt = ", so other users might not show it" if low <= 0 <= high and _is_shown(difference) else ""
    return f"; with the test users drawn anew {signed(low)} to {signed(high)}{doubt}"


def _is_shown(difference: PairedDifference) -> bool:
    return difference.low is not None and difference.high is not None and difference.low * difference.high > 0


def _in_deviations(one: Summary, other: Summary) -> str:
    pooled = math.sqrt((one.auc_std**2 + other.auc_std**2) / 2)
    return f", {signed((one.auc - other.auc) / pooled, 1)} pooled standard deviations" if pooled > 0 else ""
