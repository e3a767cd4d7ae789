"""Whether something that was sent, perhaps more than once, may have been applied."""

from __future__ import annotations

from bus_kv.errors import BusKVError, OutcomeUnknown


class Fate:
    """Mixed into whatever is sent and may have to be sent again.

    An attempt that was given up on without an answer may still be applied, now or later. From then on no refusal is
    definite: the copy that was refused may not be the only one on its way.
    """

    unanswered = False

    @property
    def is_read(self) -> bool:
        """A read is never applied: nothing about it can be in doubt."""
        raise NotImplementedError

    def abandon(self) -> None:
        """An attempt was given up on without an answer."""
        self.unanswered = not self.is_read

    def note(self, failure: BusKVError) -> None:
        """An attempt was answered with this failure."""
        if not failure.definite:
            self.abandon()

    def verdict(self, failure: BusKVError) -> BusKVError:
        """What to tell the caller when `failure` is the end of it."""
        if not self.unanswered or not failure.definite:
            return failure
        return OutcomeUnknown(
            "an earlier attempt may have been applied; send it again with the same request_id to "
            f"learn (the last attempt: {failure.message})"
        )
