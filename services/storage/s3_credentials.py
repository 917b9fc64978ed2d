"""Credentials of S3 that are looked up again once the store refuses them.

boto3 renews those that it knows to expire, such as a role's. It reads a key in a file once: after a rotation
every request would fail until the process is restarted. Here a refused request is sent once more with what
the environment and the files hold by then. A Secret in a file is renewed so; in a variable it cannot be.
"""

from __future__ import annotations

from typing import Any

import botocore.session
from botocore.credentials import CredentialProvider, Credentials, ReadOnlyCredentials

REFUSED = (
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
)
"""Error codes of a key that the store does not know (any more)."""
REFUSED_HEAD = ("400", "403")
"""The same of a HEAD request, whose answer has no body."""
PAUSE_S = 0.2


class CurrentCredentials(Credentials):  # type: ignore[misc]  # botocore has no types
    """What the environment and the configuration files held at the last lookup."""

    def __init__(self, found: Credentials) -> None:
        frozen = found.get_frozen_credentials()
        super().__init__(frozen.access_key, frozen.secret_key, frozen.token, method=found.method)
        self._found = found

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        return self._found.get_frozen_credentials()

    def look_up_again(self) -> bool:
        """Whether that found others."""
        before = self.get_frozen_credentials()
        found = look_up()
        if found is None or found.get_frozen_credentials() == before:
            return False
        self._found = found
        return True


class CurrentProvider(CredentialProvider):  # type: ignore[misc]
    METHOD = "dde"

    def load(self) -> CurrentCredentials | None:
        found = look_up()
        return None if found is None else CurrentCredentials(found)


def look_up() -> Credentials | None:
    """By boto3's usual chain, in a session of its own: a session reads files once."""
    return botocore.session.Session().get_credentials()


def session() -> botocore.session.Session:
    """A session whose credentials can be looked up again."""
    made = botocore.session.Session()
    made.get_component("credential_provider").insert_before("env", CurrentProvider())
    return made


def retry_refused(credentials: CurrentCredentials | None, **sent: Any) -> float | None:
    """A handler of botocore's event ``needs-retry``: the pause before the next try, None for no retry.

    A request is tried once more even if the lookup found nothing new: another thread may have found it.
    """
    if credentials is None or sent.get("response") is None:
        return None
    code = sent["response"][1].get("Error", {}).get("Code", "")
    is_head = sent["operation"].http["method"] == "HEAD"
    if code not in REFUSED and not (is_head and code in REFUSED_HEAD):
        return None
    has_new = credentials.look_up_again()
    return PAUSE_S if has_new or sent["attempts"] == 1 else None
