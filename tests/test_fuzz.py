"""Some random cells under the compiled scan, as `python -m tests.fuzz_scan` tries more of them."""

import pytest

from tests.fuzz_scan import fuzz

pytestmark = pytest.mark.compiles


def test_random_cells():
    report = fuzz(range(7), seed=0, calls=2)
    assert not report.failures, "\n".join(["", *report.failures, str(report)])
    # An engine that refuses everything is never wrong.
    taken, refused = report.counts["legal calls taken"], report.counts["legal calls refused"]
    assert taken > refused, report
    assert report.counts["auto: fused"] > 0, report
