"""Requests that nobody sane sends, from the server's own description and against it: all of it ends, and well."""

import asyncio
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from cramjax.serve.http.answering import Service

from .conftest import listening

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(service_of: Callable[..., Service]) -> Service:
    return service_of(slots=8, queue=64, body_seconds=0.3)


@pytest.fixture(scope="module")
def url(served: Service) -> Iterator[str]:
    with listening(served) as url:
        yield url


@pytest.fixture(scope="module")
def clients() -> Iterator[Any]:
    """Those of benchmarks/storm.py, where there are as many as were promised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[3] / "benchmarks")
        import storm

        yield storm


@pytest.mark.filterwarnings("ignore")
def test_the_server_is_as_it_describes_itself(url: str):
    """Schemathesis: bodies that the description allows, and bodies that it does not, to every route."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs the `test` extra")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    wanted = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance]
    wanted += [checks.response_schema_conformance]
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 11
    for operation in operations:
        for mode in schemathesis.GenerationMode:
            if mode.is_negative and operation.method == "get":
                continue

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            def check(case: Any) -> None:
                case.call_and_validate(checks=wanted)

            check()


def test_malformed_requests_are_errors_of_their_clients(url: str, clients: Any):
    statuses = asyncio.run(clients.malformed(url, 4000))
    assert statuses.total() == 4000 and statuses[200] > 10 and statuses[400] > 2000
    assert {status for status in statuses if status >= 500} <= {503}


def test_slow_clients_hold_up_nobody(url: str, clients: Any):
    late, others = asyncio.run(clients.slow(url, 20, pause=0.01))
    # 0: of those that went on sending where nobody was to hear it.
    assert set(others) == {200} and set(late) <= {0, 200, 408} and late[408] + late[0] > 0


def test_of_many_at_once_each_is_answered_or_told_to_come_again(url: str, clients: Any):
    statuses = asyncio.run(clients.concurrent(url, 300))
    assert set(statuses) <= {200, 503} and statuses[200] >= 72, "slots and queue, at the least"


def test_clients_that_leave_leave_nothing(url: str, served: Service, clients: Any):
    def round_of_clients() -> int:
        statuses, seconds = asyncio.run(clients.leaving(url, 60))
        assert set(statuses) <= {200} and seconds < 5
        gc.collect()
        return psutil.Process().memory_info().rss

    first, *others = (round_of_clients() for _ in range(4))
    assert max(others) - first < 30e6, "bytes"
    worker = served.worker
    assert not worker._tickets and worker._places == worker._waiting_tokens == 0
    assert not worker.engine.requests  # type: ignore[attr-defined]
