"""``python -m services.control`` serves the API; ``... openapi`` prints the OpenAPI document."""

from __future__ import annotations

import json
import logging
import sys

import uvicorn
from pydantic import SecretStr

from services.control.app import build_app
from services.control.connections import LimitedConnection
from services.control.launchers.ray_jobs import keep_modules
from services.settings import Settings

SWITCH_S = 0.001
"""How long a thread may keep the interpreter while others wait for it; Python's own 5 ms add up in requests,
which give it up at each of their statements.
"""


def main(arguments: list[str]) -> None:
    if arguments == ["openapi"]:
        unused = Settings(api_key=SecretStr("-"), storage_uri="file:///nowhere")
        print(json.dumps(build_app(unused).openapi(), indent=1))
    elif arguments:
        raise SystemExit("usage: python -m services.control [openapi]")
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        sys.setswitchinterval(SWITCH_S)
        settings = Settings()  # type: ignore[call-arg]
        app = build_app(settings)
        keep_modules()
        uvicorn.run(
            app,
            host=settings.host,
            port=settings.port,
            http=LimitedConnection,
            ws="none",
            access_log=False,
            timeout_graceful_shutdown=5,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
