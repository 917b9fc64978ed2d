"""Promotions: an alias such as ``name@production`` refers to one version of a model.

A promotion is a row; the newest one of an alias counts. Serve reads the alias from storage, so the next
request gets the promoted version. To roll back, promote an earlier version.
"""

from __future__ import annotations

import time

from sqlalchemy.orm import Session

from services.api.answers import ModelView
from services.api.requests import Promote
from services.artifacts import models as stored_models
from services.control import models
from services.control.database import ProjectDatabase
from services.control.tables import Model, Promotion, new_id
from services.control.views import model_view


def promote(database: ProjectDatabase, root: str, name_or_id: str, request: Promote) -> ModelView:
    """Let the model's alias refer to this version. Raises NotFound."""
    with database.write(alone=True) as session:
        row = models.find(session, name_or_id, "id")
        point(session, root, row, request.alias)
        return model_view(row, models.aliases(session, [row]).get(row.id, []))


def point(session: Session, root: str, model: Model, alias: str, job: str | None = None) -> None:
    """Record that ``name@alias`` refers to the model, here and for Serve. ``job``: whose gate it passed."""
    session.add(
        Promotion(
            id=new_id("promo"),
            created_at=time.time(),
            project=model.project,
            name=model.name,
            alias=alias,
            model=model.id,
            job=job,
        )
    )
    session.flush()
    stored_models.set_alias(root, f"{model.name}@{alias}", model.id)
