"""The methods that train on a dataset's pairs, for tests of what they share.

The others have laws of their own: `tests/core/test_transitions.py`, `tests/core/test_rollouts.py`.
"""

from __future__ import annotations

from dde_core.methods import METHODS

OF_DATASETS = {name: method for name, method in METHODS.items() if not method.on_policy}
PREFERENCE = [name for name, method in OF_DATASETS.items() if method.has_reference]
