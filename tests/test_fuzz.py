"""A small budget of `make fuzz`: every reader reads or refuses what is damaged."""

import collections

import fuzz
import pytest


@pytest.fixture(scope="module")
def report():
    return fuzz.run(10**6, seed=7, seconds=12)


def test_nothing_but_values_and_refusals(report):
    assert not report.faults, report.faults[0]


def test_every_reader_was_tried(report):
    cases = collections.Counter()
    for (reader, _), count in report.counts.items():
        cases[reader] += count
    assert cases.keys() == fuzz.READERS.keys(), report.table()
    assert any(result == "refused" for _, result in report.counts)
    assert any(result == "read" for _, result in report.counts)


def test_a_fault_is_seen(tmp_path, monkeypatch):
    """The guard and the comparison work: a reader that fails is reported."""
    guard = fuzz.Guard()
    guard.folder = str(tmp_path)
    (tmp_path / "inside").write_text("")
    assert guard.seen == []
    outside = tmp_path.parent / "outside"
    try:
        outside.write_text("")
    finally:
        guard.folder = None
        outside.unlink()
    assert guard.seen == [f"open {outside}"]
