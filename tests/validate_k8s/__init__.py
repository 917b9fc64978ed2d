"""Checks everything under k8s/ without a cluster: ``python -m tests.validate_k8s``."""
