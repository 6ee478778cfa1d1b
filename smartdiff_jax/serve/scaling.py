"""How many replicas there are: as many as finish what has been accepted within a time.

Every replica sees the whole queue, for they share a store; Ray asks each of them, and takes the policy that weighs their
answers to its controller by value: nothing here may need the rest of the package.
"""

from typing import Any

WAITING, BEGUN = "smartdiff_waiting_seconds", "smartdiff_begun_seconds"
"""What a replica tells: estimated device seconds of all jobs that wait in the store, and of those it has begun itself."""


class QueueTime:
    """A policy of Ray Serve's autoscaling. queue_seconds: so soon all is to be done."""

    def __init__(self, queue_seconds: float):
        self._queue_seconds = queue_seconds

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The number of replicas that are wanted, which Ray rounds up and keeps within its bounds; no state."""
        told = context.aggregated_metrics or {}
        waiting, begun = (list(told.get(name, {}).values()) for name in (WAITING, BEGUN))
        if not waiting:  # nobody has told anything yet
            return float(context.target_num_replicas), {}
        return (max(waiting) + sum(begun)) / self._queue_seconds, {}
