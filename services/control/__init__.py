"""The control plane: registers datasets and models, runs the stages of jobs on Ray, forwards requests to
Serve.
"""
