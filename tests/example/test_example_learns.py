"""The example shows what the product is for: on its texts and ratings, MARC beats PCA, and PCA beats random vectors."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from marc_pipeline.config import EncodeSettings, InteractionSettings, TrainSettings, load_settings
from marc_pipeline.evaluation.click_data import ClickData, time_split_data
from marc_pipeline.evaluation.click_model import ClickScore, score_vectors
from marc_pipeline.evaluation.factory import make_vectors
from marc_pipeline.evaluation.systems import System
from marc_pipeline.example.ratings import write_interactions
from marc_pipeline.example.shop import read_good_items, write_catalogue
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.learning import learning_data
from marc_pipeline.training.states import write_states
from marc_pipeline.training.time_split import Split, split_by_time, split_times
from rating_files import read_all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("one_thread")]

DIM = 64
LAYERS = 6
MARC_LAYER = 1
"""A low layer, whose choice does not depend on the data: all layers differ by less than the margins."""
TRAIN = TrainSettings(epochs=30, patience=3, dim=DIM)


@dataclass(frozen=True)
class Shop:
    """The default example, with the hidden states of the default backbone in the file ``states``."""

    interactions: Interactions
    items: int
    states: Path

    @cached_property
    def split(self) -> Split:
        return split_by_time(self.interactions)

    @cached_property
    def clicks(self) -> ClickData:
        return time_split_data(
            self.interactions, split_times(self.interactions), items=self.items, settings=InteractionSettings()
        )

    def score(self, system: str, layer: int = 0, seed: int = 0) -> ClickScore:
        """The score of a system's vectors, made from the training part, on the test part."""
        rows = self.interactions.take(self.split.train)
        data = learning_data(rows, settings=InteractionSettings(), holdout=TRAIN.holdout, items=self.items)
        states: NDArray[np.float32] = np.array(np.load(self.states, mmap_mode="r")[layer])
        made = System(system, "layer" if system.startswith("pca") else "marc", layer)
        return score_vectors(
            make_vectors(made, states=states, data=data, dim=DIM, seed=seed, train=TRAIN), self.clicks, seed=seed
        )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, repository: Path, one_thread: None) -> Shop:
    folder = tmp_path_factory.mktemp("example")
    catalogue = write_catalogue(folder, ds="2026-11-20")
    interactions = write_interactions(folder / "interactions.parquet", catalogue)
    items, template = read_good_items(catalogue), load_settings(repository / "marc.yaml").catalogue.template
    texts = [template.format_map(item._asdict()) for item in items]
    write_states(texts, folder / "states.npy", train=TRAIN, encode=EncodeSettings(threads=1), resources=TaskResources())
    settings = InteractionSettings(uri=str(interactions))
    rows = read_all(Storage(), settings, [item.item_id for item in items])
    return Shop(rows, len(items), folder / "states.npy")


def test_marc_beats_the_best_pca_and_pca_beats_random_vectors_also_on_rare_items(shop: Shop) -> None:
    random = shop.score("random")
    pcas = [shop.score(f"pca-layer-{layer}", layer) for layer in range(LAYERS + 1)]
    marc = [shop.score("marc", MARC_LAYER, seed) for seed in range(2)]
    assert random.auc < 0.66
    assert min(pca.auc for pca in pcas) > random.auc + 0.02
    best = max(pca.auc for pca in pcas)
    assert best > random.auc + 0.03
    assert min(score.auc for score in marc) > best + 0.03
    assert min(score.cold_auc for score in marc) > random.cold_auc + 0.03


def test_the_gain_of_marc_is_in_the_texts(shop: Shop) -> None:
    """With the texts of other items, MARC is no better than random vectors."""
    states = np.load(shop.states)
    np.save(shop.states.with_name("shuffled.npy"), states[:, np.random.default_rng(0).permutation(shop.items)])
    shuffled = Shop(shop.interactions, shop.items, shop.states.with_name("shuffled.npy"))
    assert shuffled.score("marc", MARC_LAYER).auc < shop.score("random").auc + 0.02
