"""The names of Baton's keys in Redis; all of a cluster share one hash tag."""


class Keys:
    """Keys of one cluster."""

    def __init__(self, cluster: str) -> None:
        self.prefix = f"{{baton:{cluster}}}:"

    def worker(self, worker_id: str) -> str:
        """Hash, TTL 3 s: what a live worker says of itself."""
        return f"{self.prefix}worker:{worker_id}"

    def epoch(self, worker_id: str) -> str:
        """String, TTL one day: the highest epoch that this worker id has had."""
        return f"{self.prefix}epoch:{worker_id}"

    @property
    def worker_pattern(self) -> str:
        # Braces are literal in a MATCH pattern.
        return f"{self.prefix}worker:*"

    @property
    def members(self) -> str:
        """Stream, capped: join and leave."""
        return f"{self.prefix}members"
