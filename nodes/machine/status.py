"""What part a replica has at the moment (DESIGN.md, "Life of a replica")."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    RESTARTED = "restarted"
    """Has a log and a past, and has not heard of a primary yet; never resumes an epoch as one (R7)."""
    PROMISED = "promised"
    """Sealed for an epoch; takes part in nothing older (R1)."""
    FOLLOWING = "following"
    """A backup or learner of the promised epoch."""
    OPENING = "opening"
    """The primary of the promised epoch; its opening entry is on its way to the disk."""
    OPENED = "opened"
    """The opening entry is durable; whether the map says ACTIVE is not known yet."""
    ACTIVE = "active"


LEADING = (Status.OPENING, Status.OPENED, Status.ACTIVE)
