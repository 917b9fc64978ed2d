"""Objects in S3 and in what speaks its protocol: whole ones through boto3, ranges through pyarrow's filesystem.

boto3's uploads are checked by the server, and taken back where they fail; pyarrow's output streams complete an upload also
when an error ends them, so nothing here writes through them. Both try again for seconds. Credentials, endpoint and region
come from the environment and the files that the cloud SDKs read. URIs are ``s3://bucket/key``, with quoted names.

Raises FileNotFoundError where there is nothing, BadRequest for a URI, bucket or credentials that cannot be used, Unavailable
where the store does not answer or goes on failing; all name the URI.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import unquote

import boto3
import pyarrow as pa
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from pyarrow import fs
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError
from tenacity import (
    retry,
    retry_base,
    retry_if_exception_message,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential_jitter,
)

from services.errors import BadRequest, ServiceError, Unavailable

SCHEME = "s3://"
ATTEMPTS = 7
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 30
DELETED_AT_ONCE = 1000
"""S3's limit."""
Call = TypeVar("Call", bound=Callable[..., Any])
TRANSIENT = (
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "ExpiredToken",
    "ExpiredTokenException",
)
"""Codes of answers that may be others soon: under load, and while credentials are renewed."""
_TORN = (ResponseStreamingError, IncompleteReadError, FlexibleChecksumError, ReadTimeoutError)
_NO_ANSWER = (HTTPClientError, ConnectionError, RetriesExceededError, S3DownloadFailedError, *_TORN)


def with_retries(again: retry_base) -> Callable[[Call], Call]:
    """Try again where boto3 and pyarrow give up at once."""
    stop = stop_after_attempt(ATTEMPTS) | stop_after_delay(2 * READ_TIMEOUT_S)
    wait = wait_exponential_jitter(multiplier=0.05, max=5, jitter=0.1)
    return cast("Callable[[Call], Call]", retry(retry=again, stop=stop, wait=wait, reraise=True))


@cache
def client() -> Any:
    """boto3's client for this process; threads may share it."""
    retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
    config = Config(retries=retries, connect_timeout=CONNECT_TIMEOUT_S, read_timeout=READ_TIMEOUT_S)
    return boto3.Session().client("s3", config=config)


class S3FileSystem(fs.S3FileSystem):
    """pyarrow's, whose settings stay when it is pickled: its own way drops the retries. An empty endpoint is that of AWS."""

    def __init__(self, endpoint: str, region: str) -> None:
        self._place = (endpoint, region)
        super().__init__(
            endpoint_override=endpoint or None,
            region=region,
            retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=ATTEMPTS),
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=READ_TIMEOUT_S,
        )

    def __reduce__(self) -> tuple[type[S3FileSystem], tuple[str, str]]:
        return S3FileSystem, self._place

    def open_input_file(self, path: str) -> pa.NativeFile:
        """For random access."""
        return pa.PythonFile(_Ranges(super().open_input_file(path)), mode="r")

    def open_input_stream(
        self, path: str, compression: str | None = None, buffer_size: int | None = None
    ) -> pa.NativeFile:
        """The same, as it lies there: reading all of pyarrow's stream makes a request for every 256 KB."""
        return self.open_input_file(path)


class _Ranges(io.RawIOBase):
    """An object, read in ranges. pyarrow fails at once where the store's 503 is longer than the range: that is tried again."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    @with_retries(retry_if_exception_message(match=".*Failed to flush response stream"))
    def read(self, size: int = -1) -> bytes:
        at = self._file.tell()
        data = self._file.read_at(self._file.size() - at if size < 0 else size, at)
        self._file.seek(at + len(data))
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of the URI's bucket and the path on it."""
    bucket, key = _parts(uri)
    with _naming(uri):
        return filesystem(bucket), f"{bucket}/{key}".rstrip("/")


@cache
def filesystem(bucket: str) -> S3FileSystem:
    """pyarrow's filesystem at the endpoint and in the region of a bucket, which must be there."""
    region = client().head_bucket(Bucket=bucket).get("BucketRegion") or client().meta.region_name
    return S3FileSystem(own_endpoint(client().meta.endpoint_url), region)


def own_endpoint(url: str) -> str:
    """The endpoint, or nothing where it is the one that AWS has for a region: a bucket's may be another."""
    return "" if re.fullmatch(r"https://s3[a-z0-9.-]*\.amazonaws\.com(\.cn)?", url) else url


def exists(uri: str) -> bool:
    """Is there an object, or are there any below this name?"""
    bucket, key = _parts(uri)
    try:
        with _naming(uri):
            return bool(key) and bool(client().head_object(Bucket=bucket, Key=key))
    except FileNotFoundError:
        return next(keys(uri), None) is not None


def read(uri: str) -> bytes:
    """The whole object."""
    with _naming(uri):
        return _get(*_parts(uri))


@with_retries(retry_if_exception_type(_TORN))
def _get(bucket: str, key: str) -> bytes:
    """In one request, so of one version. boto3 tries requests again, but not an answer whose body ends early."""
    return client().get_object(Bucket=bucket, Key=key)["Body"].read()


def write(uri: str, data: bytes) -> None:
    """Make or replace the object."""
    bucket, key = _parts(uri)
    with _naming(uri):
        client().put_object(Bucket=bucket, Key=key, Body=data)


def create(uri: str, data: bytes) -> bool:
    """Make the object where there is none. Whether this made it: also where an answer was lost and the request repeated."""
    bucket, key = _parts(uri)
    with _naming(uri):
        try:
            client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") not in (
                "PreconditionFailed",
                "ConditionalRequestConflict",
            ):
                raise
            return _get(bucket, key) == data
    return True


def upload(path: Path, uri: str) -> None:
    """Make or replace the object with a file of any size."""
    bucket, key = _parts(uri)
    with _naming(uri), path.open("rb") as file:
        client().upload_fileobj(file, bucket, key)


def download(uri: str, path: Path) -> None:
    """Write the object to a file, which holds only a part of it where this raises."""
    bucket, key = _parts(uri)
    with _naming(uri), path.open("wb") as file:
        client().download_fileobj(bucket, key, file)


def copy(source: str, target: str) -> None:
    """Copy an object within the store."""
    (source_bucket, source_key), (bucket, key) = _parts(source), _parts(target)
    with _naming(source):
        client().copy({"Bucket": source_bucket, "Key": source_key}, bucket, key)


def keys(uri: str, *, recursive: bool = True) -> Iterator[str]:
    """Names below the URI, relative to it; also those that are empty or end in "/", which some tools make for folders."""
    _, prefix = _below(uri)
    found = _listed(uri, "" if recursive else "/")
    yield from (each["Key"].removeprefix(prefix) for each in found)


def bytes_below(uri: str) -> int:
    """The size of all objects below the URI together."""
    return sum(each["Size"] for each in _listed(uri))


def _listed(uri: str, delimiter: str = "") -> Iterator[dict[str, Any]]:
    """What the store lists below the URI: ``Key`` and ``Size`` of each object."""
    bucket, prefix = _below(uri)
    with _naming(uri):
        for page in (
            client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=bucket, Prefix=prefix, Delimiter=delimiter)
        ):
            yield from page.get("Contents", [])


def delete(uri: str) -> None:
    """Delete the object; nothing where there is none."""
    bucket, key = _parts(uri)
    with _naming(uri):
        client().delete_object(Bucket=bucket, Key=key)


def delete_below(uri: str) -> None:
    """Delete all objects below the URI. Raises Unavailable where some stay."""
    bucket, _ = _parts(uri)
    named = [{"Key": each["Key"]} for each in _listed(uri)]
    for first in range(0, len(named), DELETED_AT_ONCE):
        some = {"Objects": named[first : first + DELETED_AT_ONCE], "Quiet": True}
        with _naming(uri):
            left = client().delete_objects(Bucket=bucket, Delete=some).get("Errors", [])
        if left:
            why = f"{left[0].get('Key')!r}: {left[0].get('Message')}"
            raise Unavailable(f"uri {uri!r}: {len(left)} objects were not deleted; {why}", param="uri")


def _parts(uri: str) -> tuple[str, str]:
    """Bucket and key."""
    bucket, _, key = unquote(uri.removeprefix(SCHEME)).partition("/")
    if "?" in uri:
        why = "a '?' in a name is written %3F, and endpoint and region come from the environment"
        raise BadRequest(f"uri {uri!r} cannot be opened: {why}", param="uri")
    if not bucket:
        raise BadRequest(f"uri {uri!r} cannot be opened: it names no bucket", param="uri")
    return bucket, key.strip("/")


def _below(uri: str) -> tuple[str, str]:
    bucket, key = _parts(uri)
    return bucket, f"{key}/" if key else ""


@contextmanager
def _naming(uri: str) -> Iterator[None]:
    """boto3's errors as ours, with the URI."""
    try:
        yield
    except ClientError as error:
        raise _said(uri, error) from error
    except CredentialRetrievalError as error:
        raise Unavailable(
            f"uri {uri!r}: whoever gives the credentials does not answer: {error}", param="uri"
        ) from error
    except NoCredentialsError as error:
        message = (
            f"uri {uri!r} cannot be opened: no credentials; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give a role"
        )
        raise BadRequest(message, param="uri", code="no_credentials") from error
    except _NO_ANSWER as error:
        raise Unavailable(
            f"uri {uri!r}: the object store does not answer, or not with all of it: {error}", param="uri"
        ) from error
    except BotoCoreError as error:
        raise BadRequest(f"uri {uri!r} cannot be opened: {error}", param="uri") from error


def _said(uri: str, error: ClientError) -> OSError | ServiceError:
    """What an answer means that is no success."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = error.response.get("Error", {}).get("Code", "")
    if code == "NoSuchBucket" or (status == 404 and error.operation_name == "HeadBucket"):
        return BadRequest(
            f"uri {uri!r}: bucket {_parts(uri)[0]!r} does not exist", param="uri", code="no_such_bucket"
        )
    if code == "NoSuchKey" or code == "404":
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri)
    if status >= 500 or status == 429 or code in TRANSIENT:
        return Unavailable(f"uri {uri!r}: the object store goes on failing: {error}", param="uri")
    return BadRequest(f"uri {uri!r} cannot be opened: {error}", param="uri")
