"""An image grid: the images of each prompt side by side, such as those of base and aligned model in a
report."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 4
"""Prompts across."""
IMAGE_PX = 128
CAPTION_PX = 40
HEADER_PX = 20
GAP_PX = 8
SIDE_GAP_PX = 2
FONT_PX = 11
CAPTION_CHARACTERS = 22
"""Characters of a caption's line for each image above it."""

Images = Sequence[UInt8[np.ndarray, "_ _ 3"]]


def draw_grid(prompts: Sequence[str], sides: Sequence[tuple[str, Images]]) -> bytes:
    """The grid as PNG. A side is a name, drawn above the first row, and one image for each prompt."""
    cell_width = len(sides) * (IMAGE_PX + GAP_PX)
    cell_height = IMAGE_PX + CAPTION_PX
    num_rows = -(-len(prompts) // COLUMNS)
    size = (COLUMNS * cell_width + GAP_PX, num_rows * cell_height + HEADER_PX + GAP_PX)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=FONT_PX)
    for i, prompt in enumerate(prompts):
        row, column = divmod(i, COLUMNS)
        left = GAP_PX + column * cell_width
        top = HEADER_PX + row * cell_height
        for side, (name, images) in enumerate(sides):
            x = left + side * (IMAGE_PX + SIDE_GAP_PX)
            image = Image.fromarray(images[i]).resize((IMAGE_PX, IMAGE_PX), Image.Resampling.NEAREST)
            grid.paste(image, (x, top))
            if row == 0:
                draw.text((x, 3), name, fill="black", font=font)
        caption = textwrap.fill(prompt, CAPTION_CHARACTERS * len(sides))
        draw.multiline_text((left, top + IMAGE_PX + 3), caption, fill="black", font=font)
    out = io.BytesIO()
    grid.save(out, "PNG")
    return out.getvalue()
