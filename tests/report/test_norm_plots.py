"""The picture of a transport: every leaf once, each layer where it belongs, no label over another."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from tvjax.report import norm_plots
from tvjax.report.norm_plots import plot_norms

LEAVES = ("attention/query/kernel", "attention/query/bias", "attention/out/kernel", "mlp/up/kernel", "norm1/scale")


def stack(depth, name="vision/blocks", leaves=LEAVES):
    return {f"{name}/{layer}/{leaf}": 1.0 + layer for layer in range(depth) for leaf in leaves}


def both(depth):
    cross = tuple(f"cross_attention/{name}/kernel" for name in ("query", "key", "value", "relative_positions"))
    return {**stack(depth, "encoder/blocks"), **stack(depth, "decoder/blocks", (*LEAVES, *cross)), "tokens": 300.0}


REST = {"vision/embeddings/class_token": 1e-3, "vision/pre_norm/scale": 3.0, "vision/pre_norm/bias": 4.0}
MODELS = {
    "2 and 12 layers": (stack(2) | REST, stack(12) | REST),
    "12 and 48 layers": (stack(12, "blocks"), {**stack(48, "blocks"), "head/kernel": 0.0}),
    "an encoder and a decoder": (both(3), both(6)),
    "no layers": ({f"part_{i}/weight": float(i) for i in range(60)},) * 2,
    "zero": ({"blocks/0/up/kernel": 0.0}, {"blocks/0/up/kernel": 0.0, "head/kernel": 0.0}),
    "a kind of one side": ({"blocks/0/up/kernel": 1.0}, {"blocks/0/up/kernel": 1.0, "blocks/0/position_bias": 0.0}),
    "nothing": ({}, {}),
}


def drawn(monkeypatch, *sides):
    figures = []
    monkeypatch.setattr(norm_plots, "save", lambda figure, file: figures.append(figure))
    plot_norms(*sides, "unused.png")
    return figures[0]


@pytest.mark.parametrize("name", MODELS)
def test_no_label_lies_over_another_or_outside(name, monkeypatch):
    figure = drawn(monkeypatch, *MODELS[name])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for axis in figure.axes if axis.axison for text in (axis.title, *axis.texts)]
    for axis in figure.axes if name != "nothing" else ():
        for ticks in (axis.xaxis, axis.yaxis) if axis.axison else ():
            low, high = sorted(ticks.get_view_interval())
            texts += [t.label1 for t in ticks.get_major_ticks() if low <= t.get_loc() <= high]
            texts.append(ticks.label)
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts if text.get_text()]
    assert len(boxes) >= 2
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    for one, other in itertools.combinations(boxes, 2):
        across, along = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
        assert across <= 1 or along <= 1, (one, other)


def test_layers_stand_where_their_share_of_the_depth_is(monkeypatch):
    figure = drawn(monkeypatch, stack(2), stack(4))
    panel = next(axis for axis in figure.axes if axis.get_title() == "attention/query")
    source, moved = (line.get_xydata() for line in panel.lines)
    both = math.sqrt(2)  # of kernel and bias
    np.testing.assert_allclose(source, [(0.5, both), (2.5, 2 * both)])
    np.testing.assert_allclose(moved, [(layer, (layer + 1) * both) for layer in range(4)])


def test_leaves_of_no_layer_are_rows_with_their_numbers(monkeypatch):
    figure = drawn(monkeypatch, *MODELS["2 and 12 layers"])
    rows = figure.axes[-1]
    assert [label.get_text() for label in rows.get_yticklabels()] == [
        "vision/embeddings/class_token",
        "vision/pre_norm",
    ]
    assert [text.get_text() for text in rows.texts] == ["0.001 to 0.001", "5 to 5"]
    assert "20 more are not shown" in drawn(monkeypatch, *MODELS["no layers"]).axes[-1].get_title()


def test_a_png(tmp_path):
    plot_norms(stack(2), stack(3), tmp_path / "norms.png")
    with Image.open(tmp_path / "norms.png") as image:
        assert image.format == "PNG" and min(image.size) > 200
