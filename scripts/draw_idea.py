"""Draws README's picture: two towers, a site with what can be seen there, and the map between two sites.

python scripts/draw_idea.py    # writes docs/idea.svg
"""

from __future__ import annotations

from html import escape
from pathlib import Path

INK, SOFT, SOURCE, TARGET, MOVED = "#1f2933", "#7b8794", "#2f6f9f", "#2a7f62", "#b4531a"


def text(
    x: float, y: float, words: str, size: int = 15, colour: str = INK, anchor: str = "middle", more: str = ""
) -> str:
    where = f'x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" {more}'
    return f"<text {where}>{escape(words)}</text>"


def box(x: float, y: float, width: float, height: float, colour: str, strong: bool = False) -> str:
    fill, edge = (colour, 2) if strong else ("white", 1.5)
    opacity = ' fill-opacity="0.14"' if strong else ""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}"{opacity} '
        f'stroke="{colour}" stroke-width="{edge}"/>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    head = {SOFT: "soft", MOVED: "moved", SOURCE: "source", TARGET: "target"}[colour]
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="2"{dash} '
        f'marker-end="url(#{head})"/>'
    )


def tower(x: float, width: float, blocks: int, chosen: int, colour: str, title: str, task: str) -> list[str]:
    """A tower of blocks from below; one of them holds the site that the picture looks at."""
    parts = [
        text(x + width / 2, 40, title, 17, colour, more='font-weight="bold"'),
        text(x + width / 2, 61, task, 13, SOFT),
    ]
    height, gap, bottom = 40, 20, 330
    for number in range(blocks):
        y = bottom - number * (height + gap)
        strong = number == chosen
        parts.append(box(x, y, width, height, colour, strong))
        if strong:
            parts.append(text(x + width / 2, y + 25, "kernel", 14, colour, more='font-style="italic"'))
        if number:
            parts.append(arrow(x + width / 2, y + height + gap, x + width / 2, y + height + 2, SOFT))
    return parts


def site(x: float, y: float, width: float, colour: str, names: tuple[str, str, str], side: int) -> list[str]:
    """What can be seen where a parameter meets an activation: input, output, output gradient."""
    edge = x + width + 12 if side > 0 else x - 12
    anchor = "start" if side > 0 else "end"
    return [
        text(edge, y + 53, f"input {names[0]}", 14, colour, anchor),
        text(edge, y - 3, f"output {names[1]}", 14, colour, anchor),
        text(edge, y + 25, f"gradient {names[2]}", 14, colour, anchor),
    ]


def main() -> None:
    """Writes the picture."""
    source, target = (90.0, 120.0), (640.0, 170.0)
    y_source, y_target = 330 - 60, 330 - 2 * 60
    parts = [
        *tower(*source, 3, 1, SOURCE, "source", "fine-tuned: task vector τ"),
        *tower(*target, 5, 2, TARGET, "target", "newer, wider or deeper"),
        *site(source[0], y_source, source[1], SOURCE, ("x", "y", "g"), 1),
        *site(target[0], y_target, target[1], TARGET, ("x'", "y'", "g'"), -1),
        arrow(312, y_source + 10, 530, y_target + 34, MOVED),
        text(420, 200, "τ' = Pᵀ τ Q", 17, MOVED, more='font-weight="bold"'),
        text(425, 344, "the same examples run through both models:", 13, SOFT),
        text(425, 363, "P maps x to x', Q maps y to y' or g to g'", 13, SOFT),
        text(425, 382, "(orthogonal Procrustes, no training)", 13, SOFT),
    ]
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{colour}"/></marker>'
        for name, colour in (("soft", SOFT), ("moved", MOVED), ("source", SOURCE), ("target", TARGET))
    )
    picture = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 395" font-family="Helvetica, Arial, sans-serif" '
        'role="img" aria-label="A task vector is moved from a source model into a target model by maps between what '
        'their layers see."><rect width="900" height="395" fill="white"/>'
        f"<defs>{heads}</defs>" + "\n".join(parts) + "</svg>\n"
    )
    (Path(__file__).parent.parent / "docs" / "idea.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
