"""Preference alignment of diffusion models: the algorithm, without Ray or HTTP."""

__version__ = "0.1.0"
