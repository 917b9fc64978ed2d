"""What the processes say to one another: API bodies, stage specs and results, and where things lie in storage.

A job is a chain of stages, each one Ray job that is told what to do by a spec file and answers with a marker file:

    {storage}/jobs/{job}/{stage}/a{attempt}/spec.json       written by the control plane, read by the stage
                                           /journal/*.json  append-only events and metrics, written by the stage
                                           /done.json       the stage's result, written last
                                           /failed.json     or why it could not
                                           /stopped.json    or how far it came before it was asked to stop
                                           /stop.json       that it is asked to, by the control plane (train alone reads it)
    {storage}/jobs/{job}/train/run/checkpoints/step-*/      the run's state (services/artifacts/checkpoints.py)
                                  /validation/step-*.json   what validation measured of it, and its pictures as .png
                                  /tensorboard/             event files
                                  /pairs/*.parquet          t, margin and gradient weight of every pair of every step
    {storage}/datasets/{key}/manifest.json                  latent shards; no manifest: no shards
    {storage}/datasets/{key}/ledgers/{key}/ledger-*.json    errors of a frozen model on them; no such file: no ledger
    {storage}/models/{model}.json, aliases/{name}.json      what Serve can load, written by the control plane
    {storage}/models/{model}/                               weights of an aligned model: a diffusers folder
                            /credit.json                    where its training put the credit

Imports no torch and no Ray.
"""

from __future__ import annotations

STOP, HEARD = "stop.json", "stopping.json"
"""In a train attempt's folder: a request to stop, and that a worker has heard it."""
CREDIT = "credit.json"
"""Lies beside the weights of an aligned model."""
