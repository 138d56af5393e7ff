"""The sessions of the whole service: where each stands and what it has had, for their owners, operators and bills.

Gateways tell what their sessions have had with each poll of admission; where a session stands is in admission's book.
"""

from __future__ import annotations

from collections.abc import Mapping

from serve.messages import Progress, SessionView

from .book import AdmissionBook

LOST_S = 30.0
"""A gateway that has been silent for this long is not coming back; what its sessions had is final."""


class Directory:
    """What gateways have told. Times are seconds of one clock, given by the caller.

    Args:
        book: Where sessions stand.
    """

    def __init__(self, book: AdmissionBook) -> None:
        self._book = book
        self._told: dict[str, Mapping[str, Progress]] = {}
        self._ending: set[str] = set()
        self._lost: dict[str, tuple[float, dict[str, SessionView]]] = {}

    def tell(self, gateway_id: str, progress: Mapping[str, Progress]) -> None:
        """Take a gateway's word for what its sessions have had; it is alive."""
        self._told[gateway_id] = progress
        self._lost.pop(gateway_id, None)

    def views(self, now_s: float, epoch_s: float) -> list[SessionView]:
        """Return all sessions: the longest waiting first, then the longest running.

        Args:
            now_s: Now, on the book's clock.
            epoch_s: Now, in seconds since the epoch.
        """
        order = self._book.order(now_s)
        ahead = {session_id: number for number, session_id in enumerate((*order.ready, *order.blocked))}
        views = [
            SessionView(
                session_id=ticket.session_id,
                tenant=ticket.share.tenant,
                is_running=self._book.is_running(ticket.session_id),
                ahead=ahead.get(ticket.session_id, 0),
                age_s=max(0.0, epoch_s - ticket.arrived_s),
                progress=self._told.get(ticket.gateway_id, {}).get(ticket.session_id, Progress()),
            )
            for ticket in self._book.tickets()
        ]
        return sorted(views, key=lambda view: (view.is_running, -view.age_s))

    def end(self, session_id: str) -> bool:
        """Ask for a session's end; return whether it is known."""
        if not any(ticket.session_id == session_id for ticket in self._book.tickets()):
            return False
        self._ending.add(session_id)
        self._book.revision += 1
        return True

    def ending(self, gateway_id: str) -> tuple[str, ...]:
        """Return the sessions of a gateway that shall end."""
        known = {ticket.session_id: ticket.gateway_id for ticket in self._book.tickets()}
        self._ending &= known.keys()
        return tuple(sorted(session_id for session_id in self._ending if known[session_id] == gateway_id))

    def lose(self, gateway_ids: list[str], views: list[SessionView], now_s: float) -> None:
        """Keep what is known of the sessions of gateways that have fallen silent.

        Args:
            gateway_ids: The gateways.
            views: All sessions, as they were before the book forgot them.
            now_s: Now.
        """
        by_id = {view.session_id: view for view in views}
        for gateway_id in gateway_ids:
            told = self._told.pop(gateway_id, {})
            sessions = {session_id: by_id[session_id] for session_id in told if session_id in by_id}
            if sessions:
                self._lost[gateway_id] = (now_s, sessions)

    def final(self, now_s: float) -> list[SessionView]:
        """Return, once, the sessions whose gateways are not coming back."""
        gone = [gateway_id for gateway_id, (since_s, _) in self._lost.items() if now_s - since_s >= LOST_S]
        return [view for gateway_id in gone for view in self._lost.pop(gateway_id)[1].values()]
