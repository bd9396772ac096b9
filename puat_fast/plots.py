"""Pictures of a run: grids of images with what C says of them, and curves over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from puat_fast import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 10  # images per line of a grid; longer rows go on below
CELL = 96  # pixels per image, about
FONT, CAPTION, GAP = 16, 24, 6  # pixels: size of the text, height of a caption, space between images
GREEN, RED, GRAY, BLACK = (0, 120, 0), (200, 0, 0), (90, 90, 90), (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One row of a grid.

    Args:
        label: what the images are: "real", "G(z,y)", "UAE"
        images: N x 3 x H x W, uint8, or float in [0, 1]
        captions: N texts, what C says: "7", "7->1"; None: no captions
        good: N times whether that is right: green, else red; None: gray
    """

    label: str
    images: NDArray[Any]
    captions: Sequence[str] | None = None
    good: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        """Check shapes. Raises ValueError."""
        if self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"images of {self.label!r}: shape {self.images.shape} is not N x 3 x H x W")
        for name, values in (("captions", self.captions), ("good", self.good)):
            if values is not None and len(values) != len(self.images):
                raise ValueError(f"{name} of {self.label!r}: {len(values)} for {len(self.images)} images")


def verdicts(labels: Sequence[int], predictions: Sequence[int]) -> tuple[list[str], list[bool]]:
    """Captions and colours of a row: "7" where C says what it should, "7->1" where it says 1 instead."""
    pairs = [(int(y), int(p)) for y, p in zip(labels, predictions, strict=True)]
    return [str(y) if y == p else f"{y}->{p}" for y, p in pairs], [y == p for y, p in pairs]


def save_grid(path: str | Path, rows: Sequence[ImageRow], title: str) -> None:
    """Write rows of images as a PNG, enlarged by whole pixels; column i of all rows belongs together.

    Raises ValueError where there is no image, or where images differ in size; OSError.
    """
    from PIL import Image, ImageDraw, ImageFont

    sizes = {row.images.shape[2:] for row in rows}
    columns = max((len(row.images) for row in rows), default=0)
    if not columns or len(sizes) != 1:
        raise ValueError(f"a grid needs images of one size, got {[row.images.shape for row in rows]}")
    height, width = sizes.pop()
    scale = max(1, round(CELL / max(height, width)))
    cell_w, cell_h = width * scale + GAP, height * scale + CAPTION + GAP
    font = ImageFont.load_default(size=FONT)
    left = GAP * 2 + round(max(font.getlength(row.label) for row in rows))
    top = FONT + 3 * GAP
    blocks = -(-columns // COLUMNS)
    block_h = len(rows) * cell_h + 2 * GAP
    size = (max(left + min(columns, COLUMNS) * cell_w, round(font.getlength(title)) + 2 * GAP), top + blocks * block_h)
    picture = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, GAP), title, BLACK, font)
    for r, row in enumerate(rows):
        for i, pixels in enumerate(_to_uint8(row.images)):
            block, column = divmod(i, COLUMNS)
            x, y = left + column * cell_w, top + block * block_h + r * cell_h
            if column == 0:
                draw.text((GAP, y + height * scale // 2), row.label, BLACK, font, anchor="lm")
            picture.paste(Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1)), (x, y))
            if row.captions is not None:
                colour = GRAY if row.good is None else GREEN if row.good[i] else RED
                draw.text((x + width * scale // 2, y + height * scale + 2), row.captions[i], colour, font, anchor="ma")
    with files.atomic_write(path) as temp:
        picture.save(temp, format="PNG")


def _to_uint8(images: NDArray[Any]) -> NDArray[np.uint8]:
    if images.dtype != np.uint8:
        images = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


# Panels of the curves: title, scale of the values, and (key of the row, label, colour).
_PANELS: tuple[tuple[str, float, tuple[tuple[str, str, str], ...]], ...] = (
    ("Losses of C", 1, (
        ("C/loss", "all", "black"), ("C/sup", "supervised", "tab:blue"), ("C/con", "consistency", "tab:purple"),
        ("C/fake", "D term", "tab:orange"), ("C/uae", "UAE", "tab:red"), ("C/rae", "RAE", "tab:green"),
    )),
    ("Losses of D, G, A", 1, (
        ("D/loss", "D", "tab:blue"), ("G/loss", "G", "tab:green"), ("A/loss", "A", "tab:red"),
    )),
    ("Output of D", 1, (
        ("D/real", "real", "tab:blue"), ("D/fake_g", "images of G", "tab:green"),
        ("D/fake_c", "labels of C", "tab:orange"),
    )),
    ("Training accuracy, %", 100, (
        ("C/clean_acc", "clean", "tab:blue"), ("C/uae_acc", "UAE", "tab:red"), ("C/rae_acc", "RAE", "tab:green"),
    )),
    ("Accuracy of the teacher, %", 100, (
        ("val_clean_acc", "validation clean", "tab:blue"), ("val_robust_acc", "validation robust", "tab:green"),
        ("test_clean_acc", "test clean", "black"),
    )),
    ("Learning rate", 1, (("lr", "", "black"),)),
)  # fmt: skip


def save_curves(path: str | Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Write the curves of a run as a PNG, from the rows of its metrics.jsonl; what the rows lack is left out.

    Raises OSError.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: no window, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    stages = [row.get("stage") for row in metrics]
    boundary = stages.index(2) + 0.5 if 2 in stages[1:] and stages[0] == 1 else None
    marker = "." if len(metrics) < 30 else ""
    for axes, (title, scale, lines) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        axes.set_title(title)
        for key, label, colour in lines:
            points = [(i, scale * row[key]) for i, row in enumerate(metrics, 1) if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker)
        _finish(axes, len(metrics), boundary)
    with files.atomic_write(path) as temp:
        canvas.print_figure(temp, format="png", dpi=100)


def _finish(axes: Axes, epochs: int, boundary: float | None) -> None:
    from matplotlib.ticker import MaxNLocator

    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
    elif not axes.lines:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color="gray")
    if boundary is not None:
        axes.axvline(boundary, color="gray", linestyle=":")
        axes.annotate("stage 2", (boundary, 1), (3, -3), xycoords=("data", "axes fraction"),
                      textcoords="offset points", va="top", fontsize="small", color="gray")  # fmt: skip
    axes.set_xlabel("epoch, both stages")
    axes.set_xlim(0.5, max(epochs, 1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
