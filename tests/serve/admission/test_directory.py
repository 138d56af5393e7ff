"""Where every session of the service stands, and what is known of the dead."""

from __future__ import annotations

from serve.access.rates import TenantRates
from serve.admission.book import GATEWAY_SILENT_S, SETTLE_S, AdmissionBook
from serve.admission.directory import LOST_S, Directory
from serve.messages import Progress, Share, Ticket

NOW, EPOCH = 100.0, 1_000_000.0


def service() -> tuple[AdmissionBook, Directory]:
    """Return a book with one running and two waiting sessions of two gateways, and its directory."""
    book = AdmissionBook(10, NOW - SETTLE_S)
    book.report("g1", 1, [], NOW)
    for name, gateway, tenant, age in (("a", "gw1", "red", 30), ("b", "gw2", "red", 20), ("c", "gw1", "blue", 10)):
        book.enqueue(Ticket(name, gateway, EPOCH - age, share=Share(tenant)), NOW)
    book.confirm("a", "g1", NOW)
    return book, Directory(book)


def test_it_lists_who_waits_longest_first_and_then_who_runs_longest() -> None:
    _, directory = service()
    directory.tell("gw1", {"a": Progress(chunk_count=7, frame_count=25)})
    waiting, other, running = directory.views(NOW, EPOCH)
    assert [view.session_id for view in (waiting, other, running)] == ["b", "c", "a"]
    assert (running.is_running, running.tenant, running.age_s, running.progress.frame_count) == (True, "red", 30, 25)
    assert {view.session_id: view.ahead for view in (waiting, other)} == {"c": 0, "b": 1}


def test_a_session_is_ended_by_its_own_gateway_and_nobody_elses() -> None:
    book, directory = service()
    before = book.revision
    assert directory.end("b")
    assert book.revision > before, "the gateway's poll returns at once"
    assert (directory.ending("gw1"), directory.ending("gw2")) == ((), ("b",))
    assert directory.ending("gw2") == ("b",), "until the gateway says that it is over"
    book.leave("b", NOW)
    assert directory.ending("gw2") == ()
    assert not directory.end("b")
    assert not directory.end("unheard of")


def test_what_a_dead_gateways_sessions_had_is_final_after_a_while() -> None:
    book, directory = service()
    directory.tell("gw1", {"a": Progress(frame_count=25), "c": Progress()})
    later = NOW + GATEWAY_SILENT_S + 1
    book.seen("gw2", later)
    views = directory.views(later, EPOCH)
    directory.lose(book.expire(later), views, later)
    assert directory.final(later) == []
    final = directory.final(later + LOST_S)
    assert {view.session_id: view.progress.frame_count for view in final} == {"a": 25, "c": 0}
    assert directory.final(later + LOST_S) == []


def test_a_gateway_that_was_only_slow_keeps_its_bills_to_itself() -> None:
    book, directory = service()
    directory.tell("gw1", {"a": Progress(frame_count=25)})
    later = NOW + GATEWAY_SILENT_S + 1
    directory.lose(book.expire(later), directory.views(later, EPOCH), later)
    directory.tell("gw1", {"a": Progress(frame_count=40)})
    assert directory.final(later + LOST_S) == []


def test_a_tenant_may_spend_so_many_a_minute_and_as_many_at_once() -> None:
    rates = TenantRates()
    assert [rates.spend("a", 3, NOW) for _ in range(3)] == [0, 0, 0]
    assert rates.spend("a", 3, NOW) == 20.0
    assert rates.spend("b", 3, NOW) == 0.0
    assert rates.spend("a", 3, NOW + 19.9) > 0
    assert rates.spend("a", 3, NOW + 20) == 0.0
    rates.forget(NOW + 100)
    assert rates._left == {}
    assert [rates.spend("a", 3, NOW + 100) for _ in range(4)][3] > 0
