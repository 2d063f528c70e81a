"""Draw docs/tile_walk.svg: how a program of the forward kernel walks over the similarity matrix.

python -m bench.tile_walk
"""

from pathlib import Path

INK, SOFT, OWN, NOW, MARK = "#222", "#bbb", "#cfe3ff", "#3b7dd8", "#f3b26b"
parts = []


def box(x, y, w, h, fill="none", stroke=SOFT, width=1.0):
    place = f'x="{x}" y="{y}" width="{w}" height="{h}"'
    parts.append(f'<rect {place} fill="{fill}" stroke="{stroke}" stroke-width="{width}"/>')


def text(x, y, words, anchor="middle", size=13, fill=INK, turn=0):
    spin = f' transform="rotate({turn} {x} {y})"' if turn else ""
    style = f'text-anchor="{anchor}" font-size="{size}" fill="{fill}"'
    parts.append(f'<text x="{x}" y="{y}" {style}{spin}>{words}</text>')


def arrow(x0, y0, x1, y1, color=INK):
    ends = f'x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"'
    parts.append(f'<line {ends} stroke="{color}" stroke-width="1.6" marker-end="url(#head)"/>')


def matrix(x0, y0, cell=34, n=10, owned=3, now=6):
    """Left: the matrix in tiles, one program's column of them, its results."""
    side = n * cell
    box(x0 + owned * cell, y0, cell, side, OWN, "none")
    for i in range(n):  # masked pairs lie near the diagonal, padding in the last row and column
        for j in range(n):
            if abs(i - j) == 0 or (i, j) in ((4, 5), (5, 4), (1, 2), (2, 1)) or n - 1 in (i, j):
                box(x0 + j * cell + 11, y0 + i * cell + 11, 12, 12, MARK, "none")
    box(x0 + owned * cell, y0 + now * cell, cell, cell, NOW, NOW)
    for i in range(n + 1):
        parts.append(
            f'<path d="M{x0} {y0 + i * cell}h{side}M{x0 + i * cell} {y0}v{side}" stroke="{SOFT}"/>'
        )
    box(x0, y0, side, side, "none", INK, 1.5)
    parts.append(
        f'<path d="M{x0 - 8} {y0 + 5 * cell}h{side + 16}" stroke="{INK}" stroke-dasharray="5 4"/>'
    )
    text(x0 - 14, y0 + 2.5 * cell, "split 0", size=11, turn=-90)
    text(x0 - 14, y0 + 7.5 * cell, "split 1", size=11, turn=-90)
    text(x0 - 34, y0 + side / 2, "Y: texts, streamed, 128 a tile", turn=-90)
    text(x0 + side / 2, y0 - 30, "X: videos, owned, 128 a program")
    text(x0 + (owned + 0.5) * cell, y0 - 10, "program (3, 1)", size=11, fill=NOW)
    arrow(
        x0 + (owned + 0.5) * cell,
        y0 + 5.15 * cell,
        x0 + (owned + 0.5) * cell,
        y0 + 5.95 * cell,
        NOW,
    )
    arrow(
        x0 + (owned + 0.5) * cell, y0 + 7.1 * cell, x0 + (owned + 0.5) * cell, y0 + 8.6 * cell, NOW
    )
    arrow(
        x0 + (owned + 1) * cell + 3,
        y0 + (now + 0.5) * cell,
        x0 + side + 10,
        y0 + (now + 0.5) * cell,
    )
    box(x0 + side + 14, y0 + now * cell, 12, cell, OWN, NOW)
    text(x0 + side + 32, y0 + (now + 0.4) * cell, "Σ over x: y_sums", "start", 12)
    text(x0 + side + 32, y0 + (now + 0.4) * cell + 15, "(loss only) per tile", "start", 11)
    arrow(x0 + (owned + 0.5) * cell, y0 + side + 3, x0 + (owned + 0.5) * cell, y0 + side + 24)
    box(x0 + owned * cell, y0 + side + 28, cell, 12, OWN, NOW)
    text(
        x0 + (owned + 1) * cell + 6,
        y0 + side + 39,
        "x_sums and the lanes' best two, once per program",
        "start",
        12,
    )
    box(x0 + 2, y0 + side + 62, 12, 12, MARK, "none")
    text(
        x0 + 20,
        y0 + side + 73,
        "marked: holds a masked pair or padding; only here are ids compared",
        "start",
        12,
    )


def lanes(x0, y0, cell=15, rows=16):
    """Right: one 16-row slice of the tile and the 8 lanes it folds into."""
    text(x0 + 3 * cell, y0 - 30, "e = exp(a − shift): 16 of", size=12)
    text(x0 + 3 * cell, y0 - 14, "128 rows, 6 of 128 columns", size=12)
    for r in range(rows):
        for c in range(6):
            box(
                x0 + c * cell, y0 + r * cell, cell, cell, OWN if r in (2, 10) and c == 4 else "none"
            )
        text(x0 - 8, y0 + (r + 0.75) * cell, f"y{r}", "end", 10)
    fold = x0 + 17 * cell
    text(fold + 3 * cell, y0 - 30, "8 lanes a slice, 64 a tile:", size=12)
    text(fold + 3 * cell, y0 - 14, "rows y and y + 8 share one", size=12)
    for r in range(8):
        text(fold + 6 * cell + 6, y0 + (r + 4.75) * cell, f"lane {r}", "start", 10)
        for c in range(6):
            box(
                fold + c * cell,
                y0 + (r + 4) * cell,
                cell,
                cell,
                NOW if r == 2 and c == 4 else "none",
            )
    arrow(x0 + 6 * cell + 4, y0 + 2.5 * cell, fold - 6, y0 + 6.3 * cell)
    arrow(x0 + 6 * cell + 4, y0 + 10.5 * cell, fold - 6, y0 + 6.7 * cell)
    top = y0 + rows * cell + 34
    text(x0, top, "each lane of each column keeps, in registers, from tile to tile:", "start")
    for i, name in enumerate(("Σ e", "best: bits of e | place", "second: bits of e | place")):
        box(x0 + (0, 60, 230)[i], top + 12, (50, 160, 160)[i], 24, OWN, NOW)
        text(x0 + (25, 140, 310)[i], top + 28, name, size=12)
    text(
        x0,
        top + 60,
        "after the last tile: sums are added over the lanes; the k hardest are picked",
        "start",
        12,
    )
    text(
        x0,
        top + 76,
        "from 512 lanes × 2; a lane whose second makes the list is searched again",
        "start",
        12,
    )


matrix(60, 60)
lanes(620, 75)
svg = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1110 510" '
    'font-family="Helvetica, Arial, sans-serif">'
    '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
    f'<path d="M0 0l6 3l-6 3z" fill="{INK}"/></marker></defs>'
    '<rect width="100%" height="100%" fill="white"/>' + "".join(parts) + "</svg>\n"
)
(Path(__file__).parent.parent / "docs" / "tile_walk.svg").write_text(svg)
