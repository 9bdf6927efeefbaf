"""How all plots look: colours, sizes, and a PNG that is complete or not there; drawn without a display."""

from __future__ import annotations

import os
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tvjax.checkpoints.atomic import replacing

# Okabe and Ito's colours, told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
GREY = "#8A8A8A"
DARK = "#333333"
MARKERS = ("o", "s", "^", "D", "v", "P")
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
STYLE = {"size": 9, "title": 10, "small": 8}


def tidy(axis: Axes, grid: Literal["both", "x", "y"]) -> None:
    """A frame that stands back behind what is drawn."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=STYLE["size"], length=3)
    axis.grid(axis=grid, color="#E4E4E4", linewidth=0.8, zorder=0)
    axis.set_axisbelow(True)


def save(figure: Figure, file: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG."""
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
