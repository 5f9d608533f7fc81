"""Curves become a PNG that shows what the rows say."""

import numpy as np
import pytest
from PIL import Image

from vaani_jax.runs.curves import plot_curves

SIZE = (1430, 792)  # 13 x 7.2 inches at 110 dots


def _pixels(path) -> np.ndarray:
    """Decodes a PNG [height, width, 3]; pillow checks its structure and checksums."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.verify()
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _rows(steps, *, ternary=True):
    rows = []
    for step in steps:
        row = {
            "step": step,
            "train/loss": 4.0 / step**0.2,
            "train/learning_rate": 1e-3 * step,
            "train/gradient_norm": 1.0 / step,
        }
        if step % 10 == 0:
            row["eval/loss"] = 4.2 / step**0.2
            if ternary:
                for i in range(3):
                    row[f"quant/sparsity/layers_{i}/attn/q_proj"] = 0.3 + 0.01 * i
                    row[f"quant/scale/layers_{i}/attn/q_proj"] = 0.02 * (i + 1)
        rows.append(row)
    return rows


def _draw(folder, rows, **options):
    path = folder / "deep" / "curves.png"
    plot_curves(rows, path, **options)
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]
    image = _pixels(path)
    assert image.shape == (SIZE[1], SIZE[0], 3)
    assert 10_000 < path.stat().st_size < 500_000
    return image


def _panel(image, row, column):
    """About one of the 2 x 3 axes, the title left out."""
    height, width = (SIZE[1] - 60) // 2, SIZE[0] // 3
    top = 60 + row * height
    return image[top : top + height, column * width : (column + 1) * width]


def _has(panel, color):
    color = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    near = np.abs(panel.astype(int) - color[None, None, :]).max(axis=-1) <= 2
    return near.sum() > 20


TRAIN, VALIDATION = "#4878a8", "#c8553d"


def test_every_panel_has_its_curve(tmp_path):
    image = _draw(tmp_path, _rows(range(1, 51)), title="a run: $no maths_")
    for row in range(2):
        for column in range(3):
            assert _has(_panel(image, row, column), TRAIN)
    for column in range(2):
        assert _has(_panel(image, 0, column), VALIDATION)
    assert not _has(_panel(image, 1, 1), VALIDATION)
    assert (image[:60] < 128).any(axis=-1).sum() > 50  # the title


def test_full_precision_says_so(tmp_path):
    image = _draw(tmp_path, _rows(range(1, 51), ternary=False))
    for column in (1, 2):
        panel = _panel(image, 1, column)
        assert not _has(panel, TRAIN)
        middle = panel[120:240, 150:350]
        assert (middle.max(axis=-1) < 100).sum() > 50  # words, in black
    assert _has(_panel(image, 1, 0), TRAIN)


def test_sparsity_band(tmp_path):
    rows = _rows(range(1, 51))
    plain = _draw(tmp_path, rows)
    image = _draw(tmp_path, rows, sparsity_band=(0.3, 0.4))
    band = "#d8e7cf"  # the band's green, three parts in ten on white
    assert _has(_panel(image, 1, 1), band)
    assert not _has(_panel(plain, 1, 1), band)
    assert not _has(_panel(image, 1, 2), band)


@pytest.mark.parametrize(
    ("event", "panels"),
    [
        ({"setting": "state", "old": 30, "new": 20}, {(0, 0), (0, 2)}),
        ({"setting": "step", "done": "skipped", "old": 1, "new": 0}, {(0, 0), (1, 0)}),
        ({"setting": "learning_rate_factor", "old": 1.0, "new": 0.7}, {(0, 2)}),
    ],
)
def test_what_the_tuner_did_is_marked(tmp_path, event, panels):
    rows = [
        {k: v for k, v in row.items() if not k.startswith("eval/")}
        for row in _rows(range(1, 51))
    ]
    image = _draw(tmp_path, rows, events=[{"step": s, **event} for s in (10, 30)])
    marked = {
        (row, column)
        for row in range(2)
        for column in range(3)
        if _has(_panel(image, row, column), VALIDATION)
    }
    assert marked == panels


def test_decisions_that_need_no_mark(tmp_path):
    event = {"step": 10, "setting": "clip_norm", "old": 1.0, "new": 2.0}
    rows = _rows(range(1, 51))
    plain = _draw(tmp_path, rows)
    np.testing.assert_array_equal(_draw(tmp_path, rows, events=[event]), plain)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        _rows([10]),
        _rows([1]),
        [{"step": 1, "train/loss": float("nan")}],
        [{"step": 1, "train/loss": 900.0}, {"step": 2, "train/loss": float("inf")}],
        [{"step": i, "quant/sparsity/layers/q[0]": 0.3} for i in (1, 2)],
    ],
    ids=["nothing", "one row", "one step", "nan", "exploded", "sparsity only"],
)
def test_little_to_draw(tmp_path, rows):
    image = _draw(tmp_path, rows)
    assert (image < 128).any(axis=-1).sum() > 500  # axes, at least
