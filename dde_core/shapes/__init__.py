"""The shapes world, the embedded default: a small model, preference pairs and ground-truth scorers."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
PAIRS_FILE = Path(__file__).parent / "data" / "pairs.parquet"
PROMPTS_FILE = Path(__file__).parent / "data" / "prompts.txt"
