"""A small server that answers as Ray's Jobs API does."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse


def jobs_api(jobs: dict[str, str], submitted: list[dict] | None = None, head: dict | None = None) -> FastAPI:
    """The app. ``jobs`` is what it knows: submission id -> status; ``submitted`` gets the bodies.

    ``head`` has the head's node id, and counts the submits of jobs that it has already.
    """
    app = FastAPI()
    head = {"id": "second", "submits": 0} if head is None else head

    @app.get("/api/v0/nodes")
    def nodes(filter_keys: str, filter_values: str):
        assert (filter_keys, filter_values) == ("is_head_node", "true")
        dead = {"node_id": "first", "state": "DEAD"}
        return {"data": {"result": {"result": [dead, {"node_id": head["id"], "state": "ALIVE"}]}}}

    @app.get("/api/version")
    def version():
        return {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}

    @app.post("/api/jobs/")
    async def submit(request: Request):
        body = await request.json()
        if submitted is not None:
            submitted.append(body)
        if body["submission_id"] in jobs:
            head["submits"] += 1
            return PlainTextResponse("ValueError: Job with submission_id already exists.", 500)
        if body["entrypoint"] == "refuse":
            return PlainTextResponse("no", 400)
        jobs[body["submission_id"]] = "PENDING"
        return {"job_id": body["submission_id"], "submission_id": body["submission_id"]}

    @app.get("/api/jobs/{name}")
    def info(name: str):
        if name == "broken":
            return PlainTextResponse("the head is gone", 500)
        if name not in jobs:
            return PlainTextResponse(f"Job {name} does not exist", 404)
        return {"type": "SUBMISSION", "submission_id": name, "status": jobs[name], "entrypoint": "x"}

    @app.post("/api/jobs/{name}/stop")
    def stop(name: str):
        if name not in jobs:
            return JSONResponse("no", 404)
        jobs[name] = "STOPPED"
        return {"stopped": True}

    @app.get("/api/jobs/{name}/logs")
    def logs(name: str):
        if name not in jobs:
            return PlainTextResponse(f"Job {name} does not exist", 404)
        return {"logs": "\n".join(f"line {i}" for i in range(100))}

    return app
