"""What can go wrong around the engine; the same tree as :mod:`causal_forcing.errors`.

CausalForcingError
├── ClientGone      the client is silent, or does not take what it asked for
├── Unavailable     a process the session needs is gone or leaving; a new session can work
├── Unauthenticated the caller has not said who it is, or nobody knows it
├── NotAllowed      this caller may not do this
├── NoSuchSession   there is no such session, or none any more
└── EndedByOperator an operator has ended the session
"""

from __future__ import annotations

from causal_forcing.errors import CausalForcingError


class ClientGone(CausalForcingError):
    """Raised when a client sends nothing for too long, or leaves its session without credit for too long."""

    default_reason = "CLIENT_SILENT"
    retryable = True


class Unavailable(CausalForcingError):
    """Raised when a process that the session needs has died or is being replaced."""

    default_reason = "GENERATOR_LOST"
    retryable = True


class Unauthenticated(CausalForcingError):
    """Raised when a call has no credentials, or none that are known here."""

    default_reason = "BAD_CREDENTIALS"


class NotAllowed(CausalForcingError):
    """Raised when the caller may not do what it asked for."""

    default_reason = "REMOTE_PEER"


class NoSuchSession(CausalForcingError):
    """Raised when a session is asked for that does not exist or is over."""

    default_reason = "NO_SUCH_SESSION"


class EndedByOperator(CausalForcingError):
    """Raised in a session that an operator ends."""

    default_reason = "SESSION_ENDED_BY_OPERATOR"
