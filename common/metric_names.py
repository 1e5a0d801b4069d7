"""The names of all counters, so that a name is written once and an operator finds them together.

Workers report them in `LoadReport.counters`; routers keep their own.
"""

from typing import Final

# Owner side: how leases ended.
LEASES_OPENED: Final = "leases_opened_total"
LEASES_RELEASED: Final = "leases_released_total"
LEASES_CANCELLED: Final = "leases_cancelled_total"
# The reader did not renew in time; its link was lost for longer than the grace.
LEASES_EXPIRED: Final = "leases_expired_total"
LEASES_LINK_LOST: Final = "leases_link_lost_total"
LEASES_REAPED: Final = "leases_reaped_total"
CLAIMS_REFUSED: Final = "lease_claims_refused_total"

# Reader side: how pulls failed. A lease that was lost is none of the transport's failures.
PULLS_FAILED: Final = "pulls_failed_total"
PULLS_LATE: Final = "pulls_late_total"
PULLS_LEASE_LOST: Final = "pulls_lease_lost_total"
FENCE_FAILURES: Final = "fence_failures_total"
DIGEST_MISMATCHES: Final = "digest_mismatches_total"
AGENTS_DESTROYED: Final = "agents_destroyed_total"
HANDLES_REFUSED: Final = "lease_handles_refused_total"

# Both.
WASTED_ENGINE_MS: Final = "wasted_engine_milliseconds_total"
# Counted where a move ends: its source may hear of the end by a cancel.
MOVED_IN: Final = "requests_moved_in_total"
KV_BYTES_PULLED: Final = "kv_bytes_pulled_total"

# Router.
RECOVERIES: Final = "recoveries_total"
RECOVERIES_REFUSED: Final = "recoveries_refused_total"
MOVES: Final = "moves_total"
MOVES_FAILED: Final = "moves_failed_total"
STREAMS_RESUMED: Final = "streams_resumed_total"
SLOW_CLIENTS: Final = "slow_clients_total"
RECORDS_LATE: Final = "records_late_total"
