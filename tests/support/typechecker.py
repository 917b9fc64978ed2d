"""What checks annotations while tests run: beartype, for which an int is a float, as for mypy."""

from __future__ import annotations

from pathlib import Path

from beartype import BeartypeConf, beartype
from beartype.claw import beartype_packages
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[2]
UNCHECKED = {"dde_core.config"}
"""Its own checks refuse values of a wrong type."""

CONF = BeartypeConf(is_pep484_tower=True, claw_is_pep526=False)
typechecker = beartype(conf=CONF)


def check_calls(package: str) -> None:
    """Check every call to the package's functions, in modules that are imported after this.

    jaxtyping checks shapes, and takes ten times as long as beartype alone, which checks modules without them.
    """
    with_shapes: list[str] = []
    without: list[str] = []
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name != "__init__.py" and name not in UNCHECKED:
            (with_shapes if "from jaxtyping import" in path.read_text() else without).append(name)
    install_import_hook(with_shapes, f"{__name__}.typechecker")
    beartype_packages(without, conf=CONF)
