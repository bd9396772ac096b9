from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from puat_fast import plots
from puat_fast.plots import ImageRow


def images(n: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).random((n, 3, size, size), dtype=np.float32)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(-1).any())


def test_grid_shows_each_image_enlarged_by_whole_pixels(tmp_path: Path) -> None:
    flat = np.zeros((2, 3, 32, 32), np.uint8)
    flat[0, 0], flat[1, 2] = 255, 255  # a red one, a blue one
    plots.save_grid(tmp_path / "grid.png", [ImageRow(label="real", images=flat)], "title")
    picture = read(tmp_path / "grid.png")
    assert (picture == (255, 0, 0)).all(-1).sum() == 96 * 96
    assert (picture == (0, 0, 255)).all(-1).sum() == 96 * 96


def test_float_and_uint8_images_give_the_same_grid(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    for name, row in (("a", pixels), ("b", pixels / np.float32(255))):
        plots.save_grid(tmp_path / name, [ImageRow(label="real", images=row)], "")
    assert (read(tmp_path / "a") == read(tmp_path / "b")).all()


def test_captions_are_green_where_right_and_red_where_wrong(tmp_path: Path) -> None:
    captions, good = plots.verdicts([7, 7], [7, 1])
    assert (captions, good) == (["7", "7->1"], [True, False])
    black = np.zeros((1, 3, 32, 32))
    for caption, right, colour in zip(captions, good, (plots.GREEN, plots.RED), strict=True):
        row = ImageRow(label="UAE", images=black, captions=[caption], good=[right])
        plots.save_grid(tmp_path / "grid.png", [row], "")
        picture = read(tmp_path / "grid.png")
        assert has(picture, colour)
        assert has(picture, plots.GREEN) is right


def test_long_rows_go_on_below(tmp_path: Path) -> None:
    shapes = []
    for n in (1, 10, 11, 100):
        plots.save_grid(tmp_path / "grid.png", [ImageRow(label="real", images=images(n))] * 3, "t")
        shapes.append(read(tmp_path / "grid.png").shape)
    assert shapes[0][0] == shapes[1][0] < shapes[2][0] < shapes[3][0]
    assert shapes[0][1] < shapes[1][1] == shapes[2][1] == shapes[3][1] < 1200


def test_grid_of_nothing_or_of_mixed_sizes_is_refused(tmp_path: Path) -> None:
    for rows in ([], [ImageRow(label="a", images=images(0))],
                 [ImageRow(label="a", images=images(1)), ImageRow(label="b", images=images(1, 16))]):  # fmt: skip
        with pytest.raises(ValueError, match="images of one size"):
            plots.save_grid(tmp_path / "grid.png", rows, "t")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [
    {"images": np.zeros((2, 32, 32, 3))}, {"images": np.zeros((3, 32, 32))},
    {"images": np.zeros((2, 3, 8, 8)), "captions": ["1"]}, {"images": np.zeros((2, 3, 8, 8)), "good": [True]},
])  # fmt: skip
def test_rows_that_do_not_fit_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'real'"):
        ImageRow(label="real", **bad)


def rows_of_a_run() -> list[dict[str, Any]]:
    first = [{"stage": 1, "epoch": e, "lr": 0.1 * e, "C/loss": 2 / e, "C/clean_acc": 0.5} for e in (1, 2, 3)]
    second = [{"stage": 2, "epoch": e, "lr": 0.1, "C/loss": 2.0, "A/loss": None, "val_robust_acc": 0.4} for e in (1, 2)]
    return [*first, *second]


@pytest.mark.parametrize("metrics", [rows_of_a_run(), rows_of_a_run()[:1], rows_of_a_run()[3:], [{}], []])
def test_curves_cope_with_what_is_missing(tmp_path: Path, metrics: list[dict[str, Any]]) -> None:
    plots.save_curves(tmp_path / "curves.png", metrics)
    picture = read(tmp_path / "curves.png")
    assert picture.shape == (750, 1500, 3)
    assert picture.std() > 1
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_curves_draw_the_values(tmp_path: Path) -> None:
    metrics = rows_of_a_run()
    plots.save_curves(tmp_path / "a.png", metrics)
    plots.save_curves(tmp_path / "b.png", [row | {"C/loss": 1.0} for row in metrics])
    assert (read(tmp_path / "a.png") != read(tmp_path / "b.png")).any()
