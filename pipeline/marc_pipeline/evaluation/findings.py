"""The findings of an evaluation as sentences: each claim with its numbers, whether it holds or not."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from marc_pipeline.evaluation.statistics import Key, PairedDifference, figures_of, paired_difference, runs_of
from marc_pipeline.report.cells import interval, p_text, signed
from marc_schemas.evaluation import Family, Summary, SystemScore

FULL_WIDTH = "final-full"
TUNED, FROZEN = "marc-tuned", "marc-final"
CHANGES = {
    "marc-no-constraints": "leaving out the information constraints",
    "marc-keep": "adding the constraint that z keeps what h holds",
    "marc-crossing": "adding a difference in structure",
    "marc-pca-start": "starting from a PCA instead of the regression",
    "marc-final": "reading the final layer instead of the chosen one",
}
"""The change to the comparison system that each ablation makes."""
NOTHING_TOLD = (
    "No vector beats random ones: the texts say nothing about what users take, and the differences between systems are "
    "chance."
)
ADVANTAGE = ("is confirmed", "is refuted", "is not confirmed")
"""Verdicts on the mid-layer advantage; see :func:`verdict`."""


def findings(
    summaries: Sequence[Summary],
    scores: Sequence[SystemScore],
    *,
    layers: int,
    comparison: str,
    beats_random: bool = True,
) -> list[str]:
    """Return one sentence per claim with its numbers, whether it holds or not.

    The 95 % interval over seeds decides every verdict: a claim is confirmed if the interval excludes 0.

    ``layers`` is the number of the backbone's final layer; the claims are about the ``comparison`` system. If no system
    beats random vectors, there is no claim about which one is better.
    """
    if not beats_random:
        return [NOTHING_TOLD]
    results = _Results(summaries, runs_of(scores), layers, comparison)
    topics = (_mid_layer_advantage, _rivals, _ablations, _cold_items, _tuned)
    sentences = [sentence for topic in topics for dim in results.dims for sentence in topic(results, dim)]
    if results.get(comparison) is None:
        sentences.append(f"{comparison} was not evaluated, so there are no findings about it.")
    return [*sentences, *_storage(results)]


@dataclass(frozen=True)
class _Results:
    """The data of all sentences."""

    summaries: Sequence[Summary]
    runs: Mapping[Key, Mapping[int, SystemScore]]
    layers: int
    comparison: str

    @property
    def dims(self) -> list[int]:
        """Return the dimensions at which systems are compared: those of layers and of the comparison system."""
        return sorted({s.dim for s in self.summaries if s.family == "layer" or s.system == self.comparison})

    def at(self, dim: int, *families: Family) -> list[Summary]:
        return [s for s in self.summaries if s.dim == dim and s.family in families]

    def get(self, system: str, dim: int | None = None) -> Summary | None:
        """Return a system at a dimension, by default its largest."""
        found = [s for s in self.summaries if s.system == system and dim in (None, s.dim)]
        return max(found, key=lambda s: s.dim, default=None)

    def best_layer(self, dim: int, *, middle: bool = False) -> Summary | None:
        """Return the layer with the best mean test AUC, which is the hardest rival.

        ``middle`` excludes the embeddings and the final layer.
        """
        layers = (s for s in self.at(dim, "layer") if not middle or 0 < (s.layer or 0) < self.layers)
        return max(layers, key=lambda s: s.auc, default=None)

    def difference(self, one: Summary, other: Summary, name: str = "auc") -> PairedDifference | None:
        first, second = (figures_of(self.runs[s.system, s.dim], name) for s in (one, other))
        return paired_difference(first, second)


def _mid_layer_advantage(results: _Results, dim: int) -> Iterator[str]:
    middle = results.best_layer(dim, middle=True)
    final = next((s for s in results.at(dim, "layer") if s.layer == results.layers), None)
    if middle is None or final is None:
        return
    difference = results.difference(middle, final)
    yield (
        f"The mid-layer advantage at d = {dim} {verdict(difference, *ADVANTAGE)}: test AUC {middle.auc:.4f} for the "
        f"PCA of layer {middle.layer}, the best middle one, and {final.auc:.4f} for the final layer's, "
        f"{difference_text(difference)}{_in_deviations(middle, final)}."
    )


def _rivals(results: _Results, dim: int) -> Iterator[str]:
    own = results.get(results.comparison, dim)
    layers, best = results.at(dim, "layer"), results.best_layer(dim)
    if own is None:
        return
    for rival in [*([best] if best else []), *results.at(dim, "baseline", "bundle")]:
        difference = results.difference(own, rival)
        outcome = verdict(difference, "beats", "loses to", "does not demonstrably beat")
        # The test part chose this layer, which makes a claim against it the strongest possible.
        apposition = f", the best of {len(layers)} layers by test AUC" if rival is best else ""
        users = _users(rival, difference, sign=-1)
        yield f"At d = {dim} {own.system} {outcome} {rival.system}{apposition}: {difference_text(difference)}{users}."


def _ablations(results: _Results, dim: int) -> Iterator[str]:
    own = results.get(results.comparison, dim)
    if own is None:
        return
    for ablation in results.at(dim, "ablation"):
        difference = results.difference(ablation, own)
        change = CHANGES.get(ablation.system, f"the change to {ablation.system}")
        # "Harmful" refers to the part that is added or left out, not to the change itself.
        adds = change.startswith("adding")
        if_raised, if_lowered = ("worth having", "harmful") if adds else ("harmful", "worth having")
        outcome = verdict(
            difference,
            f"raises the AUC ({if_raised})",
            f"lowers the AUC ({if_lowered})",
            "makes no difference that can be shown (worth nothing here)",
        )
        figures = f"{difference_text(difference)}{_users(ablation, difference)}"
        yield f"At d = {dim} {change} {outcome}: {ablation.system} minus {own.system} is {figures}."


def _cold_items(results: _Results, dim: int) -> Iterator[str]:
    own, best = results.get(results.comparison, dim), results.best_layer(dim)
    if own is None or best is None:
        return
    if math.isnan(own.cold_auc):
        yield f"Cold items at d = {dim}: no AUC, because there are no test rows, or all have one label."
        return
    difference = results.difference(own, best, "cold_auc")
    outcome = verdict(difference, "is better", "is worse", "is not demonstrably better or worse")
    yield (
        f"On cold items at d = {dim} {own.system} {outcome} than {best.system}: "
        f"AUC {own.cold_auc:.4f} and {best.cold_auc:.4f}, {difference_text(difference)}."
    )


def _tuned(results: _Results, dim: int) -> Iterator[str]:
    tuned, frozen, middle = results.get(TUNED, dim), results.get(FROZEN, dim), results.best_layer(dim, middle=True)
    if tuned is not None and frozen is not None:
        difference = results.difference(tuned, frozen, "validation_auc")
        outcome = verdict(difference, "raises", "lowers", "does not demonstrably change")
        yield f"At d = {dim} LoRA on the final layer {outcome} the validation AUC, {TUNED} against {FROZEN}: " + (
            f"{difference_text(difference)}; on the test part {difference_text(results.difference(tuned, frozen))}."
        )
    if tuned is None or middle is None:
        return
    difference = results.difference(tuned, middle)
    outcome = verdict(difference, "beats", "loses to", "does not demonstrably beat")
    yield f"At d = {dim} {TUNED} {outcome} {middle.system}, the best middle layer: {difference_text(difference)}."


def _storage(results: _Results) -> Iterator[str]:
    own, full = results.get(results.comparison), results.get(FULL_WIDTH)
    if own is None or full is None:
        return
    difference = results.difference(own, full)
    outcome = verdict(difference, "higher", "lower", "not demonstrably different")
    yield (
        f"{own.system} at d = {own.dim} takes {own.bytes_per_item:,} bytes per item and the full-width final layer "
        f"{full.bytes_per_item:,}, {full.bytes_per_item / own.bytes_per_item:.1f} times as much; "
        f"the AUC of {own.system} is {outcome}: {difference_text(difference)}{_users(full, difference, sign=-1)}."
    )


def verdict(difference: PairedDifference | None, above: str, below: str, neither: str) -> str:
    """Return the words for a difference with an interval above 0, below 0, or neither."""
    if difference is None or difference.low is None or difference.high is None:
        return f"{neither} (there is no interval)"
    return above if difference.low > 0 else below if difference.high < 0 else neither


def difference_text(difference: PairedDifference | None) -> str:
    """Return a difference with its interval, p-value and number of seeds."""
    if difference is None:
        return "without a seed in common"
    mean = signed(difference.mean)
    if difference.p_value is None:
        return f"{mean} (one seed)"
    p = p_text(difference.p_value)
    between = interval(difference.low, difference.high)
    return f"{mean} (95 % interval {between}, p {p if '<' in p else f'= {p}'}, {difference.seeds} seeds)"


def _users(summary: Summary, difference: PairedDifference | None, *, sign: int = 1) -> str:
    """Return the interval over test users; ``sign`` is −1 if the summary subtracts in the other direction."""
    if summary.user_low is None or summary.user_high is None or difference is None:
        return ""
    low, high = sorted((sign * summary.user_low, sign * summary.user_high))
    claimed = difference.low is not None and difference.high is not None and difference.low * difference.high > 0
    doubt = ", so it may not hold for other users" if low <= 0 <= high and claimed else ""
    return f"; with resampled test users {interval(low, high)}{doubt}"


def _in_deviations(one: Summary, other: Summary) -> str:
    pooled = math.sqrt((one.auc_std**2 + other.auc_std**2) / 2)
    return f", {signed((one.auc - other.auc) / pooled, 1)} pooled standard deviations" if pooled > 0 else ""
