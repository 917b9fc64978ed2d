"""Objects in S3 and compatible stores: whole objects through boto3, ranges through pyarrow's filesystem.

Nothing here writes through pyarrow: its output streams complete an upload even if an error ends them. The
server verifies boto3's uploads, and boto3 aborts those that fail. Both libraries retry for some seconds.
Credentials, endpoint and region come from the environment and the configuration files of the cloud SDKs.
boto3 looks refused credentials up again (s3_credentials.py), pyarrow reads the files every five minutes.
URIs are ``s3://bucket/key`` with percent-encoded names.

Raises FileNotFoundError if the object does not exist, BadRequest for an unusable URI, bucket or credentials,
and Unavailable if the store does not answer or keeps failing. All three name the URI.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
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
from services.storage import s3_credentials

SCHEME = "s3://"
ATTEMPTS = 7
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
BRIEF_ATTEMPTS = 2
BRIEF_TIMEOUT_S = 3
MAX_DELETED_PER_REQUEST = 1000
"""S3's limit."""
_brief: ContextVar[bool] = ContextVar("brief", default=False)
Call = TypeVar("Call", bound=Callable[..., Any])
TRANSIENT = (
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "ExpiredToken",
    "ExpiredTokenException",
)
"""Error codes of a store under load, or of credentials that are being renewed: a retry may succeed."""
ALREADY_EXISTS = ("PreconditionFailed", "ConditionalRequestConflict")
"""Error codes of a conditional write to an existing object."""
_INCOMPLETE = (ResponseStreamingError, IncompleteReadError, FlexibleChecksumError, ReadTimeoutError)
_NO_ANSWER = (HTTPClientError, ConnectionError, RetriesExceededError, S3DownloadFailedError, *_INCOMPLETE)


def with_retries(condition: retry_base) -> Callable[[Call], Call]:
    """Retry errors that boto3 and pyarrow do not retry themselves."""
    stop = stop_after_attempt(ATTEMPTS) | stop_after_delay(2 * READ_TIMEOUT_S)
    wait = wait_exponential_jitter(multiplier=0.05, max=5, jitter=0.1)
    return cast("Callable[[Call], Call]", retry(retry=condition, stop=stop, wait=wait, reraise=True))


@contextmanager
def briefly() -> Iterator[None]:
    """Within the block, a store that does not answer is given up after seven seconds, not minutes."""
    token = _brief.set(True)
    try:
        yield
    finally:
        _brief.reset(token)


def client() -> Any:
    """This process's boto3 client, shared by its threads. Any: boto3 has no types."""
    return _client(_brief.get())


@cache
def _client(is_brief: bool) -> Any:
    retries = {"mode": "standard", "total_max_attempts": BRIEF_ATTEMPTS if is_brief else ATTEMPTS}
    config = Config(
        retries=retries,
        connect_timeout=BRIEF_TIMEOUT_S if is_brief else CONNECT_TIMEOUT_S,
        read_timeout=BRIEF_TIMEOUT_S if is_brief else READ_TIMEOUT_S,
    )
    session = s3_credentials.session()
    made = boto3.Session(botocore_session=session).client("s3", config=config)
    retry_refused = partial(s3_credentials.retry_refused, session.get_credentials())
    made.meta.events.register_first("needs-retry.s3", retry_refused)
    return made


def forget_clients() -> None:
    """Let the next calls make clients from the environment as it is then."""
    _client.cache_clear()
    filesystem.cache_clear()


class S3FileSystem(fs.S3FileSystem):  # type: ignore[misc]  # pyarrow has no types
    """pyarrow's filesystem, whose retry settings survive pickling; pyarrow's own pickling drops them.

    An empty ``endpoint`` means AWS.
    """

    def __init__(self, endpoint: str, region: str) -> None:
        self._arguments = (endpoint, region)
        super().__init__(
            endpoint_override=endpoint or None,
            region=region,
            retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=ATTEMPTS),
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=READ_TIMEOUT_S,
        )

    def __reduce__(self) -> tuple[type[S3FileSystem], tuple[str, str]]:
        return S3FileSystem, self._arguments

    def open_input_file(self, path: str) -> pa.NativeFile:
        """A file for random access."""
        return pa.PythonFile(_Ranges(super().open_input_file(path)), mode="r")

    def open_input_stream(
        self, path: str, compression: str | None = None, buffer_size: int | None = None
    ) -> pa.NativeFile:
        """The same file, without decompression: pyarrow's own stream makes one request per 256 KB."""
        return self.open_input_file(path)


class _Ranges(io.RawIOBase):
    """An object, read in ranges.

    pyarrow does not retry a 503 whose body is longer than the requested range; ``read`` does.
    """

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position: int = self._file.seek(offset, whence)
        return position

    def tell(self) -> int:
        position: int = self._file.tell()
        return position

    @with_retries(retry_if_exception_message(match=".*Failed to flush response stream"))
    def read(self, size: int = -1) -> bytes:
        start = self.tell()
        if size < 0:
            size = self._file.size() - start
        data: bytes = self._file.read_at(size, start)
        self._file.seek(start + len(data))
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of the URI's bucket and the path on it."""
    bucket, key = parts(uri)
    with _translated_errors(uri):
        return filesystem(bucket), f"{bucket}/{key}".rstrip("/")


@cache
def filesystem(bucket: str) -> S3FileSystem:
    """pyarrow's filesystem with the endpoint and region of a bucket, which must exist."""
    region = client().head_bucket(Bucket=bucket).get("BucketRegion") or client().meta.region_name
    return S3FileSystem(own_endpoint(client().meta.endpoint_url), region)


def own_endpoint(url: str) -> str:
    """The endpoint, or "" for an endpoint of AWS: that depends on the bucket's region."""
    return "" if re.fullmatch(r"https://s3[a-z0-9.-]*\.amazonaws\.com(\.cn)?", url) else url


def exists(uri: str) -> bool:
    """Whether the object exists, or any object below the URI."""
    bucket, key = parts(uri)
    try:
        with _translated_errors(uri):
            return bool(key) and bool(client().head_object(Bucket=bucket, Key=key))
    except FileNotFoundError:
        return next(keys(uri), None) is not None


def read(uri: str) -> bytes:
    """The whole object."""
    with _translated_errors(uri):
        return _get(*parts(uri))


@with_retries(retry_if_exception_type(_INCOMPLETE))
def _get(bucket: str, key: str) -> bytes:
    """Reads one version of the object, in one request. boto3 does not retry a body that ends early."""
    data: bytes = client().get_object(Bucket=bucket, Key=key)["Body"].read()
    return data


def write(uri: str, data: bytes) -> None:
    """Create or replace the object."""
    bucket, key = parts(uri)
    with _translated_errors(uri):
        client().put_object(Bucket=bucket, Key=key, Body=data)


def create(uri: str, data: bytes) -> bool:
    """Create the object unless it exists. Returns whether it now holds ``data``, so a retry also succeeds."""
    bucket, key = parts(uri)
    with _translated_errors(uri):
        try:
            client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except ClientError as error:
            if _error_code(error) not in ALREADY_EXISTS:
                raise
            return _get(bucket, key) == data
    return True


def upload(path: Path, uri: str) -> None:
    """Create or replace the object with the contents of a file of any size."""
    bucket, key = parts(uri)
    with _translated_errors(uri), path.open("rb") as file:
        client().upload_fileobj(file, bucket, key)


def download(uri: str, path: Path) -> None:
    """Write the object to a file. An error leaves a partial file."""
    bucket, key = parts(uri)
    with _translated_errors(uri), path.open("wb") as file:
        client().download_fileobj(bucket, key, file)


def copy(source: str, target: str) -> None:
    """Copy an object within the store."""
    source_bucket, source_key = parts(source)
    bucket, key = parts(target)
    with _translated_errors(source):
        client().copy({"Bucket": source_bucket, "Key": source_key}, bucket, key)


def keys(uri: str, *, recursive: bool = True) -> Iterator[str]:
    """Names of the objects below the URI, relative to it.

    Includes empty names and names that end in "/", with which some tools mark folders.
    """
    _, prefix = _below(uri)
    delimiter = "" if recursive else "/"
    for entry in _list(uri, delimiter):
        yield entry["Key"].removeprefix(prefix)


def bytes_below(uri: str) -> int:
    """The total size of all objects below the URI."""
    return sum(entry["Size"] for entry in _list(uri))


def _list(uri: str, delimiter: str = "") -> Iterator[dict[str, Any]]:
    """``Key``, ``Size`` and more of each object below the URI."""
    bucket, prefix = _below(uri)
    with _translated_errors(uri):
        paginator = client().get_paginator("list_objects_v2")
        for page in paginator.paginate(Bucket=bucket, Prefix=prefix, Delimiter=delimiter):
            yield from page.get("Contents", [])


def delete(uri: str) -> None:
    """Delete the object if it exists."""
    bucket, key = parts(uri)
    with _translated_errors(uri):
        client().delete_object(Bucket=bucket, Key=key)


def delete_below(uri: str) -> None:
    """Delete all objects below the URI. Raises Unavailable if some could not be deleted."""
    bucket, _ = parts(uri)
    objects = [{"Key": entry["Key"]} for entry in _list(uri)]
    for start in range(0, len(objects), MAX_DELETED_PER_REQUEST):
        batch = {"Objects": objects[start : start + MAX_DELETED_PER_REQUEST], "Quiet": True}
        with _translated_errors(uri):
            errors = client().delete_objects(Bucket=bucket, Delete=batch).get("Errors", [])
        if errors:
            first = f"{errors[0].get('Key')!r}: {errors[0].get('Message')}"
            message = f"uri {uri!r}: {len(errors)} objects were not deleted; first error: {first}"
            raise Unavailable(message, param="uri")


def parts(uri: str) -> tuple[str, str]:
    """Bucket and key. Raises BadRequest."""
    bucket, _, key = unquote(uri.removeprefix(SCHEME)).partition("/")
    if "?" in uri:
        advice = "write '?' in a name as %3F; set endpoint and region in the environment"
        raise BadRequest(f"uri {uri!r} cannot be opened: {advice}", param="uri")
    if not bucket:
        raise BadRequest(f"uri {uri!r} cannot be opened: use s3://bucket/key", param="uri")
    return bucket, key.strip("/")


def _below(uri: str) -> tuple[str, str]:
    """Bucket and prefix of the objects below the URI."""
    bucket, key = parts(uri)
    return bucket, f"{key}/" if key else ""


@contextmanager
def _translated_errors(uri: str) -> Iterator[None]:
    """Raises boto3's errors as ours, with the URI."""
    try:
        yield
    except ClientError as error:
        raise _translated(uri, error) from error
    except CredentialRetrievalError as error:
        message = f"uri {uri!r}: the credential provider does not answer: {error}"
        raise Unavailable(message, param="uri") from error
    except NoCredentialsError as error:
        forget_clients()  # the next call looks for them again
        message = (
            f"uri {uri!r} cannot be opened: no credentials; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role"
        )
        raise BadRequest(message, param="uri", code="no_credentials") from error
    except _NO_ANSWER as error:
        message = f"uri {uri!r}: the object store does not answer or its answer is incomplete: {error}"
        raise Unavailable(message, param="uri") from error
    except BotoCoreError as error:
        raise BadRequest(f"uri {uri!r} cannot be opened: {error}", param="uri") from error


def _translated(uri: str, error: ClientError) -> OSError | ServiceError:
    """Our error for an error response of the store."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = _error_code(error)
    if code == "NoSuchBucket" or (status == 404 and error.operation_name == "HeadBucket"):
        message = f"uri {uri!r}: bucket {parts(uri)[0]!r} does not exist"
        return BadRequest(message, param="uri", code="no_such_bucket")
    if code in ("NoSuchKey", "404"):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri)
    if status >= 500 or status == 429 or code in TRANSIENT:
        return Unavailable(f"uri {uri!r}: the object store keeps failing: {error}", param="uri")
    return BadRequest(f"uri {uri!r} cannot be opened: {error}", param="uri")


def _error_code(error: ClientError) -> str:
    code: str = error.response.get("Error", {}).get("Code", "")
    return code
