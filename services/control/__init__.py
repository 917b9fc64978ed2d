"""The control plane: registers datasets and models, starts the stages of jobs, records what they say, fronts
Serve.
"""
