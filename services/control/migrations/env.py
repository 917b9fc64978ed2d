"""Alembic's entry: runs on the connection it is given (Database.migrate), or on DDE_DATABASE_URL from the
command line.
"""

from alembic import context

from services.control.database import Database
from services.control.tables import Base
from services.settings import Settings


def run(connection) -> None:  # type: ignore[no-untyped-def]
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    settings = Settings()  # type: ignore[call-arg]
    with Database(settings.database_url).engine.begin() as made:
        run(made)
