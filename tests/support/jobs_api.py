"""A small server that answers as Ray's Jobs API does."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse


def jobs_api(jobs: dict[str, str], submitted: list[dict] | None = None) -> FastAPI:
    """The app. ``jobs`` is what it knows: submission id -> status; ``submitted`` gets the bodies."""
    app = FastAPI()

    @app.get("/api/version")
    def version():
        return {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}

    @app.post("/api/jobs/")
    async def submit(request: Request):
        body = await request.json()
        if submitted is not None:
            submitted.append(body)
        if body["submission_id"] in jobs:
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
