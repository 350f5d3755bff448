"""Draws ``assets/logo.png``: a 4x4 grid with two of four cells kept in each row.

.venv/bin/python assets/build/draw_logo.py
"""

from pathlib import Path

from PIL import Image, ImageDraw

KEPT = ((0, 2), (1, 2), (0, 3), (1, 3))
CELL, GAP = 26, 6


def main() -> None:
    side = 4 * CELL + 5 * GAP
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    for row, kept in enumerate(KEPT):
        for column in range(4):
            x, y = GAP + column * (CELL + GAP), GAP + row * (CELL + GAP)
            color = "#1f6feb" if column in kept else "#c9d4e5"
            draw.rounded_rectangle((x, y, x + CELL, y + CELL), 6, fill=color)
    image.save(Path(__file__).resolve().parents[1] / "logo.png", optimize=True)


if __name__ == "__main__":
    main()
