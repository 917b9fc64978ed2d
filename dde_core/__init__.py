"""Preference alignment of diffusion models by Denoised Distribution Estimation: the algorithm, without Ray or HTTP."""
