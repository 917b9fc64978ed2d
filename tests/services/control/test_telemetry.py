"""What /metrics says while the database is away."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from services.control.database import Database

FROM_DATABASE = {
    "dde_jobs",
    "dde_jobs_waiting",
    "dde_jobs_oldest_wait_seconds",
    "dde_training_last_step_timestamp_seconds",
    "dde_training_last_checkpoint_timestamp_seconds",
}


def samples(plane) -> dict[str, int]:
    """How many samples each metric has."""
    text = plane.http.get("/metrics").text
    return {each.name: len(each.samples) for each in text_string_to_metric_families(text)}


def test_metrics_of_the_database_have_no_values_while_it_is_away_and_others_do(plane, monkeypatch):
    plane.job()
    before = samples(plane)
    assert before.keys() >= FROM_DATABASE
    assert before["dde_jobs"] > 0

    def fail(database: Database) -> None:
        raise OperationalError("SELECT 1", {}, Exception("the server is gone"))

    monkeypatch.setattr(Database, "read", fail)
    away = samples(plane)
    assert {name: away[name] for name in FROM_DATABASE} == dict.fromkeys(FROM_DATABASE, 0)
    assert away["dde_http_requests"] > 0
    assert away["dde_part_up"] > 0
