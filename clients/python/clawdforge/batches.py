"""Many runs at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import requests

from .checks import segment


@dataclass(frozen=True)
class Batch:
    """How far a batch has come."""

    batch_id: str
    #: ``running``, ``paused`` (until midnight UTC, the budget is spent), ``cancelling``, ``cancelled`` or ``finished``.
    status: str
    total: int
    #: The runs by their status.
    counts: dict[str, int]
    created_at: int
    cancelled_at: int | None = None
    finished_at: int | None = None
    estimated_end_at: int | None = None
    paused_until: int | None = None
    webhook: str | None = None

    @property
    def done(self) -> bool:
        """Whether all of it has ended."""
        return self.finished_at is not None


@dataclass(frozen=True)
class BatchResult:
    """What came of a run of a batch."""

    #: For ``after``.
    seq: int
    custom_id: str | None
    run_id: str
    status: str
    #: What :meth:`Forge.run` would have been answered: a dict with ``ok``, and ``result`` or ``error``.
    answer: dict[str, Any] | None


class Batches:
    """Batches, by way of ``forge.batches``."""

    def __init__(self, call: Callable[..., dict[str, Any]], lines: Callable[[str], requests.Response]) -> None:
        self._call = call
        self._lines = lines

    def create(self, runs: Iterable[Mapping[str, Any]], *, webhook: str | None = None) -> Batch:
        """Has many runs made, each a dict as ``POST /run`` takes it (``prompt`` and what else), with a ``custom_id`` of one's own.

        They are made where nobody else wants the place. Up to 10,000, which are read one by one and sent as they come. Where one is wrong, none is
        made: status 422 names it by its number.
        """
        body = (json.dumps(run).encode() + b"\n" for run in runs)
        headers = {"Content-Type": "application/x-ndjson"}
        return _batch(self._call("POST", "/batches", data=body, headers=headers, params={} if webhook is None else {"webhook": webhook}))

    def get(self, batch_id: str) -> Batch:
        """How far it has come."""
        return _batch(self._call("GET", f"/batches/{segment(batch_id, 'batch_id')}"))

    def list(self) -> list[Batch]:
        """The newest 50."""
        return [_batch(batch) for batch in self._call("GET", "/batches")["batches"]]

    def cancel(self, batch_id: str) -> Batch:
        """Cancels what waits of it and what goes on; it is over when this returns."""
        return _batch(self._call("DELETE", f"/batches/{segment(batch_id, 'batch_id')}"))

    def results(self, batch_id: str, *, after: int = 0) -> Iterator[BatchResult]:
        """What came of the runs that have ended, in the order in which they did, behind the one with ``seq`` ``after``."""
        with self._lines(f"/batches/{segment(batch_id, 'batch_id')}/results?after={int(after)}") as answer:
            for line in answer.iter_lines():
                if line:
                    said = json.loads(line)
                    yield BatchResult(**{name: said.get(name) for name in BatchResult.__dataclass_fields__})


def _batch(answer: dict[str, Any]) -> Batch:
    return Batch(**{name: answer.get(name) for name in Batch.__dataclass_fields__})  # type: ignore[arg-type]
