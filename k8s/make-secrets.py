#!/usr/bin/env python3
"""Make the Secrets that the manifests read, in namespace dde. Refuses to overwrite one.

    ./make-secrets.py --database-url postgresql+psycopg://USER:PASSWORD@HOST/dde
    ./make-secrets.py --local          for overlays/local: also those of its PostgreSQL and S3 server

The API key, the token of the Ray clusters and the passwords are random. The database URL comes from
--database-url or the variable DDE_DATABASE_URL. Access keys of an object store, where no cloud identity gives
access, come from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION with --object-store.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
from urllib.parse import quote, unquote, urlsplit

NAMESPACE = "dde"
KEYS = {
    "dde-control": ["api_key", "database_url"],
    "dde-ray-token": ["auth_token", "redis_password"],
    "dde-object-store": ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"],
}
"""Every Secret and its keys. ``dde-object-store`` is made with --object-store or --local."""
LOCAL_KEYS = {**KEYS, "dde-control": [*KEYS["dde-control"], "postgres_password"]}
LOCAL_DATABASE = "dde-postgres:5432"
LOCAL_ENDPOINT = "http://dde-s3:8333"


def checked(url: str) -> str:
    """The database URL. Raises ValueError, naming the part that is wrong; its password is never shown."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(
            "host or port cannot be read: percent-encode what is special in the password"
        ) from error
    if parts.scheme != "postgresql+psycopg":
        raise ValueError(f"scheme must be postgresql+psycopg, not {parts.scheme!r}")
    if not parts.hostname or parts.hostname in ("host", "localhost", "127.0.0.1"):
        raise ValueError(f"host must be one that pods can reach, not {parts.hostname!r}")
    if port == 0:
        raise ValueError("port must not be 0")
    if not parts.username or parts.username == "USER":
        raise ValueError("user is missing")
    if not parts.password or unquote(parts.password) == "PASSWORD":
        raise ValueError("password is missing")
    if not parts.path.strip("/") or "/" in parts.path.strip("/"):
        raise ValueError(f"database must be one name after the host, not {parts.path!r}")
    if parts.fragment:
        raise ValueError("'#' ends the URL: percent-encode what is special in the password")
    return url


def from_environment() -> dict[str, str]:
    """The keys of ``dde-object-store``. Raises ValueError if one of the two that are needed is not set."""
    found = {name: os.environ[name] for name in KEYS["dde-object-store"] if os.environ.get(name)}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        if name not in found:
            raise ValueError(f"--object-store: {name} is not set")
    return found


def wanted(arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The Secrets to make. Raises ValueError for a wrong argument."""
    made = {
        "dde-control": {"api_key": secrets.token_urlsafe(32)},
        "dde-ray-token": {"auth_token": secrets.token_hex(32), "redis_password": secrets.token_hex(32)},
    }
    if arguments.local:
        password = secrets.token_hex(16)
        made["dde-control"]["postgres_password"] = password
        arguments.database_url = f"postgresql+psycopg://dde:{quote(password)}@{LOCAL_DATABASE}/dde"
        made["dde-object-store"] = {
            "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "AWS_ENDPOINT_URL": LOCAL_ENDPOINT,
            "AWS_REGION": "us-east-1",
        }
    elif arguments.object_store:
        made["dde-object-store"] = from_environment()
    if not arguments.database_url:
        raise ValueError("--database-url: give it, or set DDE_DATABASE_URL")
    try:
        made["dde-control"]["database_url"] = checked(arguments.database_url)
    except ValueError as error:
        raise ValueError(f"--database-url: {error}") from error
    return made


def manifest(made: dict[str, dict[str, str]]) -> dict:
    documents = [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "stringData": values,
        }
        for name, values in made.items()
    ]
    return {"apiVersion": "v1", "kind": "List", "items": documents}


def kubectl(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = ["kubectl", "-n", NAMESPACE, *arguments]
    return subprocess.run(command, input=stdin, text=True, capture_output=True)


def existing(names: list[str]) -> list[str]:
    """Which of the Secrets exist. Raises ValueError if the cluster does not say so."""
    answer = kubectl("get", "secret", *names, "--ignore-not-found", "-o", "name")
    if answer.returncode:
        raise ValueError(answer.stderr.strip())
    return [line.removeprefix("secret/") for line in answer.stdout.split()]


def create(text: str) -> list[str]:
    """Create what the manifest lists. Raises ValueError, with nothing left, if a part is refused."""
    answer = kubectl("create", "-f", "-", "-o", "name", "--validate=false", stdin=text)
    made = answer.stdout.split()
    if answer.returncode:
        if made:
            kubectl("delete", *made)
        raise ValueError(f"nothing was made: {answer.stderr.strip()}")
    return made


def main() -> int:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--database-url", default=os.environ.get("DDE_DATABASE_URL"))
    parser.add_argument("--object-store", action="store_true", help="make dde-object-store from AWS_*")
    parser.add_argument("--local", action="store_true", help="everything for overlays/local")
    parser.add_argument("--print", action="store_true", help="print the manifest, make nothing")
    arguments = parser.parse_args()
    try:
        made = wanted(arguments)
        text = json.dumps(manifest(made), indent=2)
        if arguments.print:
            print(text)
            return 0
        there = existing(list(made))
        if there:
            raise ValueError(f"nothing was made: {', '.join(there)} exist already and may be in use")
        created = create(text)
    except ValueError as error:
        print(f"make-secrets: {error}", file=sys.stderr)
        return 1
    print("made", *created)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
