"""Serve applications for the tests: one that works, one that cannot start."""

from fastapi import FastAPI
from ray import serve

api = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
@serve.ingress(api)
class Small:
    def __init__(self, args: dict) -> None:
        self._args = args

    @api.get("/healthz")
    def healthz(self) -> dict:
        return self._args


def build_app(args: dict) -> serve.Application:
    return Small.bind(args)


def broken_app(args: dict) -> serve.Application:
    raise RuntimeError("storage is not there")
