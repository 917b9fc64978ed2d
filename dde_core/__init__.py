"""Preference alignment of diffusion models by Denoised Distribution Estimation: the algorithm, without Ray or HTTP."""

__version__ = "0.1.0"
