"""PCA bundles: vectors equal an independent computation, and the version depends on all inputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, RobertaConfig

from marc_pipeline.bundles.making import fingerprint
from marc_pipeline.errors import UserError
from marc_pipeline.model.bundle import Bundle, check_bundle, open_bundle
from marc_pipeline.storage import Storage
from marc_schemas.bundle import Pooling
from tiny_models import (
    ARCHITECTURES,
    LAYERS,
    MAX_TOKENS,
    TEMPLATE,
    TEXTS,
    WIDTH,
    cosines,
    hidden_state_index,
    save_tiny_backbone,
    tiny_tokenizer,
    train_tiny_bundle,
)
from tiny_training import encoded

STORAGE = Storage()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the backbones and bundles of this module."""
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def bundle(place: Path) -> Bundle:
    return train_tiny_bundle(place, layers=2)


def independent_vectors(
    backbone: str, texts: list[str], *, layers: int, pooling: Pooling, dim: int
) -> NDArray[np.float64]:
    """Vectors up to sign, from the whole model, one text at a time, and numpy's SVD."""
    model, tokenizer = AutoModel.from_pretrained(backbone).eval(), AutoTokenizer.from_pretrained(backbone)
    place = hidden_state_index(model.config.model_type, layers)
    pooled = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[place][0].double().numpy()
        pooled.append({"mean": states.mean(axis=0), "last": states[-1], "cls": states[0]}[pooling])
    centred = np.stack(pooled) - np.mean(pooled, axis=0)
    left, _, _ = np.linalg.svd(centred, full_matrices=False)
    return np.asarray(left[:, :dim] / np.linalg.norm(left[:, :dim], axis=1, keepdims=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("layers", "pooling"), [(1, "mean"), (2, "last"), (LAYERS, "mean")])
def test_a_bundle_gives_the_vectors_of_an_independent_computation(
    place: Path, architecture: str, layers: int, pooling: Pooling
) -> None:
    bundle = train_tiny_bundle(place, architecture, layers=layers, pooling=pooling)
    found = encoded(bundle, TEXTS)
    expected = independent_vectors(bundle.card.backbone, TEXTS, layers=layers, pooling=pooling, dim=8)
    signs = np.sign((found * expected).sum(axis=0))
    assert cosines((found * signs).astype(np.float32), expected.astype(np.float32)).min() >= 0.9999


def test_new_texts_get_unit_vectors(bundle: Bundle) -> None:
    vectors = encoded(bundle, ["never seen before 🎬", "", "word " * 1000])
    assert vectors.shape == (3, 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_card_contains_the_facts_of_the_training(place: Path, bundle: Bundle) -> None:
    card = bundle.card
    assert (card.layers_kept, card.backbone_layers) == (2, LAYERS)
    assert (card.pooling, card.max_tokens, card.width, card.dim) == ("mean", MAX_TOKENS, WIDTH, 8)
    assert (card.normalised, card.template) == (True, TEMPLATE)
    facts = {"regime": "pca", "layers_from": "configuration", "texts": len(TEXTS)}
    assert card.training == {**facts, "fingerprint": fingerprint(sorted(TEXTS))}
    assert 0 < card.metrics["explained_variance"] < 1
    assert check_bundle(STORAGE, bundle) == []
    card = train_tiny_bundle(place).card
    assert card.layers_kept == card.backbone_layers == LAYERS, "by default, every layer is kept"


def test_a_new_bundle_becomes_the_current_one(tmp_path: Path) -> None:
    for layers in (1, 2, 1):
        trained = train_tiny_bundle(tmp_path, layers=layers)
        assert open_bundle(STORAGE, str(tmp_path / "bundles")) == trained


@pytest.mark.parametrize("architecture", ["bert", "llama", "qwen3"])
def test_the_same_training_has_the_same_version(place: Path, tmp_path: Path, architecture: str) -> None:
    first, second = (train_tiny_bundle(place, architecture, texts=TEXTS[:30]) for _ in range(2))
    assert first == second
    # The order of the catalogue and repeated texts have no influence.
    assert train_tiny_bundle(place, architecture, texts=TEXTS[:30][::-1] + TEXTS[:9]).version == first.version


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 3},
        {"pooling": "last"},
        {"max_tokens": 12},
        {"dim": 7},
        {"seed": 1},
        pytest.param({"texts": [*TEXTS, "one more"]}, id="texts"),
    ],
)
def test_another_training_has_another_version(place: Path, bundle: Bundle, change: dict[str, object]) -> None:
    assert train_tiny_bundle(place, **{"layers": 2, **change}).version != bundle.version  # type: ignore[arg-type]


@pytest.mark.parametrize("parameter", ["embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.bias"])
def test_one_changed_weight_of_the_backbone_gives_another_version(tmp_path: Path, parameter: str) -> None:
    first = train_tiny_bundle(tmp_path)
    path = Path(first.card.backbone) / "model.safetensors"
    weights = load_file(path)
    weights[parameter].view(-1)[0] += 0.5
    save_file(weights, path, metadata={"format": "pt"})
    assert train_tiny_bundle(tmp_path).version != first.version


def test_a_backbone_without_a_pooler_gives_the_same_version_again(tmp_path: Path) -> None:
    folder = Path(save_tiny_backbone(tmp_path / "backbone"))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    assert len(kept) == len(weights) - 2
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    first, second = (train_tiny_bundle(tmp_path, backbone=str(folder)) for _ in range(2))
    assert first.version == second.version


def test_a_bundle_contains_json_and_safetensors_but_no_pickle(bundle: Bundle) -> None:
    files = [path for path in Path(bundle.uri).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert {"bundle.json", "compressor.safetensors", "config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in files
    }
    for path in files:
        # Signatures of torch.save's zip archives, and of pickles of protocol 2 and later.
        assert path.read_bytes()[:2] not in {b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_texts_are_cut_at_the_backbones_positions(tmp_path: Path) -> None:
    trained = train_tiny_bundle(tmp_path, texts=[*TEXTS, "river " * 500], max_tokens=10_000)
    assert trained.card.max_tokens == 64
    assert np.isfinite(encoded(trained, ["river " * 500])).all()


def test_texts_are_cut_at_the_positions_of_a_roberta(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("bert")
    config = RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=34,
        pad_token_id=1,
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "backbone")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "backbone")
    trained = train_tiny_bundle(
        tmp_path, texts=[*TEXTS, "river " * 500], backbone=str(tmp_path / "backbone"), max_tokens=512
    )
    assert trained.card.max_tokens == 32


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"layers": LAYERS + 1}, "5 layers are to be kept, the backbone has 4"),
        ({"dim": WIDTH + 1}, r"train\.dim is 33, the backbone's hidden state has 32 numbers"),
        ({"texts": TEXTS[:8]}, "more than 8 distinct texts, the catalogue has 8"),
        ({"texts": TEXTS[:3] * 30}, "more than 8 distinct texts, the catalogue has 3"),
        ({"backbone": "/no/such/model"}, "cannot load backbone '/no/such/model'"),
        ({"texts": []}, "more than 8 distinct texts, the catalogue has 0"),
    ],
)
def test_an_impossible_training_is_refused_and_leaves_no_bundle(
    tmp_path: Path, train: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_tiny_bundle(tmp_path, **train)  # type: ignore[arg-type]
    assert not (tmp_path / "bundles").exists()


def test_a_fingerprint_depends_on_every_text_and_its_end() -> None:
    assert fingerprint(["a", "b"]) == fingerprint(["a", "b"])
    different = [["a", "b"], ["ab"], ["ab", ""], ["b", "a"], ["a"], []]
    assert len({fingerprint(texts) for texts in different}) == len(different)
