"""``python -m services.control`` serves the API; ``... migrate`` migrates the database, before a new version
starts; ``... openapi`` prints the OpenAPI document.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable

import uvicorn
from pydantic import SecretStr

from services.control import schema
from services.control.app import build_app
from services.control.connections import LimitedConnection
from services.control.database import Database
from services.control.draining import DrainingServer
from services.control.launchers.ray_jobs import keep_modules
from services.errors import ServiceError
from services.settings import Settings

SWITCH_S = 0.001
"""How long a thread may keep the interpreter while others wait for it; Python's own 5 ms add up in requests,
which give it up at each of their statements.
"""


KEEP_ALIVE_S = 75
"""How long an idle connection stays open: longer than proxies keep theirs (60 s), which would otherwise send
a request just as it is closed.
"""


def main(arguments: list[str]) -> None:
    match arguments:
        case []:
            _with_settings(_serve)
        case ["migrate"]:
            _with_settings(_migrate)
        case ["openapi"]:
            unused = Settings(api_key=SecretStr("-"), storage_uri="file:///nowhere")
            print(json.dumps(build_app(unused).openapi(), indent=1))
        case _:
            raise SystemExit("usage: python -m services.control [migrate | openapi]")


def _with_settings(command: Callable[[Settings], None]) -> None:
    """Run a command. What is expected to fail ends it with a message, without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the access log has what is forwarded
    try:
        command(Settings())  # type: ignore[call-arg]
    except ServiceError as error:
        raise SystemExit(str(error)) from error


def _migrate(settings: Settings) -> None:
    database = Database.of(settings)
    print(schema.migrate(database))
    database.close()


def _serve(settings: Settings) -> None:
    sys.setswitchinterval(SWITCH_S)
    app = build_app(settings)
    schema.prepare(app.state.database, may_migrate=settings.migrate)
    keep_modules()
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=LimitedConnection,
        ws="none",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(max(0.0, settings.drain_s - settings.drain_notice_s)),
    )
    on_drain = app.state.reconciler.request_stop
    server = DrainingServer(config, app.state.drain, on_drain, settings.drain_notice_s)
    server.run()


if __name__ == "__main__":
    main(sys.argv[1:])
