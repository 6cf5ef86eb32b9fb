"""Findings of an evaluation: every verdict follows from the interval, and every sentence has its figures."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from marc_pipeline.evaluation.findings import findings
from marc_pipeline.evaluation.statistics import summarise
from marc_schemas.evaluation import Summary, SystemScore
from score_cases import JITTER, NO_ROWS, jitter, scores

Figures = Mapping[str, Mapping[str, float]]
BASE = {
    ("ids", 0): 0.673,
    ("final-full", 384): 0.680,
    **{(f"pca-layer-{layer}", 32): auc for layer, auc in enumerate([0.689, 0.690, 0.692, 0.679])},
    ("autoencoder", 32): 0.690,
    ("marc", 32): 0.700,
}


def told(entries: Sequence[SystemScore], **users: tuple[float, float]) -> list[str]:
    """Findings on scores; ``users`` are intervals over test users by system."""

    def with_users(summary: Summary) -> Summary:
        low, high = users.get(summary.system.replace("-", "_"), (None, None))
        return summary.model_copy(update={"user_low": low, "user_high": high})

    summaries = [with_users(s) for s in summarise(entries, {}, NO_ROWS, comparison="marc")]
    return findings(summaries, entries, layers=3, comparison="marc")


def sentences(aucs: Mapping[tuple[str, int], float], figures: Figures | None = None, **changes: Any) -> list[str]:
    """Findings on BASE and other AUCs; ``figures`` are means of other figures by name and system."""
    entries = scores({**BASE, **aucs}, **changes)
    for name, means in (figures or {}).items():
        moved = {
            system: [mean + step for step in jitter(place)] for place, (system, mean) in enumerate(means.items(), 1)
        }
        entries = [s.model_copy(update={name: moved[s.system][s.seed]}) if s.system in moved else s for s in entries]
    return told(entries)


def the_one(found: Sequence[str], *words: str) -> str:
    (sentence,) = [s for s in found if all(word in s for word in words)]
    return sentence


MIDDLE = "mid-layer advantage at d = 32"
CHANGES = {
    "marc-no-constraints": "leaving out the information constraints",
    "marc-crossing": "adding a difference in structure",
    "marc-keep": "adding the constraint that z keeps what h holds",
    "marc-final": "reading the final layer instead of the chosen one",
}
CASES: list[tuple[dict[tuple[str, int], float], str, list[str]]] = [
    (
        {},
        MIDDLE,
        [
            "is confirmed: test AUC 0.6920 for the PCA of layer 2",
            f"+{0.013 / np.std(JITTER, ddof=1):.1f} pooled standard",
            "0.6790 for the final layer's, +0.0130 (95 % interval +0.0",
        ],
    ),
    ({("pca-layer-3", 32): 0.699}, MIDDLE, ["is refuted"]),
    ({("pca-layer-3", 32): 0.6921}, MIDDLE, ["is not confirmed"]),
    # The embeddings are a rival, but not a middle layer.
    ({("pca-layer-0", 32): 0.6999}, MIDDLE, ["layer 2, the best middle one"]),
    ({("pca-layer-0", 32): 0.6999}, "marc does not demonstrably beat pca-layer-0", ["the best of 4 layers"]),
    # Only the best layer is a rival.
    ({}, "marc beats pca-layer", ["pca-layer-2, the best of 4 layers by test AUC"]),
    *(
        ({(rival, 32): auc}, f"marc {verb} {rival}", ["At d = 32 marc", figures, "5 seeds)."])
        for rival in ("pca-layer-2", "autoencoder", "bundle:0123")
        for auc, verb, figures in [
            (0.692, "beats", "+0.0080 (95 % interval +0.0"),
            (0.710, "loses to", "−0.0100 (95 % interval −0.0"),
            (0.7001, "does not demonstrably beat", "−0.0001 (95 % interval −0.00"),
        ]
    ),
    *(
        ({(ablation, 32): auc}, ablation, [f"At d = 32 {change} {verdict}", f"{ablation} minus marc is {figure} (95 %"])
        for ablation, change in CHANGES.items()
        for raised, lowered in [("worth having", "harmful") if "adding" in change else ("harmful", "worth having")]
        for auc, verdict, figure in [
            (0.692, f"lowers the AUC ({lowered})", "−0.0080"),
            (0.708, f"raises the AUC ({raised})", "+0.0080"),
            (0.7001, "makes no difference that can be shown (worth nothing here)", "+0.0001"),
        ]
    ),
    *(
        (
            {("marc", 64): 0.7, ("final-full", 384): full},
            "bytes per item",
            [
                "marc at d = 64 takes 256 bytes per item and the full-width final layer 1,536, 6.0 times as much",
                words,
            ],
        )
        for full, words in [
            (0.68, "is higher: +0.0200"),
            (0.72, "is lower: −0.0200"),
            (0.7001, "is not demonstrably different: −0.0001"),
        ]
    ),
    *(
        ({("marc-tuned", 32): auc}, "marc-tuned", [f"At d = 32 marc-tuned {verb} pca-layer-2, the best middle layer"])
        for auc, verb in [(0.71, "beats"), (0.68, "loses to"), (0.6921, "does not demonstrably beat")]
    ),
]


@pytest.mark.parametrize(("aucs", "words", "expected"), CASES)
def test_a_claim_has_its_verdict_and_figures(
    aucs: dict[tuple[str, int], float], words: str, expected: list[str]
) -> None:
    sentence = the_one(sentences(aucs), words)
    assert all(part in sentence for part in expected), sentence


@pytest.mark.parametrize(
    ("cold", "words"),
    [(0.65, "marc is better than"), (0.60, "marc is worse than"), (0.6301, "marc is not demonstrably better or worse")],
)
def test_cold_items_have_their_own_verdict(cold: float, words: str) -> None:
    sentence = the_one(sentences({}, {"cold_auc": {"marc": cold, "pca-layer-2": 0.63}}), "cold items at d = 32")
    assert words in sentence
    assert f"AUC {cold:.4f} and 0.6300, " in sentence
    assert "no AUC" in the_one(sentences({}, cold_auc=math.nan), "Cold items at d = 32")


@pytest.mark.parametrize(
    ("gain", "words"), [(0.01, "raises"), (-0.01, "lowers"), (0.0, "does not demonstrably change")]
)
def test_lora_is_evaluated_on_the_validation_part(gain: float, words: str) -> None:
    tuned = {("marc-final", 32): 0.685, ("marc-tuned", 32): 0.680}
    validation = {"marc-final": 0.70, "marc-tuned": 0.70 + gain}
    sentence = the_one(sentences(tuned, {"validation_auc": validation}), "LoRA")
    assert f"At d = 32 LoRA on the final layer {words} the validation AUC, marc-tuned against marc-final" in sentence
    assert "on the test part −0.0050" in sentence
    assert not [s for s in sentences({("marc-tuned", 32): 0.68}) if "LoRA" in s]
    assert not [s for s in sentences({}) if "tuned" in s]


def test_an_ablation_with_the_same_scores_is_worth_nothing() -> None:
    entries = scores(BASE)
    copy = {"system": "marc-no-constraints", "family": "ablation"}
    entries += [s.model_copy(update=copy) for s in entries if s.system == "marc"]
    found = the_one(told(entries), "marc-no-constraints", "+0.0000 to +0.0000, p = 1.000")
    assert "makes no difference" in found


def test_there_are_findings_at_every_dimension() -> None:
    found = sentences({(system, 64): auc for (system, dim), auc in BASE.items() if dim == 32})
    for words in ("mid-layer advantage", "beats autoencoder", "cold items"):
        assert [dim for s in found if words in s for dim in ("d = 32", "d = 64") if dim in s] == ["d = 32", "d = 64"]


def test_one_seed_gives_no_verdict() -> None:
    found = sentences({("marc-no-constraints", 32): 0.6}, seeds=1)
    assert len(found) == 6
    for sentence in found:
        assert "(there is no interval)" in sentence
        assert "one seed" in sentence
        claims = ("beats", "is confirmed", "worth having", "is better", "is higher")
        assert not any(claim in sentence for claim in claims)


def test_systems_that_were_not_evaluated_have_no_findings() -> None:
    layers = {key: auc for key, auc in BASE.items() if key[0].startswith("pca")}
    advantage, missing = told(scores(layers))
    assert "mid-layer advantage" in advantage
    assert missing == "marc was not evaluated, so there are no findings about it."
    assert told(scores({("marc", 32): 0.7})) == []
    middle_only = {key: auc for key, auc in layers.items() if key[0] != "pca-layer-3"}
    assert not [s for s in told(scores(middle_only)) if "mid-layer" in s]


def test_the_interval_over_users_is_shown_and_may_weaken_a_claim() -> None:
    entries = scores({("pca-layer-1", 32): 0.69, ("marc", 32): 0.70})
    # The summary subtracts marc from the layer; the sentence subtracts the layer from marc.
    sure = the_one(told(entries, pca_layer_1=(-0.012, -0.003)), "marc beats")
    unsure = the_one(told(entries, pca_layer_1=(-0.012, 0.003)), "marc beats")
    assert sure.endswith("; with resampled test users +0.0030 to +0.0120.")
    assert unsure.endswith("; with resampled test users −0.0030 to +0.0120, so it may not hold for other users.")
    (even,) = told(scores({("mrl", 32): 0.7001, ("marc", 32): 0.7}), mrl=(-0.004, 0.003))
    assert even.startswith("At d = 32 marc does not demonstrably beat mrl")
    assert even.endswith("; with resampled test users −0.0030 to +0.0040.")


def test_a_claim_is_made_exactly_if_the_interval_excludes_0() -> None:
    for auc, spread in itertools.product(np.linspace(0.680, 0.704, 13), (1, 10)):
        entries = [
            s.model_copy(update={"auc": s.auc + spread * JITTER[s.seed % 5] * (s.system == "marc")})
            for s in scores({("mrl", 32): 0.692, ("marc", 32): float(auc)})
        ]
        (mrl,) = [s for s in summarise(entries, {}, NO_ROWS, comparison="marc") if s.system == "mrl"]
        assert mrl.low is not None
        assert mrl.high is not None
        verb = "beats" if mrl.high < 0 else "loses to" if mrl.low > 0 else "does not demonstrably beat"
        assert f"marc {verb} mrl: " in told(entries)[0]
