"""How often a tenant may do something: token buckets by tenant, without input or output."""

from __future__ import annotations


class TenantRates:
    """One bucket a tenant: so many a minute in the long run, as many at once."""

    def __init__(self) -> None:
        self._left: dict[str, tuple[float, float]] = {}

    def spend(self, tenant: str, per_minute: int, now_s: float) -> float:
        """Count one use; return 0, or the seconds until there would have been one."""
        left, since_s = self._left.get(tenant, (float(per_minute), now_s))
        per_s = per_minute / 60
        left = min(float(per_minute), left + (now_s - since_s) * per_s)
        if left < 1:
            self._left[tenant] = (left, now_s)
            return (1 - left) / per_s
        self._left[tenant] = (left - 1, now_s)
        return 0.0

    def forget(self, now_s: float) -> None:
        """Forget tenants whose bucket is full again."""
        self._left = {tenant: entry for tenant, entry in self._left.items() if now_s - entry[1] < 60}
