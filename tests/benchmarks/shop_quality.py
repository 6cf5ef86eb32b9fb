"""Measure what a training on a shop's own interactions ships, against PCA of every layer, also with fewer interactions.

    python tests/benchmarks/shop_quality.py --config FILE --ds DATE [--fractions 100,30,10] [--seeds 5] [--json FILE]

Every seed is one `marc train`: it chooses layer and weights within the training part, trains, and passes the gate,
which may ship a PCA instead. A smaller fraction keeps a random part of the training part's rows. The validation part,
the test part and their negatives stay the same. The table compares on the test part, with a click model of the same
seed. The best PCA is the best of all layers by test AUC, which no shop can know: the hardest rival. ``users`` is the
95 % interval of the difference to it over test users, for predictions averaged over seeds.

To compare settings, give them as variables, for example MARC_TRAIN__EPOCHS=3. Choose settings with ``--part
validation``: it scores the validation part, and the end of the training part then chooses the click model's epoch.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from material import quiet
from measuring import CORES, options, progress, show, working_folder, write_json

from marc_pipeline.bundles.promotion import compare_stage
from marc_pipeline.bundles.stages import LAYERS, run_uri, states_stage, train_stage
from marc_pipeline.config import load_settings
from marc_pipeline.deployment import Deployment, open_deployment
from marc_pipeline.evaluation.click_data import ClickData, click_data
from marc_pipeline.evaluation.click_model import score_together
from marc_pipeline.evaluation.factory import pca_vectors
from marc_pipeline.evaluation.statistics import summarise
from marc_pipeline.evaluation.systems import System
from marc_pipeline.evaluation.tasks import as_scores
from marc_pipeline.model.bundle import open_bundle
from marc_pipeline.model.device import use_threads
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.resources import machine
from marc_pipeline.spark.session import configured_session
from marc_pipeline.storage import join
from marc_pipeline.storage.checksums import describe_file
from marc_pipeline.training.learning import training_part
from marc_pipeline.training.negatives import with_negatives
from marc_pipeline.training.time_split import Split
from marc_pipeline.training.training_set import (
    CARD,
    INTERACTIONS,
    TrainingSet,
    identify_training,
    interactions_table,
    open_training_set,
    training_uri,
)
from marc_schemas.evaluation import Summary, SystemScore
from marc_schemas.training import TrainingSetCard

COLUMNS = "training rows|system|test AUC|cold AUC|recall@10|look-up recall|minus best PCA|users"


def kept_rows(training_set: TrainingSet, percent: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mask of the rows that remain: a random part of the training part, and everything later."""
    n, end = len(training_set.interactions), training_set.split.train.stop
    kept = np.ones(n, bool)
    dropped = np.random.default_rng(0).permutation(end)[round(end * percent / 100) :]
    kept[dropped] = False
    return kept


def reduced(training_set: TrainingSet, percent: int, deployment: Deployment) -> str:
    """Write the training set with fewer rows beside the whole one, and return its id."""
    storage, work_uri = deployment.storage, deployment.settings.work_uri
    training_id = f"{training_set.card.training_id}-{percent}"
    folder = Path(training_uri(work_uri, training_id))
    folder.mkdir(parents=True, exist_ok=True)
    interactions = training_set.interactions.take(np.flatnonzero(kept_rows(training_set, percent)))
    users = np.unique(interactions.users, return_inverse=True)[1]
    card: TrainingSetCard = training_set.card.model_copy(update={"training_id": training_id})
    for name in card.files:
        if name != INTERACTIONS and not (folder / name).exists():
            os.link(training_set.folder / name, folder / name)
    pq.write_table(interactions_table(replace(interactions, users=users)), folder / INTERACTIONS)
    file = describe_file(folder / INTERACTIONS, path=INTERACTIONS)
    card = card.model_copy(update={"interactions": len(interactions), "files": {**card.files, INTERACTIONS: file}})
    storage.write(join(str(folder), CARD), card.model_dump_json().encode())
    return training_id


def fixed_data(training_set: TrainingSet, percent: int, deployment: Deployment, *, part: str) -> ClickData:
    """The click model's data: fewer training rows, but the same later rows with the same negatives."""
    wanted, whole = deployment.settings.interactions, training_set.interactions
    items, split = len(training_set.item_ids), training_set.split
    rows = with_negatives(whole, known=split.train.stop, items=items, settings=wanted)
    copies = 1 + wanted.negatives if whole.implicit else 1
    if len(rows) != copies * len(whole):
        raise SystemExit("a user took every item: this benchmark cannot tell which rows belong together")
    kept = rows.take(np.flatnonzero(np.repeat(kept_rows(training_set, percent), copies)))
    first, second = np.searchsorted(kept.times, training_set.card.boundaries).tolist()
    bounds = [first, second, len(kept)]
    if part == "validation":
        kept, bounds = kept.take(slice(0, second)), [round(0.9 * first), first, second]
    parts = Split(slice(0, bounds[0]), slice(bounds[0], bounds[1]), slice(bounds[1], bounds[2]))
    return click_data(kept, parts, n_items=items, history=wanted.history, implicit=whole.implicit)


def measured(deployment: Deployment, training_set: TrainingSet, percent: int, given: Any, spark: Any) -> list[Summary]:
    """Train and evaluate with every seed."""
    settings, storage = deployment.settings, deployment.storage
    training_id = reduced(training_set, percent, deployment)
    own = open_training_set(storage, settings.work_uri, training_id)
    data = fixed_data(training_set, percent, deployment, part=given.part)
    learned = training_part(own, settings=settings.interactions, holdout=settings.train.holdout)
    known = learned.whole().known.numpy()
    systems: dict[str, Any] = {}
    for layer in range(own.card.layers + 1):
        states = own.states(layer, np.arange(len(own.item_ids)))
        systems[f"pca-layer-{layer}"] = pca_vectors(states, known, dim=settings.train.dim)
    systems["random"] = np.random.default_rng(0).standard_normal(systems["pca-layer-0"].shape, dtype=np.float32)
    scores: list[SystemScore] = []
    predictions, made = {}, Path()
    for seed in range(given.seeds):
        train = settings.train.model_copy(update={"seed": seed})
        uri = join(settings.work_uri, "benchmark", f"{training_id}-{seed}")
        one = deployment.with_settings(settings.model_copy(update={"train": train, "bundle_uri": uri}))
        folder = Path(run_uri(one.settings, training_id))
        if seed:
            # The choices do not depend on the seed of the training, so later seeds take those of the first.
            folder.mkdir(parents=True)
            for path in [made / LAYERS, *made.glob("recipes_*.json")]:
                shutil.copy(path, folder)
        else:
            made = folder
        run = train_stage(spark, one, training_id, decision="clicks")
        gate = compare_stage(one, training_id, run.bundle)
        recipe = f"{run.layers} layers, keep {run.keep:g}, decouple {run.decouple:g}, epochs {run.epochs}"
        progress(f"{percent} %, seed {seed}: {recipe}; the gate finds {gate.best} best of {gate.validation_auc}")
        for name, version in (("marc", run.bundle), ("shipped", gate.replacement or run.bundle)):
            bundle = open_bundle(storage, join(uri, version))
            encoder = load_encoder(storage, bundle.uri, version, settings.encode, machine())
            systems[name] = encoder.encode(own.texts).vectors
        use_threads(CORES)
        found = score_together([*systems.values()], data, seed=seed, ranked=own.interactions.implicit)
        labelled = [(System(name, "marc", None), None) for name in systems]
        scored = as_scores(labelled, found, dim=train.dim, seed=seed, seconds=[0.0] * len(found))
        scores += scored.scores
        predictions |= scored.predictions
    best = max(
        (name for name in systems if name.startswith("pca")),
        key=lambda name: np.mean([score.auc for score in scores if score.system == name]),
    )
    shown = summarise(scores, predictions, data, comparison=best)
    wanted = {"random", "marc", "shipped", best, f"pca-layer-{own.card.layers}"}
    return [summary for summary in shown if summary.system in wanted]


def row(percent: int, summary: Summary) -> tuple[Any, ...]:
    difference = None if summary.difference is None else f"{summary.difference:+.4f}"
    users = None if summary.user_low is None else f"{summary.user_low:+.4f} to {summary.user_high:+.4f}"
    return (
        f"{percent} %", summary.system, f"{summary.auc:.4f} ± {summary.auc_std:.4f}", f"{summary.cold_auc:.4f}",
        f"{summary.recall:.4f}", f"{summary.lookup_recall:.4f}", difference, users,
    )  # fmt: skip


def main() -> None:
    given = options(
        __doc__,
        config=Path("marc.yaml"),
        ds="2026-11-20",
        fractions=[100, 30, 10],
        seeds=5,
        part=("test", "validation"),
    )
    settings = load_settings(given.config)
    with working_folder() as folder:
        root = {"work_uri": str(folder / "work"), "bundle_uri": str(folder / "bundles")}
        deployment = open_deployment(settings.model_copy(update=root))
        with quiet(), configured_session(settings, name="shop quality") as spark:
            identity = identify_training(deployment, ds=given.ds)
            training_set = states_stage(spark, deployment, identity, dims=(settings.train.dim,))
            rows, figures = [], {}
            for percent in given.fractions:
                found = measured(deployment, training_set, percent, given, spark)
                rows += [row(percent, summary) for summary in found]
                figures[percent] = [summary.model_dump() for summary in found]
        shutil.rmtree(folder, ignore_errors=True)
    show(f"{given.part} part, {given.seeds} seeds, d = {settings.train.dim}", COLUMNS, rows)
    write_json(given.json, figures)


if __name__ == "__main__":
    main()
