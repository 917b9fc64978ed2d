"""The shapes world, the embedded default: a small model, preference pairs and ground-truth scorers."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
PAIRS_FILE = Path(__file__).parent / "data" / "pairs.parquet"
FEW_PAIRS_FILE = Path(__file__).parent / "data" / "few_pairs.parquet"
"""The first rows of the pairs."""
PROMPTS_FILE = Path(__file__).parent / "data" / "prompts.txt"

SCHEME = "shapes://"
"""How a URI of a shipped file begins. Each process finds it in its own installation: clients that run
elsewhere need no path of the server."""
MODEL_URI = f"{SCHEME}model"
FEW_PAIRS_URI = f"{SCHEME}data/few_pairs.parquet"
PROMPTS_URI = f"{SCHEME}data/prompts.txt"
