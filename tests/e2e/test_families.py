"""Small models of both families pass through a whole job: encode, align, measure on held-out pairs, serve."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dde_core.shapes import PAIRS_FILE, PROMPTS_FILE
from services.api.images import ImageRequest
from services.api.requests import AlignmentJobCreate
from services.client.api import Client
from services.storage import files
from tests.support.pairs_file import png
from tests.support.tiny_folders import FOLDERS

ROWS, HELD_OUT = 1000, 200
LORA = {"rank": 8, "targets": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]}
PREDICTION = {"sd15": "v_prediction", "sdxl": "epsilon"}
WORKERS = {"sd15": 1, "sdxl": 2}
WAYS = {
    "sd15": {"learning_rate": 1e-3, "ema_decay": 0.9, "micro_batch_size": 24},
    "sdxl": {"learning_rate": 1e-2, "lora": LORA, "gradient_checkpointing": True},
}

LOAD = """
import sys, torch, diffusers
name, folder, adapters = sys.argv[1:4]
pipeline = getattr(diffusers, name).from_pretrained(folder, dtype=torch.float32)
if adapters:
    pipeline.load_lora_weights(adapters)
pipeline("a red circle", num_inference_steps=2)
assert not [name for name in sys.modules if name.split(".")[0] in ("dde_core", "services")]
"""


def wide_pairs(path: Path) -> Path:
    """Shipped pairs with images of many widths. The center square is the shipped image."""
    table = pq.read_table(PAIRS_FILE).slice(0, ROWS)
    for column in ("jpg_0", "jpg_1"):
        images = (np.asarray(Image.open(io.BytesIO(data))) for data in table[column].to_pylist())
        wide = [
            png(np.pad(image, ((0, 0), (i % 7, i % 7), (0, 0)), mode="edge"))
            for i, image in enumerate(images)
        ]
        table = table.set_column(table.column_names.index(column), column, pa.array(wide, pa.binary()))
    pq.write_table(table, path, row_group_size=200)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("family", WAYS)
def test_a_small_model_of_each_family_aligns_end_to_end(client: Client, tmp_path: Path, family: str):
    dataset = client.create_dataset(f"wide-pairs-{family}", wide_pairs(tmp_path / "pairs.parquet").as_uri())
    folder = FOLDERS[family](tmp_path / family, prediction_type=PREDICTION[family])
    assert client.create_model(f"tiny-{family}", folder.as_uri()).family == family
    body = {
        "model": f"tiny-{family}",
        "dataset": dataset.id,
        "name": f"tiny-{family}-aligned",
        "objective": {"method": "uniform", "beta": 500.0},
        "training": {
            "steps": 30,
            "batch_size": 64,
            "checkpoint_every": 20,
            "held_out_pairs": HELD_OUT,
            **WAYS[family],
        },
        "workers": WORKERS[family],
        "evaluation": {
            "prompts_uri": PROMPTS_FILE.as_uri(),
            "num_prompts": 2,
            "scorers": [],
            "sample": {"steps": 2},
        },
    }
    job = client.wait(client.create_job(AlignmentJobCreate.model_validate_json(json.dumps(body))).id)
    assert job.status == "succeeded", job.reason
    metrics = job.result.train.metrics
    accuracy = [metrics[f"held_out_accuracy{end}"] for end in ("", "_low", "_high")]
    print(f"{family}: held-out implicit accuracy {accuracy[0]:.3f} [{accuracy[1]:.3f}, {accuracy[2]:.3f}], "
          f"{metrics['held_out_pairs']:.0f} pairs")  # fmt: skip
    assert metrics["held_out_pairs"] >= HELD_OUT
    assert accuracy[1] > 0.5

    base, aligned = client.model(f"tiny-{family}"), client.model(f"tiny-{family}-aligned")
    assert aligned.adapter_of == (base.version if family == "sdxl" else None)
    ours = files.resolve(aligned.uri)[1]
    whole, adapters = (ours, "") if family == "sd15" else (files.resolve(base.uri)[1], ours)
    pipeline = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[family]
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, pipeline, whole, adapters], capture_output=True, text=True, cwd=tmp_path
    )
    assert loaded.returncode == 0, loaded.stderr

    answers = [
        client.generate(ImageRequest(model=name, prompt="a red circle", seed=0, steps=2))
        for name in (base.name, aligned.name)
    ]
    images = [np.asarray(Image.open(io.BytesIO(answer.data[0].content))) for answer in answers]
    assert images[0].tobytes() != images[1].tobytes()
