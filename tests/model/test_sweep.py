"""The sweep: any dealing of blocks to parts gives what everything at once gives; bad inputs cost only themselves."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from test_measured import curvature_by_hand, entropy_by_hand
from tiny_models import (
    ARCHITECTURES,
    CPU_FLOAT32,
    LAYERS,
    MAX_TOKENS,
    ONE_CORE,
    TEXTS,
    WIDTH,
    hidden_state_index,
    save_tiny_backbone,
    save_tiny_vision_backbone,
)
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer

from pipeline.config import EncodeSettings, LayerSettings, TrainSettings
from pipeline.errors import UserError
from pipeline.model import encoder, sweep
from pipeline.model.backbone import load_backbone
from pipeline.model.entropy import dataset_entropy, effective_rank, spectrum, unit_rows
from pipeline.model.images import image_views, load_processor, read_image
from pipeline.model.invariance import dime, infonce, lidar
from pipeline.model.measured import weights_bytes
from pipeline.model.sweep import INPUT, SAMPLE, SweepFacts, SweepPart, merge_parts, run_part
from pipeline.model.tokens import token_ids
from pipeline.model.views import text_views
from pipeline.storage import Storage

SETTINGS = LayerSettings(sample=100, views=3, probability=0.5, block=8, order=1.0, temperature=0.2, seed=3)
SOME = TEXTS[:21]
BOUNDS = [0, 7, 14, 21]
POISON = "poison 🎬"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    """A process keeps the model and the sample of its last part; here every part may be another's."""
    sweep._SUBJECTS.clear()
    sweep._sample.cache_clear()


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sweep")
    found = {name: save_tiny_backbone(folder / name, name) for name in ARCHITECTURES}
    return {**found, "vit": save_tiny_vision_backbone(folder / "vit")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Eleven images of many sizes and colours."""
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
    dealt: Sequence[Sequence[int]] = ((0, 1, 2),),
    *,
    bounds: Sequence[int] = BOUNDS,
    images: bool = False,
    layers: LayerSettings = SETTINGS,
    encode: EncodeSettings = CPU_FLOAT32,
) -> list[SweepPart]:
    """Parts of a sample that lies in a folder, each with the blocks that it is dealt."""
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
        for number, blocks in enumerate(dealt)
    ]


def swept(parts: Sequence[SweepPart]) -> tuple[SweepFacts, list[dict[str, float]]]:
    for part in parts:
        assert run_part(part, ONE_CORE) == part.inputs
    return merge_parts(parts)


# --- everything at once

States = list[NDArray[np.float64]]
"""Token states [t, D] of an input after 0, 1, … L blocks."""


def reader(architecture: str, backbone: str) -> Callable[[str], States]:
    """Token states of a text alone, by transformers alone."""
    model, tokenizer = AutoModel.from_pretrained(backbone).eval(), AutoTokenizer.from_pretrained(backbone)

    def read(text: str) -> States:
        ids = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            listed = model(input_ids=ids, output_hidden_states=True).hidden_states
            first = model.get_input_embeddings()(ids) if architecture == "mamba" else listed[0]
        named = [first, *(listed[hidden_state_index(architecture, kept)] for kept in range(1, LAYERS + 1))]
        return [state[0].double().numpy() for state in named]

    return read


def looker(backbone: str) -> Callable[[Image.Image], States]:
    """Token states of an image alone."""
    model, processor = AutoModel.from_pretrained(backbone).eval(), load_processor(backbone)

    def look(image: Image.Image) -> States:
        with torch.inference_mode():
            pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
            output = model(pixel_values=pixels, output_hidden_states=True)
        named = [*output.hidden_states[:LAYERS], output.last_hidden_state]
        return [state[0].double().numpy() for state in named]

    return look


def at_once(
    plain: Sequence[States],
    views: Sequence[Sequence[States]],
    blocks: Sequence[tuple[int, Sequence[int]]],
    wanted: LayerSettings,
) -> list[dict[str, float]]:
    """Figures of every layer with all states in memory.

    Args:
        plain: of every input; views: [q][inputs].
        blocks: the number of each, and its inputs.
        wanted: settings of the metrics.
    """
    found = []
    for layer in range(LAYERS + 1):
        tokens = [states[layer] for states in plain]
        pooled = torch.tensor(np.stack([one.mean(axis=0) for one in tokens]))
        seen = torch.tensor(np.stack([[states[layer].mean(axis=0) for states in view] for view in views], axis=1))
        entropies = np.array([entropy_by_hand(one, wanted.order) for one in tokens])
        lengths = np.array([len(one) for one in tokens])
        turns = np.array([curvature_by_hand(one) for one in tokens])
        raw, rows = dataset_entropy(pooled, wanted.order).item(), len(pooled)
        several = lengths > 1
        losses, joints, weights = [], [], []
        for number, places in blocks:
            a, b = seen[list(places), 0], seen[list(places), 1]
            if len(places) < 2:
                continue
            losses.append(infonce(a, b, wanted.temperature).item())
            joints.append(dime(a, b, order=wanted.order, seed=(wanted.seed, number)).item())
            weights.append(len(places))
        bounds = [math.log(n) - loss for n, loss in zip(weights, losses, strict=True)]
        found.append(
            {
                "texts": rows,
                "prompt_entropy": entropies.mean(),
                "prompt_entropy_log_rows": (entropies[several] / np.log(lengths[several])).mean(),
                "prompt_entropy_log_width": entropies.mean() / math.log(WIDTH),
                "prompt_entropy_log_least": (entropies[several] / np.log(np.minimum(lengths[several], WIDTH))).mean(),
                "curvature": turns[turns >= 0].mean(),
                "dataset_entropy": raw,
                "dataset_entropy_log_rows": raw / math.log(rows),
                "dataset_entropy_log_width": raw / math.log(WIDTH),
                "dataset_entropy_log_least": raw / math.log(min(rows, WIDTH)),
                "effective_rank": effective_rank(spectrum(pooled)).item(),
                "infonce": np.average(losses, weights=weights),
                "information_bound": np.average(bounds, weights=weights),
                "lidar": lidar(math.sqrt(WIDTH) * unit_rows(seen)).item(),
                "dime": np.average(joints, weights=weights),
            }
        )
    return found


def texts_at_once(
    architecture: str,
    backbone: str,
    texts: Sequence[str],
    *,
    without: Sequence[int] = (),
    wanted: LayerSettings = SETTINGS,
) -> list[dict[str, float]]:
    """Figures of texts but some; a view depends on the place in the whole sample."""
    read = reader(architecture, backbone)
    kept = [number for number in range(len(texts)) if number not in without]
    views = text_views(texts, views=wanted.views, seed=wanted.seed, probability=wanted.probability)
    blocks = [
        (number, [place for place, one in enumerate(kept) if start <= one < stop])
        for number, (start, stop) in enumerate(itertools.pairwise(BOUNDS))
    ]
    return at_once(
        [read(texts[number]) for number in kept],
        [[read(view[number]) for number in kept] for view in views],
        blocks,
        wanted,
    )


def assert_same(
    found: Sequence[dict[str, float]], expected: Sequence[dict[str, float]], tolerance: float = 1e-5
) -> None:
    assert len(found) == len(expected) == LAYERS + 1
    for layer, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance, nan_ok=True), layer


DEALINGS = [[[0, 1, 2]], [[2], [0, 1]], [[1], [2], [0]]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_however_dealt_give_the_figures_of_everything_at_once(
    backbones: dict[str, str], tmp_path: Path, architecture: str
) -> None:
    backbone = backbones[architecture]
    expected = texts_at_once(architecture, backbone, SOME)
    for number, dealt in enumerate(DEALINGS):
        facts, found = swept(parts_of(tmp_path / f"{number}", backbone, SOME, dealt))
        assert_same(found, expected)
        assert (facts.inputs, facts.left_out, facts.left_out_because) == (21, 0, "")
    # No layer could be taken for its neighbour.
    names = [name for name in expected[0] if name != "texts"]
    for one, other in itertools.pairwise(expected):
        assert all(abs(one[name] - other[name]) > 1e-4 for name in names)


def test_settings_of_the_metrics_reach_them(backbones: dict[str, str], tmp_path: Path) -> None:
    other = SETTINGS.model_copy(update={"views": 2, "probability": 0.9, "order": 2.0, "temperature": 0.5, "seed": 4})
    _, found = swept(parts_of(tmp_path / "other", backbones["bert"], SOME, layers=other))
    assert_same(found, texts_at_once("bert", backbones["bert"], SOME, wanted=other))
    plain = texts_at_once("bert", backbones["bert"], SOME)
    changed = {name for name in plain[2] if name not in ("texts", "curvature", "effective_rank")}
    assert {name for name in plain[2] if abs(plain[2][name] - found[2][name]) > 1e-3} == changed


def test_images_however_dealt_give_the_figures_of_everything_at_once(
    backbones: dict[str, str], pictures: list[str], tmp_path: Path
) -> None:
    look = looker(backbones["vit"])
    images = [read_image(Path(path)) for path in pictures]
    views = image_views(images, views=SETTINGS.views, seed=SETTINGS.seed)
    bounds = [0, 4, 8, 11]
    blocks = [(number, range(*bounds[number : number + 2])) for number in range(3)]
    expected = at_once([look(one) for one in images], [[look(one) for one in view] for view in views], blocks, SETTINGS)
    for number, dealt in enumerate(DEALINGS[:2]):
        parts = parts_of(tmp_path / f"{number}", backbones["vit"], pictures, dealt, bounds=bounds, images=True)
        facts, found = swept(parts)
        assert_same(found, expected)
        assert (facts.layers, facts.width, facts.max_tokens, facts.left_out) == (LAYERS, WIDTH, 0, 0)


def test_facts_say_how_the_model_was_run(backbones: dict[str, str], tmp_path: Path) -> None:
    backbone = backbones["qwen3"]
    facts, _ = swept(parts_of(tmp_path / "one", backbone, SOME, [[0], [1, 2]]))
    said = (facts.layers, facts.width, facts.max_tokens, facts.dtype, facts.device)
    assert said == (LAYERS, WIDTH, MAX_TOKENS, "float32", "cpu")
    assert facts.weights_bytes == weights_bytes(load_backbone(backbone), item_bytes=4)
    assert len(facts.seconds) == LAYERS + 1
    assert all(seconds > 0 for seconds in facts.seconds)
    narrow = CPU_FLOAT32.model_copy(update={"dtype": "bfloat16"})
    rough, metrics = swept(parts_of(tmp_path / "rough", backbone, SOME, encode=narrow))
    assert (rough.dtype, [2 * size for size in rough.weights_bytes]) == ("bfloat16", facts.weights_bytes)
    assert_same(metrics, texts_at_once("qwen3", backbone, SOME), tolerance=0.2)


def test_parts_of_one_process_are_timed_each_on_its_own(backbones: dict[str, str], tmp_path: Path) -> None:
    parts = parts_of(tmp_path, backbones["bert"], SOME, [[0], [1], [2]])
    whole, _ = swept(parts)
    alone = [merge_parts([part])[0].seconds for part in parts]
    np.testing.assert_allclose(np.sum(alone, axis=0), whole.seconds)
    # The model that the process kept went on counting.
    subject = sweep._subject(parts[0], ONE_CORE)
    np.testing.assert_allclose(subject.measured.seconds(), whole.seconds)


# --- killed and started again


def test_a_part_that_lies_there_is_not_computed_again(
    backbones: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(tmp_path, backbones["llama"], SOME, [[0], [1, 2]])
    run_part(parts[0], ONE_CORE)
    written = Path(parts[0].file).read_bytes()
    loaded: list[str] = []
    run = sweep.Texts.run

    def counted(subject: Any, inputs: Sequence[str], first: int) -> Any:
        loaded.extend(inputs)
        return run(subject, inputs, first)

    monkeypatch.setattr(sweep.Texts, "run", counted)
    _, found = swept(parts)
    assert loaded == SOME[7:]
    assert Path(parts[0].file).read_bytes() == written
    monkeypatch.setattr(sweep, "_subject", None)
    assert [run_part(part, ONE_CORE) for part in parts] == [7, 14], "no model is loaded either"
    assert_same(found, texts_at_once("llama", backbones["llama"], SOME))


def test_a_part_that_dies_leaves_nothing_behind(
    backbones: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(tmp_path, backbones["bert"], SOME, [[0, 1, 2]])

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "save_file", dies)
        with pytest.raises(KeyboardInterrupt):
            run_part(parts[0], ONE_CORE)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [SAMPLE]
    assert_same(swept(parts)[1], texts_at_once("bert", backbones["bert"], SOME))


# --- inputs that cannot be run


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that fails on what begins like poison."""

    def fails(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if any(text.startswith(POISON) for text in texts):
            raise ValueError("no token for this")
        return token_ids(tokenizer, texts)

    monkeypatch.setattr(encoder, "token_ids", fails)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("architecture", ["bert", "mamba"])
def test_a_text_that_cannot_be_encoded_is_left_out_with_its_views(
    backbones: dict[str, str], tmp_path: Path, architecture: str
) -> None:
    texts = [*SOME]
    texts[3], texts[16] = f"{POISON} {texts[3]}", f"{POISON} {texts[16]}"
    facts, found = swept(parts_of(tmp_path, backbones[architecture], texts, [[0], [1, 2]]))
    assert_same(found, texts_at_once(architecture, backbones[architecture], texts, without=[3, 16]))
    assert (facts.inputs, facts.left_out) == (21, 2)
    assert "ValueError: no token for this" in facts.left_out_because


def test_a_text_of_which_only_a_view_fails_is_left_out_as_well(
    backbones: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = text_views(SOME, views=SETTINGS.views, seed=SETTINGS.seed, probability=SETTINGS.probability)
    bad = views[1][9]
    assert bad not in SOME

    def fails(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if bad in texts:
            raise ValueError("no token for this")
        return token_ids(tokenizer, texts)

    monkeypatch.setattr(encoder, "token_ids", fails)
    facts, found = swept(parts_of(tmp_path, backbones["bert"], SOME))
    assert_same(found, texts_at_once("bert", backbones["bert"], SOME, without=[9]))
    assert facts.left_out == 1


@pytest.mark.usefixtures("poison")
def test_where_nothing_can_be_encoded_it_is_no_matter_of_single_texts(
    backbones: dict[str, str], tmp_path: Path
) -> None:
    good = SOME[:7]
    bad = [f"{POISON} {text}" for text in good]
    parts = parts_of(tmp_path, backbones["bert"], bad, [[0]], bounds=[0, 7])
    with pytest.raises(UserError, match=r"none of 7 texts can be run; the first: .*no token for this"):
        swept(parts)
    # A block of nothing else among others costs only itself.
    facts, found = swept(parts_of(tmp_path / "more", backbones["bert"], [*bad, *good], [[0], [1]], bounds=[0, 7, 14]))
    alone = swept(parts_of(tmp_path / "alone", backbones["bert"], good, [[0]], bounds=[0, 7]))[1]
    assert (facts.inputs, facts.left_out) == (14, 7)
    assert found[1]["dataset_entropy"] == pytest.approx(alone[1]["dataset_entropy"], abs=1e-5)


def test_parts_that_were_computed_in_different_ways_are_refused(backbones: dict[str, str], tmp_path: Path) -> None:
    """Two workers, of which one multiplies in bfloat16, or a sweep that goes on on another machine."""
    parts = parts_of(tmp_path, backbones["bert"], SOME, [[0], [1]], bounds=[0, 4, 7])
    run_part(parts[0], ONE_CORE)
    other = replace(parts[1], encode=parts[1].encode.model_copy(update={"dtype": "bfloat16"}))
    run_part(other, ONE_CORE)
    with pytest.raises(UserError, match=r"bfloat16 on cpu and float32 on cpu: set encode\.dtype"):
        merge_parts(parts)


def test_a_broken_image_is_left_out_with_its_views(
    backbones: dict[str, str], pictures: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(pictures[0]).read_bytes()[:200])
    inputs = [*pictures[:5], str(broken), *pictures[6:]]
    bounds = [0, 4, 8, 11]
    parts = parts_of(tmp_path / "sweep", backbones["vit"], inputs, [[2, 0], [1]], bounds=bounds, images=True)
    facts, found = swept(parts)
    assert (facts.inputs, facts.left_out) == (11, 1)
    assert facts.left_out_because.startswith(f"{broken}: ")
    look, kept = looker(backbones["vit"]), [number for number in range(11) if number != 5]
    images = [read_image(Path(path)) for path in pictures]
    views = image_views(images, views=SETTINGS.views, seed=SETTINGS.seed)
    expected = at_once(
        [look(images[number]) for number in kept],
        [[look(view[number]) for number in kept] for view in views],
        [(0, range(4)), (1, range(4, 7)), (2, range(7, 10))],
        SETTINGS,
    )
    assert_same(found, expected)


def test_a_block_without_a_single_image_names_the_first_file(backbones: dict[str, str], tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.txt" for number in range(3)]
    for path in paths:
        path.write_text("no image")
    (part,) = parts_of(tmp_path / "sweep", backbones["vit"], list(map(str, paths)), [[0]], bounds=[0, 3], images=True)
    with pytest.raises(UserError, match=f"none of 3 images can be run; the first: {paths[0]}: "):
        swept([part])


@pytest.mark.parametrize("architecture", ["bert", "mamba"])
def test_texts_of_any_kind_go_through(backbones: dict[str, str], tmp_path: Path, architecture: str) -> None:
    odd = [
        "",
        " ",
        "🎬👩‍👩‍👧‍👦👍🏽" * 3,
        "ǅ漢字\u0301\u200d\u202e",
        "x" * 5000,
        "river and kitchen " * 33_334,
        "\x00\ud7ff",
        ".",
    ]
    texts = [*odd, *SOME[:6]]
    facts, found = swept(parts_of(tmp_path, backbones[architecture], texts, [[0, 1]], bounds=[0, 7, 14]))
    assert (facts.inputs, facts.left_out) == (14, 0)
    for figures in found:
        assert figures["texts"] == 14
        assert all(math.isfinite(value) for value in figures.values()), figures


def test_memory_does_not_hold_what_is_done(backbones: dict[str, str], tmp_path: Path) -> None:
    (few,), (many,) = (
        parts_of(
            tmp_path / f"{count}", backbones["bert"], TEXTS[:count], [range(count // 6)], bounds=range(0, count + 1, 6)
        )
        for count in (12, 48)
    )
    run_part(few, ONE_CORE)
    run_part(many, ONE_CORE)
    assert Path(few.file).stat().st_size == pytest.approx(Path(many.file).stat().st_size, abs=200)
