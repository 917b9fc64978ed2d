"""A picture grid: each prompt's pictures side by side, as those of base and aligned model in a report."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PICTURE_PX, GAP_PX, TEXT_PX, COLUMNS = 128, 8, 40, 4


def draw_grid(prompts: Sequence[str], sides: Sequence[tuple[str, Sequence[np.ndarray]]]) -> bytes:
    """PNG of a grid, four prompts across. A side is a name, which stands over the first row, and a picture for each prompt."""
    cell_width, cell_height = len(sides) * (PICTURE_PX + GAP_PX), PICTURE_PX + TEXT_PX
    rows = -(-len(prompts) // COLUMNS)
    sheet = Image.new(
        "RGB", (COLUMNS * cell_width + GAP_PX, rows * cell_height + TEXT_PX // 2 + GAP_PX), "white"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, prompt in enumerate(prompts):
        left, top = GAP_PX + i % COLUMNS * cell_width, TEXT_PX // 2 + i // COLUMNS * cell_height
        for side, (name, pictures) in enumerate(sides):
            x = left + side * (PICTURE_PX + 2)
            sheet.paste(
                Image.fromarray(pictures[i]).resize((PICTURE_PX, PICTURE_PX), Image.Resampling.NEAREST),
                (x, top),
            )
            if i < COLUMNS:
                pen.text((x, 3), name, fill="black", font=font)
        pen.multiline_text(
            (left, top + PICTURE_PX + 3), textwrap.fill(prompt, 22 * len(sides)), fill="black", font=font
        )
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()
