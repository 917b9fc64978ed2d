"""``python -m tests.validate_k8s [--mutate] [OVERLAY ...]``: exits with 1 if anything is wrong."""

from __future__ import annotations

import argparse
import time
from collections import Counter

from tests.validate_k8s import check, mutate, schemas
from tests.validate_k8s.overlay import OVERLAYS, Overlay, build

GOAL = 0.95
"""Of all mutations. Of references, all."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutate", action="store_true", help="also try every single mistake (a minute)")
    parser.add_argument(
        "overlays", nargs="*", metavar="OVERLAY", help=f"{', '.join(OVERLAYS)}; by default all"
    )
    arguments = parser.parse_args()
    is_good = True
    for name in arguments.overlays or OVERLAYS:
        overlay = build(name)
        found = list(check.findings(overlay))
        report(overlay, found)
        is_good &= not found
        if arguments.mutate and not found:
            is_good &= report_mutations(overlay)
    return 0 if is_good else 1


def report(overlay: Overlay, found: list[str]) -> None:
    print(
        f"{overlay.name}: {len(overlay.documents)} documents, {len(list(overlay.pods()))} pod templates,",
        end=" ",
    )
    print(f"{len(found)} findings")
    for source, number in Counter(schemas.source_of(d["kind"]) for d in overlay.documents).items():
        print(
            f"  {number:3} by {source}"
            if source
            else f"  {number:3} NOT CHECKED by a schema: KUBERAY_CRDS is not set"
        )
    print("    0 applied to a cluster")
    for finding in found:
        print(f"  {finding}")
    todo = [f"{n}={v}" for n, v in overlay.config.items() if "change-me" in v]
    if todo:
        print(f"  to fill in: {', '.join(todo)}")


def report_mutations(overlay: Overlay) -> bool:
    start = time.monotonic()
    result = mutate.run(overlay)
    for what, words in mutate.WORDS.items():
        print(f"  {words}: {result.caught.get(what, 0)} of {result.made.get(what, 0)} caught")
    made, caught = sum(result.made.values()), sum(result.caught.values())
    seconds = time.monotonic() - start
    print(f"  together {caught} of {made} ({caught / made:.1%}) in {seconds:.0f} s; not caught:")
    for name in result.uncaught:
        print(f"    {name}")
    return caught / made >= GOAL and result.caught["reference"] == result.made["reference"]


if __name__ == "__main__":
    raise SystemExit(main())
