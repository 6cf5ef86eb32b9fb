"""Measure what choosing and training cost on made-up hidden states: seconds and peak memory of each step.

    python tests/benchmarks/choosing.py [--layers 36] [--items 100000] [--width 768] [--users 200000]
                                        [--interactions 10000000] [--folder DIR] [--json FILE]

The states are noise, with a signal that grows to the middle layer and falls again. Users take items in the direction of
their taste, with a long tail of popularity. The steps are those of `marc train` after the hidden states: the search for
the layer, the search for the recipe, the training, and the click models of the gate for MARC, two PCAs and random
vectors. Peak memory is that of all processes together, sampled ten times a second. DIR needs 4 bytes per number of the
states.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from material import quiet
from measuring import CORES, options, progress, show, working_folder, write_json
from numpy.lib.format import open_memmap
from processes import watched

from marc_pipeline.bundles.choices import Chosen
from marc_pipeline.bundles.making import train_marc
from marc_pipeline.bundles.stages import layer_stage, recipe_stage
from marc_pipeline.config import CatalogueSettings, InteractionSettings, Settings
from marc_pipeline.deployment import Deployment, open_deployment
from marc_pipeline.evaluation.click_model import score_together
from marc_pipeline.evaluation.factory import pca_vectors
from marc_pipeline.evaluation.recipe_search import Recipe
from marc_pipeline.evaluation.tasks import evaluation_data
from marc_pipeline.model.device import use_threads
from marc_pipeline.resources import machine
from marc_pipeline.spark.session import configured_session
from marc_pipeline.storage import join
from marc_pipeline.storage.checksums import describe_file
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.learning import training_part
from marc_pipeline.training.time_split import split_times
from marc_pipeline.training.training_set import (
    CARD,
    INTERACTIONS,
    ITEMS,
    PROFILES,
    STATES,
    TrainingSet,
    interactions_table,
    open_training_set,
    training_uri,
)
from marc_schemas.training import TrainingSetCard

TASTES, AT_ONCE = 12, 20_000
TRAINING_ID = "made-up"


def made_up(given: Any, deployment: Deployment) -> TrainingSet:
    """Make a training set of the given size in a process of its own, whose memory does not count, and open it."""
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(given, deployment))
    maker.start()
    maker.join()
    return open_training_set(deployment.storage, deployment.settings.work_uri, TRAINING_ID)


def make(given: Any, deployment: Deployment) -> None:
    """Write a training set of the given size to the work area."""
    rng, storage = np.random.default_rng(0), deployment.storage
    folder = Path(training_uri(deployment.settings.work_uri, TRAINING_ID))
    folder.mkdir(parents=True)
    qualities = rng.standard_normal((given.items, TASTES), dtype=np.float32)
    mixing = rng.standard_normal((TASTES, given.width), dtype=np.float32)
    states = open_memmap(
        folder / STATES, mode="w+", dtype=np.float32, shape=(given.layers + 1, given.items, given.width)
    )
    for layer in range(given.layers + 1):
        strength = 0.1 + 0.4 * np.sin(np.pi * layer / given.layers)
        for start in range(0, given.items, AT_ONCE):
            some = qualities[start : start + AT_ONCE]
            noise = rng.standard_normal((len(some), given.width), dtype=np.float32)
            states[layer, start : start + AT_ONCE] = noise + strength * (some @ mixing)
    states.flush()
    interactions = purchases(given, qualities, rng)
    names = pa.array([f"i{number}" for number in range(given.items)])
    pq.write_table(pa.table({"item_id": names, "text": names}), folder / ITEMS)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / PROFILES)
    pq.write_table(interactions_table(interactions), folder / INTERACTIONS)
    card = TrainingSetCard(
        training_id=TRAINING_ID, ds="2026-11-20", template="{text}", backbone="made-up", layers=given.layers,
        width=given.width, pooling="mean", max_tokens=64, dtype="float32", device="cpu", items=given.items,
        boundaries=split_times(interactions), users=interactions.n_users, interactions=len(interactions),
        clicks=len(interactions), implicit=True,
        files={name: describe_file(folder / name, path=name) for name in (STATES, ITEMS, PROFILES, INTERACTIONS)},
    )  # fmt: skip
    storage.write(join(str(folder), CARD), card.model_dump_json().encode())


def purchases(given: Any, qualities: Any, rng: np.random.Generator) -> Interactions:
    """Every purchase is the best of eight popular items for the user's taste."""
    n = given.interactions
    users = rng.integers(given.users, size=n)
    tastes = rng.standard_normal((given.users, TASTES), dtype=np.float32)
    items = np.empty(n, np.int64)
    popular = rng.permutation(given.items)
    for start in range(0, n, AT_ONCE):
        own = users[start : start + AT_ONCE]
        drawn = popular[(given.items * rng.random((len(own), 8)) ** 3).astype(np.int64)]
        liking = np.einsum("nkt,nt->nk", qualities[drawn], tastes[own]) + rng.gumbel(size=drawn.shape)
        items[start : start + AT_ONCE] = drawn[np.arange(len(own)), liking.argmax(axis=1)]
    _, numbers = np.unique(users, return_inverse=True)
    return Interactions(numbers, items, np.ones(n, np.float32), np.arange(n), implicit=True)


def gate(training_set: TrainingSet, settings: Settings, own: Any, layer: int) -> dict[str, float]:
    """Mean validation AUC of MARC and its rivals over the seeds of the gate."""
    items, dim = np.arange(len(training_set.item_ids)), settings.train.dim
    learned = training_part(training_set, settings=settings.interactions, holdout=settings.train.holdout)
    known = learned.whole().known.numpy()
    systems = {"marc": own}
    for number in (layer, training_set.card.layers):
        systems[f"pca-layer-{number}"] = pca_vectors(training_set.states(number, items), known, dim=dim)
    systems["random"] = np.random.default_rng(0).standard_normal((len(items), dim), dtype=np.float32)
    data = evaluation_data(training_set, settings)
    runs = [score_together([*systems.values()], data, seed=seed) for seed in range(settings.evaluate.seeds)]
    return {name: fmean(run[place].validation_auc for run in runs) for place, name in enumerate(systems)}


def main() -> None:
    given = options(__doc__, layers=36, items=100_000, width=768, users=200_000, interactions=10_000_000, folder=Path)
    rows: list[tuple[Any, ...]] = []

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.monotonic()
        with watched(os.getpid()) as usage:
            result = work()
        seconds, peak = time.monotonic() - started, usage.total / 2**20
        rows.append((name, seconds, peak, str(result) if isinstance(result, int | Recipe) else ""))
        progress(f"{name}: {seconds:.0f} s, {peak:.0f} MiB {rows[-1][3]}")
        return result

    with working_folder(given.folder) as folder, quiet():
        settings = Settings(
            catalogue=CatalogueSettings(uri="none", template="{text}"),
            interactions=InteractionSettings(uri="none"),
            work_uri=str(folder / "work"),
        )
        deployment = open_deployment(settings)
        training_set = timed("making the training set up", lambda: made_up(given, deployment))
        use_threads(CORES)
        layer = timed("choice of the layer", lambda: layer_stage(deployment, TRAINING_ID))
        with configured_session(settings, name="choosing") as spark:
            recipe = timed("choice of the recipe", lambda: recipe_stage(spark, deployment, TRAINING_ID, layer=layer))
        chosen = Chosen(layer, recipe.keep, recipe.decouple, recipe.epochs, "clicks")
        train = chosen.applied(settings.train)
        trained = timed(
            "training",
            lambda: train_marc(
                training_set, layers=layer, train=train, encode=settings.encode, interactions=settings.interactions,
                resources=machine(),
            ),
        )  # fmt: skip
        own = trained.objective.vectors().numpy()
        found = timed("click models of the gate", lambda: gate(training_set, settings, own, layer))
    total, peak = sum(seconds for _, seconds, _, _ in rows[1:]), max(peak for _, _, peak, _ in rows[1:])
    shown = ", ".join(f"{name} {auc:.4f}" for name, auc in found.items())
    title = f"{given.layers} layers, {given.items:,} items of width {given.width}, {given.interactions:,} purchases"
    notes = [
        f"choosing, training and gate: {total / 60:.1f} minutes, at most {peak:,.0f} MiB",
        f"training: {trained.progress.step} steps, {'at the cap' if trained.progress.capped else 'stopped early'}",
        f"validation AUC: {shown}",
    ]
    show(title, "step|seconds:.0f|peak MiB:.0f|result", rows, notes=notes)
    write_json(given.json, {"steps": rows, "validation_auc": found})


if __name__ == "__main__":
    main()
