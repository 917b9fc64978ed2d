"""Alembic's entry: runs on the connection it is given (Database.migrate), or on DDE_DATABASE_URL from the
command line.
"""

from alembic import context
from sqlalchemy import Connection

from services.control.database import Database
from services.control.tables import Base
from services.settings import Settings


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


connection = context.config.attributes.get("connection")
if connection is not None:
    run(connection)
else:
    settings = Settings()  # type: ignore[call-arg]
    with Database.of(settings).engine.begin() as new_connection:
        run(new_connection)
