"""The story's one account. A real application keeps a hash of the password and verifies that."""

from __future__ import annotations

from secrets import compare_digest

USER_ID = "50"
ROLE = "admin"


def is_right(username: object, password: object) -> bool:
    """Whether this is the story's user."""
    return (
        isinstance(username, str)
        and isinstance(password, str)
        and compare_digest(username.encode(), b"ratia")
        and compare_digest(password.encode(), b"secret")
    )
