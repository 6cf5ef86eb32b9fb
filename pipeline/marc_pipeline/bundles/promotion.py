"""Promotion: compare a bundle with its rivals; if the gate passes it, make it current in one atomic write."""

import logging
from collections.abc import Iterator
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.bundles import gate
from marc_pipeline.bundles.making import save_layer_pca
from marc_pipeline.config import Settings
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import GateRefused, UserError
from marc_pipeline.evaluation.click_data import ClickData
from marc_pipeline.evaluation.click_model import ClickScore, Vectors, score_together
from marc_pipeline.evaluation.factory import pca_vectors
from marc_pipeline.evaluation.statistics import user_error, user_interval
from marc_pipeline.evaluation.systems import System
from marc_pipeline.evaluation.tasks import as_scores, evaluation_data
from marc_pipeline.model.bundle import current_version, local_bundle, open_bundle, promote
from marc_pipeline.model.device import use_threads
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.progress import ProgressLog
from marc_pipeline.resources import machine
from marc_pipeline.storage import join
from marc_pipeline.training.learning import training_part
from marc_pipeline.training.training_set import TrainingSet, open_training_set, training_uri
from marc_pipeline.work_area import read_contract
from marc_schemas.evaluation import SystemScore
from marc_schemas.promotion import BundleComparison

RANDOM, PCA = "random", "pca-layer-"

Systems = dict[str, tuple[System, int | None, Vectors]]
"""Systems to compare with their layers and vectors [items, d], by name."""

log = logging.getLogger(__name__)


def compare_stage(deployment: Deployment, training_id: str, candidate: str) -> BundleComparison:
    """Evaluate a bundle and its rivals on the same split, verify its checksums and audit its vectors.

    If a PCA has the highest validation AUC, it is saved as a bundle, for :func:`promote_stage`.
    """
    settings, storage = deployment.settings, deployment.storage
    current = current_version(storage, settings.bundle_uri)
    training_set = open_training_set(storage, settings.work_uri, training_id)
    # The gate runs first, because a damaged bundle, or one with infinite weights, has no vectors to evaluate.
    problems = gate.problems(
        settings, training_set.texts, candidate, storage=storage, resources=machine(), training_set=training_set
    )
    rival = current if current != candidate else None
    damage = gate.damage(settings, rival, storage=storage) if rival else []
    if damage:
        log.warning("promote: the current bundle is damaged and not evaluated: %s", "; ".join(damage))
    versions = [*([] if problems else [candidate]), *([rival] if rival and not damage else [])]
    comparison = BundleComparison(
        training_id=training_id,
        candidate=candidate,
        current=current,
        tolerance=settings.evaluate.tolerance,
        scores=[],
        problems=problems,
    )
    if not problems:
        layer = open_bundle(storage, join(settings.bundle_uri, candidate)).card.layers_kept
        comparison = _decided(
            deployment, training_set, comparison, _evaluated(deployment, training_set, versions, layer)
        )
    storage.write(_comparison_uri(settings, training_id, candidate), comparison.model_dump_json(indent=1).encode())
    return comparison


def promote_stage(
    deployment: Deployment, training_id: str, candidate: str, *, replace: bool = True
) -> BundleComparison:
    """Make a bundle the current one by one atomic write, if the gate passes it.

    With ``replace``, the PCA that is better than the candidate and the current bundle becomes current instead.

    Raises:
        GateRefused: the comparison found a reason against the bundle, and there is nothing better to promote.
        UserError: the bundle was not evaluated, or another bundle became current since then.
    """
    settings, storage = deployment.settings, deployment.storage
    comparison = read_contract(storage, _comparison_uri(settings, training_id, candidate), BundleComparison)
    if comparison is None:
        raise UserError(f"bundle {candidate} was not evaluated on training set {training_id}; evaluate it first")
    chosen = comparison.replacement if replace and comparison.replacement else candidate
    if comparison.problems and chosen == candidate:
        raise GateRefused(f"bundle {candidate} is not promoted: " + "; ".join(comparison.problems))
    current = current_version(storage, settings.bundle_uri)
    if current not in {comparison.current, chosen}:
        raise UserError(f"bundle {current} became current since {candidate} was evaluated; evaluate again")
    if chosen != candidate:
        log.warning(
            "promote: %s; bundle %s, the %s, is promoted instead", comparison.problems[0], chosen, comparison.best
        )
    promote(storage, settings.bundle_uri, chosen)
    log.info("promote: bundle %s is current; the next nightly run re-encodes every item", chosen)
    return comparison


def _evaluated(deployment: Deployment, training_set: TrainingSet, versions: list[str], layer: int) -> Systems:
    """Return the systems to compare with their layers and vectors [items, d], by name."""
    settings, items = deployment.settings, len(training_set.item_ids)
    train = settings.train
    found: Systems = {}
    for version in versions:
        name = f"bundle:{version}"
        found[name] = System(name, "bundle", None), None, _bundle_vectors(deployment, training_set, version)
    learned = training_part(training_set, settings=settings.interactions, holdout=train.holdout)
    known = learned.whole().known.numpy()
    for number in dict.fromkeys((layer, training_set.card.layers)):
        name = f"{PCA}{number}"
        states = training_set.states(number, np.arange(items))
        found[name] = System(name, "layer", number), number, pca_vectors(states, known, dim=train.dim)
    vectors = np.random.default_rng(0).standard_normal((items, train.dim), dtype=np.float32)
    found[RANDOM] = System(RANDOM, "reference", None), None, vectors
    return found


def _bundle_vectors(deployment: Deployment, training_set: TrainingSet, version: str) -> NDArray[np.float32]:
    """Return the vectors [items, d] of a bundle, from the hidden states of this training set if it was made from them.

    The audit of the bundle compares the encoder with these vectors on a sample. Other bundles encode every text.
    """
    storage, settings, items = deployment.storage, deployment.settings, len(training_set.item_ids)
    uri = join(settings.bundle_uri, version)
    folder, bundle = local_bundle(storage, uri, version)
    if gate.made_from(bundle, training_set):
        states = training_set.states(bundle.card.layers_kept, np.arange(items))
        return gate.vectors_of_states(folder, bundle, states)
    log.info("promote: %s texts through bundle %s", f"{items:,}", version)
    encoder = load_encoder(storage, uri, version, settings.encode, machine())
    progress, done = ProgressLog("promote", items, "texts"), 0

    def report(texts: int, _tokens: int) -> None:
        nonlocal done
        done += texts
        progress.at(done)

    encoder.on_batch = report
    return encoder.encode(training_set.texts).vectors


def _decided(
    deployment: Deployment, training_set: TrainingSet, comparison: BundleComparison, systems: Systems
) -> BundleComparison:
    """Score the systems, and decide by the validation part which bundle may be promoted."""
    settings = deployment.settings
    use_threads(machine().cpus)
    data = evaluation_data(training_set, settings)
    runs, scores = _scored(systems, data, seeds=settings.evaluate.seeds)
    validation = {name: fmean(score.validation_auc for score in found) for name, found in runs.items()}
    test = {name: fmean(score.auc for score in found) for name, found in runs.items()}
    for name in sorted(validation, key=lambda one: -validation[one]):
        log.info("promote: %s: validation AUC %.4f, test AUC %.4f", name, validation[name], test[name])
    predicted = {name: np.mean([one.validation_predictions for one in found], axis=0) for name, found in runs.items()}
    part, own = data.split.validation, f"bundle:{comparison.candidate}"
    best = max((name for name in validation if name != RANDOM), key=lambda name: validation[name])
    interval = user_interval(predicted[best], predicted[RANDOM], data, part=part, comparisons=len(systems) - 1)
    update: dict[str, object] = {
        "validation_auc": validation, "auc": test, "best": best, "scores": scores,
        "beats_random": interval is None or interval[0] > 0,
    }  # fmt: skip
    if not update["beats_random"]:
        users = len(np.unique(data.users[part]))
        log.warning(
            "promote: no vector beats random ones for the %d users of the validation part: they are too few, or the "
            "texts say nothing about what users take",
            users,
        )
    # A small validation part must not prefer a PCA by chance.
    is_pca = best.startswith(PCA)
    error = user_error(predicted[best], predicted[own], data, part=part) if is_pca else 0.0
    if validation[own] >= validation[best] - comparison.tolerance - error:
        return comparison.model_copy(update=update)
    update["problems"] = [
        f"its mean validation AUC over {settings.evaluate.seeds} seeds is {validation[own]:.4f}, that of "
        f"{_named(best)} is {validation[best]:.4f}{f' ± {error:.4f}' if error else ''}; evaluate.tolerance is "
        f"{comparison.tolerance:g}"
    ]
    if is_pca:
        made = save_layer_pca(
            training_set,
            layers=systems[best][1] or 0,
            train=settings.train,
            interactions=settings.interactions,
            storage=deployment.storage,
            bundle_uri=settings.bundle_uri,
        )
        update["replacement"] = made.version
    return comparison.model_copy(update=update)


def _scored(systems: Systems, data: ClickData, *, seeds: int) -> tuple[dict[str, list[ClickScore]], list[SystemScore]]:
    """Return the scores of each system, one per seed, and their records."""
    progress = ProgressLog("promote: click models", seeds, "seeds")
    runs: dict[str, list[ClickScore]] = {name: [] for name in systems}
    records = []
    for seed in range(seeds):
        for dim, names in _by_dim(systems):
            group = [systems[name] for name in names]
            scored = score_together([vectors for *_, vectors in group], data, seed=seed, done=progress.part(seed))
            evaluated = [(system, layer) for system, layer, _ in group]
            records += as_scores(evaluated, scored, dim=dim, seed=seed, seconds=[0.0] * len(group)).scores
            for name, score in zip(names, scored, strict=True):
                runs[name].append(score)
    return runs, records


def _by_dim(systems: Systems) -> Iterator[tuple[int, list[str]]]:
    """Yield the names of systems of one dimension, which share a pass."""
    dims: dict[int, list[str]] = {}
    for name, (_, _, vectors) in systems.items():
        dims.setdefault(0 if vectors is None else vectors.shape[1], []).append(name)
    yield from dims.items()


def _named(system: str) -> str:
    kind, _, rest = system.partition(":")
    return f"the current bundle {rest}" if kind == "bundle" else f"the PCA of layer {system.removeprefix(PCA)}"


def _comparison_uri(settings: Settings, training_id: str, candidate: str) -> str:
    return join(training_uri(settings.work_uri, training_id), "comparisons", f"{candidate}.json")
