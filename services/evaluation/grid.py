"""The picture grid of a report: each prompt's picture from the base beside that from the aligned model."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PICTURE_PX, GAP_PX, TEXT_PX, COLUMNS = 128, 8, 40, 4


def draw_grid(
    prompts: Sequence[str], base: Sequence[np.ndarray], candidate: Sequence[np.ndarray], names: tuple[str, str]
) -> bytes:
    """PNG of a grid, four prompts across; ``names`` stand over the first row."""
    cell_width, cell_height = 2 * PICTURE_PX + 2 * GAP_PX, PICTURE_PX + TEXT_PX
    rows = -(-len(prompts) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * cell_width + GAP_PX, rows * cell_height + TEXT_PX // 2 + GAP_PX), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, (prompt, *pictures) in enumerate(zip(prompts, base, candidate, strict=True)):
        left, top = GAP_PX + i % COLUMNS * cell_width, TEXT_PX // 2 + i // COLUMNS * cell_height
        for side, picture in enumerate(pictures):
            x = left + side * (PICTURE_PX + 2)
            sheet.paste(Image.fromarray(picture).resize((PICTURE_PX, PICTURE_PX), Image.Resampling.NEAREST), (x, top))
            if i < COLUMNS:
                pen.text((x, 3), names[side], fill="black", font=font)
        pen.multiline_text((left, top + PICTURE_PX + 3), textwrap.fill(prompt, 44), fill="black", font=font)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()
