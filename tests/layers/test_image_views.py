"""Views of images: reproducible crops, flips and colours of the same picture."""

import random
import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from marc_pipeline.errors import UserError
from marc_pipeline.layers.image_views import VIEW_SIDE, image_views
from tiny_models import noise_image

IMAGES = [noise_image(20 + 3 * number, 60 - 4 * number, seed=number) for number in range(7)]


def halves(width: int = 32, height: int = 24) -> Image.Image:
    """Dark on the left, bright on the right."""
    image = Image.new("RGB", (width, height), (40, 60, 50))
    image.paste((190, 200, 180), (width // 2, 0, width, height))
    return image


def arrays(views: list[list[Image.Image]]) -> list[list[NDArray[np.uint8]]]:
    return [[np.asarray(image) for image in view] for view in views]


def test_views_keep_the_shape_of_the_image_and_all_differ() -> None:
    views = image_views(IMAGES, views=4, seed=0)
    assert [[image.size for image in view] for view in views] == [[image.size for image in IMAGES]] * 4
    assert {image.mode for view in views for image in view} == {"RGB"}
    seen = {image.tobytes() for image in IMAGES} | {image.tobytes() for view in views for image in view}
    assert len(seen) == 5 * len(IMAGES)


def test_views_of_a_block_equal_those_of_the_whole_sample() -> None:
    whole = image_views(IMAGES, views=3, seed=5)
    for first, last in ((0, 1), (2, 6), (4, 4)):
        assert image_views(IMAGES[first:last], views=3, seed=5, first=first) == [view[first:last] for view in whole]
    assert image_views(IMAGES, views=2, seed=5) == whole[:2]
    assert image_views(IMAGES[:1], views=1, seed=6) != [whole[0][:1]]
    assert image_views(IMAGES[:1], views=1, seed=5, first=1) != [whole[0][:1]]


def test_views_neither_use_nor_change_the_global_generators() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    found = image_views(IMAGES[:2], views=2, seed=0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # type: ignore[index]
    torch.manual_seed(2)
    assert image_views(IMAGES[:2], views=2, seed=0) == found


def test_views_are_flipped_cropped_and_coloured_within_limits() -> None:
    seen = [view[0] for view in arrays(image_views([halves()], views=200, seed=0))]
    mirrored = [int(view[:, 0].sum()) > int(view[:, -1].sum()) for view in seen]
    assert 70 < sum(mirrored) < 130
    # The edge between dark and bright, as a fraction of the width. Crops move it away from the middle.
    edges = []
    for view, mirror in zip(seen, mirrored, strict=True):
        row = (view[:, ::-1] if mirror else view)[12].astype(int).sum(axis=1)
        edges.append(np.abs(np.diff(row)).argmax() / 32)
    assert 0.1 < min(edges) < 0.4
    assert 0.55 < max(edges) < 0.9
    colours = np.array([view[12, [0, -1]].astype(int).sum(axis=0) for view in seen])
    assert (colours.std(axis=0) > 10).all()
    # Most views keep the contrast between dark and bright.
    contrasts = [abs(int(view[12, 0].sum()) - int(view[12, -1].sum())) for view in seen]
    assert np.median(contrasts) > 200


@pytest.mark.parametrize(("size", "expected"), [((1, 1), (1, 1)), ((2, 90), (2, 90)), ((3000, 1500), (1024, 512))])
def test_views_of_very_small_and_very_large_images(size: tuple[int, int], expected: tuple[int, int]) -> None:
    [[view]] = image_views([Image.new("L", size, 130)], views=1, seed=0)
    assert (view.size, view.mode) == (expected, "RGB")
    assert max(expected) <= VIEW_SIDE


def test_views_without_kornia_name_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(UserError, match=r"need kornia: install marc-pipeline\[vision\]"):
        image_views(IMAGES, views=1, seed=0)
