"""Which tests run: a short suite, or with --long also the campaigns."""

from collections import Counter

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true",
        help="also run the campaigns (marked long): all combinations, every launcher, kill "
             "schedules, thousands of damaged buffers, gigabytes",
    )  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """Leave the campaigns out unless they are asked for; pytest reports them as deselected.

    Of a test marked one_in(n) each n-th case stays. n shares no factor with the lengths of the
    lists that the test takes its cases from, so that each value of each list has its turn.
    """
    if config.getoption("--long"):
        return
    num_seen, kept, left_out = Counter(), [], []
    for item in items:
        one_in = item.get_closest_marker("one_in")
        test = item.nodeid.partition("[")[0]
        is_campaign = one_in is not None and num_seen[test] % one_in.args[0] != 0
        num_seen[test] += 1
        is_campaign |= item.get_closest_marker("long") is not None
        (left_out if is_campaign else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(scope="session")
def is_long(pytestconfig) -> bool:
    """Whether the campaigns run: a test that chooses how much it tries may then try more."""
    return pytestconfig.getoption("--long")
