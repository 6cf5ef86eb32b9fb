"""The sweep: any split of blocks into parts gives the metrics of the whole; unreadable inputs are left out."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer

from layer_reference import States, image_states, layer_metrics, naive_figures, tensor, text_states
from marc_pipeline.config import EncodeSettings, LayerSettings, TrainSettings
from marc_pipeline.errors import UserError
from marc_pipeline.layers import sweep
from marc_pipeline.layers.image_files import read_image
from marc_pipeline.layers.image_views import image_views
from marc_pipeline.layers.images import load_processor
from marc_pipeline.layers.measured import weights_bytes
from marc_pipeline.layers.sweep import INPUT, SAMPLE, SweepFacts, SweepPart, merge_parts, run_part
from marc_pipeline.layers.views import text_views
from marc_pipeline.model import tokens
from marc_pipeline.model.backbone import load_backbone
from marc_pipeline.model.tokens import TextTokens, text_tokens
from marc_pipeline.storage import Storage
from marc_schemas.bundle import LongTexts
from tiny_models import (
    ARCHITECTURES,
    CPU_FLOAT32,
    LAYERS,
    MAX_TOKENS,
    ONE_CORE,
    TEXTS,
    WIDTH,
    save_tiny_backbone,
    save_tiny_vision_backbone,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = LayerSettings(sample=100, views=3, probability=0.5, block=8, order=1.0, temperature=0.2, seed=3)
SOME = TEXTS[:21]
BOUNDS = [0, 7, 14, 21]
IMAGE_BOUNDS = [0, 4, 8, 11]
POISON = "poison 🎬"
Backbones = dict[str, str]
Metrics = dict[str, float]


@pytest.fixture(autouse=True)
def _empty_caches() -> None:
    """A process caches the model and the sample of its last part; the tests drop them."""
    sweep._RUNNERS.clear()
    sweep._sample.cache_clear()


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    folder = tmp_path_factory.mktemp("sweep")
    found = {name: save_tiny_backbone(folder / name, name) for name in ARCHITECTURES}
    return {**found, "vit": save_tiny_vision_backbone(folder / "vit")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Eleven images of different sizes and colours."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number in range(11):
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
        image = Image.fromarray(coarse).resize((30 + 3 * number, 60 - 2 * number), Image.Resampling.BILINEAR)
        paths.append(str(folder / f"{number:02d}.png"))
        image.save(paths[-1])
    return paths


def parts_of(
    folder: Path,
    backbone: str,
    inputs: Sequence[str],
    split: Sequence[Sequence[int]] = ((0, 1, 2),),
    *,
    bounds: Sequence[int] = BOUNDS,
    images: bool = False,
    layers: LayerSettings = SETTINGS,
    encode: EncodeSettings = CPU_FLOAT32,
) -> list[SweepPart]:
    """Write a sample to a folder, and return parts with these blocks each."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({INPUT: list(inputs)}), folder / SAMPLE)
    return [
        SweepPart(
            storage=Storage(),
            uri=str(folder),
            number=number,
            blocks=tuple((block, bounds[block], bounds[block + 1]) for block in blocks),
            train=TrainSettings(backbone=backbone, max_tokens=MAX_TOKENS),
            encode=encode,
            layers=layers,
            images=images,
        )
        for number, blocks in enumerate(split)
    ]


def swept(parts: Sequence[SweepPart]) -> tuple[SweepFacts, list[Metrics]]:
    for part in parts:
        assert run_part(part, ONE_CORE) == part.inputs
    return merge_parts(parts)


def whole_metrics(
    plain: Sequence[States],
    views: Sequence[Sequence[States]],
    bounds: Sequence[int],
    without: Sequence[int],
    wanted: LayerSettings,
) -> list[Metrics]:
    """Metrics of all inputs except ``without``; a view depends on the place in the whole sample."""
    kept = [number for number in range(len(plain)) if number not in without]
    blocks = [
        (number, [place for place, one in enumerate(kept) if start <= one < stop])
        for number, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]
    options = wanted.model_dump(include={"order", "temperature", "seed"})
    found = []
    for layer in range(LAYERS + 1):
        texts, *pooled = (
            np.stack([inputs[number][layer].mean(axis=0) for number in kept]) for inputs in (plain, *views)
        )
        figures = naive_figures([plain[number][layer] for number in kept], wanted.order)
        found.append(
            layer_metrics(tensor(texts), np.array(figures), tensor(np.stack(pooled, axis=1)), blocks, **options)
        )
    return found


def text_metrics(
    architecture: str,
    backbone: str,
    texts: Sequence[str],
    *,
    without: Sequence[int] = (),
    wanted: LayerSettings = SETTINGS,
) -> list[Metrics]:
    """Metrics of texts, from token states by transformers alone."""
    model, tokenizer = AutoModel.from_pretrained(backbone).eval(), AutoTokenizer.from_pretrained(backbone)

    def read(text: str) -> States:
        ids = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")["input_ids"]
        return text_states(architecture, model, ids)

    views = text_views(texts, views=wanted.views, seed=wanted.seed, probability=wanted.probability)
    plain, *states = ([read(text) for text in view] for view in (texts, *views))
    return whole_metrics(plain, states, BOUNDS, without, wanted)


def image_metrics(backbone: str, pictures: Sequence[str], *, without: Sequence[int] = ()) -> list[Metrics]:
    """Metrics of images, from token states by transformers alone."""
    model, processor = AutoModel.from_pretrained(backbone).eval(), load_processor(backbone)
    images = [read_image(Path(path)) for path in pictures]
    views = image_views(images, views=SETTINGS.views, seed=SETTINGS.seed)
    plain, *states = (
        [image_states(model, processor(images=[image], return_tensors="pt")["pixel_values"]) for image in view]
        for view in (images, *views)
    )
    return whole_metrics(plain, states, IMAGE_BOUNDS, without, SETTINGS)


def assert_same(found: Sequence[Metrics], expected: Sequence[Metrics], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected) == LAYERS + 1
    for layer, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance, nan_ok=True), layer


SPLITS = [[[0, 1, 2]], [[2], [0, 1]], [[1], [2], [0]]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_split_of_texts_gives_the_metrics_of_the_whole(
    backbones: Backbones, tmp_path: Path, architecture: str
) -> None:
    backbone = backbones[architecture]
    expected = text_metrics(architecture, backbone, SOME)
    for number, split in enumerate(SPLITS):
        facts, found = swept(parts_of(tmp_path / f"{number}", backbone, SOME, split))
        assert_same(found, expected)
        assert (facts.inputs, facts.left_out, facts.left_out_because) == (21, 0, "")
    # The layers differ from one another.
    names = [name for name in expected[0] if name != "texts"]
    for one, other in itertools.pairwise(expected):
        assert all(abs(one[name] - other[name]) > 1e-4 for name in names)


def test_the_metrics_use_their_settings(backbones: Backbones, tmp_path: Path) -> None:
    other = SETTINGS.model_copy(update={"views": 2, "probability": 0.9, "order": 2.0, "temperature": 0.5, "seed": 4})
    _, found = swept(parts_of(tmp_path / "other", backbones["bert"], SOME, layers=other))
    assert_same(found, text_metrics("bert", backbones["bert"], SOME, wanted=other))
    plain = text_metrics("bert", backbones["bert"], SOME)
    changed = {name for name in plain[2] if name not in ("texts", "curvature", "effective_rank")}
    assert {name for name in plain[2] if abs(plain[2][name] - found[2][name]) > 1e-3} == changed


def test_every_split_of_images_gives_the_metrics_of_the_whole(
    backbones: Backbones, pictures: list[str], tmp_path: Path
) -> None:
    expected = image_metrics(backbones["vit"], pictures)
    for number, split in enumerate(SPLITS[:2]):
        parts = parts_of(tmp_path / f"{number}", backbones["vit"], pictures, split, bounds=IMAGE_BOUNDS, images=True)
        facts, found = swept(parts)
        assert_same(found, expected)
        assert (facts.layers, facts.width, facts.max_tokens, facts.left_out) == (LAYERS, WIDTH, 0, 0)


def test_facts_describe_how_the_model_ran(backbones: Backbones, tmp_path: Path) -> None:
    backbone = backbones["qwen3"]
    facts, _ = swept(parts_of(tmp_path / "one", backbone, SOME, [[0], [1, 2]]))
    expected = (LAYERS, WIDTH, MAX_TOKENS, "float32", "cpu")
    assert (facts.layers, facts.width, facts.max_tokens, facts.dtype, facts.device) == expected
    assert facts.weights_bytes == weights_bytes(load_backbone(backbone), item_bytes=4)
    assert len(facts.seconds) == LAYERS + 1
    assert all(seconds > 0 for seconds in facts.seconds)
    narrow = CPU_FLOAT32.model_copy(update={"dtype": "bfloat16"})
    rough, metrics = swept(parts_of(tmp_path / "rough", backbone, SOME, encode=narrow))
    assert (rough.dtype, [2 * size for size in rough.weights_bytes]) == ("bfloat16", facts.weights_bytes)
    assert_same(metrics, text_metrics("qwen3", backbone, SOME), tolerance=0.2)


def test_each_part_has_its_own_seconds(backbones: Backbones, tmp_path: Path) -> None:
    parts = parts_of(tmp_path, backbones["bert"], SOME, [[0], [1], [2]])
    whole, _ = swept(parts)
    alone = [merge_parts([part])[0].seconds for part in parts]
    np.testing.assert_allclose(np.sum(alone, axis=0), whole.seconds)
    # The cached model has added up the seconds of all parts.
    runner = sweep._runner(parts[0], ONE_CORE)
    np.testing.assert_allclose(runner.measured.seconds(), whole.seconds)


def test_a_finished_part_is_not_computed_again(
    backbones: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(tmp_path, backbones["llama"], SOME, [[0], [1, 2]])
    run_part(parts[0], ONE_CORE)
    written = Path(parts[0].file).read_bytes()
    loaded: list[str] = []
    run = sweep.TextRunner.run

    def counted(runner: Any, inputs: Sequence[str], first: int) -> Any:
        loaded.extend(inputs)
        return run(runner, inputs, first)

    monkeypatch.setattr(sweep.TextRunner, "run", counted)
    _, found = swept(parts)
    assert loaded == SOME[7:]
    assert Path(parts[0].file).read_bytes() == written
    monkeypatch.setattr(sweep, "_runner", None)
    assert [run_part(part, ONE_CORE) for part in parts] == [7, 14], "no model is loaded"
    assert_same(found, text_metrics("llama", backbones["llama"], SOME))


def test_a_killed_part_leaves_no_file(backbones: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(tmp_path, backbones["bert"], SOME, [[0, 1, 2]])

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "save_file", dies)
        with pytest.raises(KeyboardInterrupt):
            run_part(parts[0], ONE_CORE)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [SAMPLE]
    assert_same(swept(parts)[1], text_metrics("bert", backbones["bert"], SOME))


def fail_on(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    """Make the tokenizer fail on texts that start with ``bad``."""

    def fails(tokenizer: Tokenizer, texts: Sequence[str], long_texts: LongTexts = "cut") -> list[TextTokens]:
        if any(text.startswith(bad) for text in texts):
            raise ValueError("no token for this")
        return text_tokens(tokenizer, texts, long_texts)

    monkeypatch.setattr(tokens, "text_tokens", fails)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on(monkeypatch, POISON)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("architecture", ["bert", "mamba"])
def test_a_text_that_cannot_be_encoded_is_left_out_with_its_views(
    backbones: Backbones, tmp_path: Path, architecture: str
) -> None:
    texts = [*SOME]
    texts[3], texts[16] = f"{POISON} {texts[3]}", f"{POISON} {texts[16]}"
    facts, found = swept(parts_of(tmp_path, backbones[architecture], texts, [[0], [1, 2]]))
    assert_same(found, text_metrics(architecture, backbones[architecture], texts, without=[3, 16]))
    assert (facts.inputs, facts.left_out) == (21, 2)
    assert "ValueError: no token for this" in facts.left_out_because


def test_a_text_with_a_failing_view_is_left_out(
    backbones: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = text_views(SOME, views=SETTINGS.views, seed=SETTINGS.seed, probability=SETTINGS.probability)
    bad = views[1][9]
    assert not any(text.startswith(bad) for text in (*SOME, *views[0], *views[2], *views[1][:9], *views[1][10:]))
    fail_on(monkeypatch, bad)
    facts, found = swept(parts_of(tmp_path, backbones["bert"], SOME))
    assert_same(found, text_metrics("bert", backbones["bert"], SOME, without=[9]))
    assert facts.left_out == 1


@pytest.mark.usefixtures("poison")
def test_the_sweep_fails_if_no_text_can_be_encoded(backbones: Backbones, tmp_path: Path) -> None:
    good = SOME[:7]
    bad = [f"{POISON} {text}" for text in good]
    parts = parts_of(tmp_path, backbones["bert"], bad, [[0]], bounds=[0, 7])
    with pytest.raises(UserError, match=r"none of 7 texts can be processed; first: .*no token for this"):
        swept(parts)
    # Unreadable texts do not affect other blocks.
    facts, found = swept(parts_of(tmp_path / "more", backbones["bert"], [*bad, *good], [[0], [1]], bounds=[0, 7, 14]))
    alone = swept(parts_of(tmp_path / "alone", backbones["bert"], good, [[0]], bounds=[0, 7]))[1]
    assert (facts.inputs, facts.left_out) == (14, 7)
    assert found[1]["dataset_entropy"] == pytest.approx(alone[1]["dataset_entropy"], abs=1e-5)


def test_parts_with_different_dtypes_are_refused(backbones: Backbones, tmp_path: Path) -> None:
    """For example, one of two workers computes in bfloat16, or a sweep resumes on another machine."""
    parts = parts_of(tmp_path, backbones["bert"], SOME, [[0], [1]], bounds=[0, 4, 7])
    run_part(parts[0], ONE_CORE)
    other = replace(parts[1], encode=parts[1].encode.model_copy(update={"dtype": "bfloat16"}))
    run_part(other, ONE_CORE)
    with pytest.raises(UserError, match=r"bfloat16 on cpu and float32 on cpu: set encode\.dtype"):
        merge_parts(parts)


def test_an_unreadable_image_is_left_out_with_its_views(
    backbones: Backbones, pictures: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(pictures[0]).read_bytes()[:200])
    inputs = [*pictures[:5], str(broken), *pictures[6:]]
    parts = parts_of(tmp_path / "sweep", backbones["vit"], inputs, [[2, 0], [1]], bounds=IMAGE_BOUNDS, images=True)
    facts, found = swept(parts)
    assert (facts.inputs, facts.left_out) == (11, 1)
    assert facts.left_out_because.startswith(f"{broken}: ")
    assert_same(found, image_metrics(backbones["vit"], pictures, without=[5]))


def test_the_error_names_the_first_file_if_no_image_can_be_read(backbones: Backbones, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.txt" for number in range(3)]
    for path in paths:
        path.write_text("no image")
    (part,) = parts_of(tmp_path / "sweep", backbones["vit"], list(map(str, paths)), [[0]], bounds=[0, 3], images=True)
    with pytest.raises(UserError, match=f"none of 3 images can be processed; first: {paths[0]}: "):
        swept([part])


@pytest.mark.parametrize("architecture", ["bert", "mamba"])
def test_unusual_texts_are_processed(backbones: Backbones, tmp_path: Path, architecture: str) -> None:
    emoji, marks, long = "🎬👩‍👩‍👧‍👦👍🏽" * 3, "ǅ漢字\u0301\u200d\u202e", "river and kitchen " * 33_334
    odd = ["", " ", emoji, marks, "x" * 5000, long, "\x00\ud7ff", "."]
    texts = [*odd, *SOME[:6]]
    facts, found = swept(parts_of(tmp_path, backbones[architecture], texts, [[0, 1]], bounds=[0, 7, 14]))
    assert (facts.inputs, facts.left_out) == (14, 0)
    assert {figures["texts"] for figures in found} == {14}
    assert all(math.isfinite(value) for figures in found for value in figures.values()), found


def test_the_size_of_a_part_does_not_grow_with_its_texts(backbones: Backbones, tmp_path: Path) -> None:
    sizes = []
    for count in (12, 48):
        blocks, bounds = [range(count // 6)], range(0, count + 1, 6)
        (part,) = parts_of(tmp_path / f"{count}", backbones["bert"], TEXTS[:count], blocks, bounds=bounds)
        run_part(part, ONE_CORE)
        sizes.append(Path(part.file).stat().st_size)
    assert sizes[0] == pytest.approx(sizes[1], abs=200)
