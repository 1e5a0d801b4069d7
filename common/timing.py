"""Every duration of the protocol in one place, so that a test can scale them all together.

Leases are for progress, so none of these numbers carries safety.
"""

from dataclasses import dataclass, fields
from typing import Final, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds. The defaults are those of the design; `scaled` shortens them for tests."""

    # A lease from its opening to the first renewal, from each renewal, and between renewals.
    lease_first_term_s: float = 5.0
    lease_term_s: float = 30.0
    renew_every_s: float = 5.0
    # How long an owner keeps the leases of a reader whose link is down.
    link_grace_s: float = 5.0
    # How long a worker keeps the requests of a router whose stream is down, and how long the router
    # tries to bring it up again: less, so that a request is never aborted while it is resumed.
    router_grace_s: float = 2.0
    reconnect_grace_s: float = 1.5
    # The least time that a transfer gets.
    transfer_deadline_s: float = 2.0
    heartbeat_every_s: float = 1.0
    # Of silence: no placement, and gone. The same for an engine that makes no step: `stalled`.
    suspect_after_s: float = 3.0
    dead_after_s: float = 6.0
    stalled_after_s: float = 60.0
    # A move that has not joined by then falls back to its source.
    move_deadline_s: float = 5.0
    drain_deadline_s: float = 30.0
    # How long a reader may take nothing while tokens wait for it: a client, a router.
    slow_client_s: float = 30.0
    slow_router_s: float = 10.0
    # Without progress: waiting for a worker, prefilling, handing over, decoding.
    queued_deadline_s: float = 30.0
    prefill_deadline_s: float = 300.0
    handover_deadline_s: float = 300.0
    decode_deadline_s: float = 60.0
    # Recoveries beyond each request's first one are counted against the requests of this window.
    recovery_window_s: float = 60.0

    def scaled(self, factor: float) -> Self:
        """All durations times `factor`, which is above 0."""
        assert factor > 0, "time does not stand still"
        return type(self)(**{f.name: getattr(self, f.name) * factor for f in fields(self)})


DEFAULT_TIMING: Final = Timing()
