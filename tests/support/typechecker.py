"""What checks dde_core's annotations while tests run: beartype, for which an int is a float, as for mypy."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
