"""An explorer computes in a thread of its own: tests wait for it, and say what it was asked."""

import pytest

PATIENCE = 300.0  # seconds: only a hang takes longer


@pytest.fixture
def settled():
    """Wait until an explorer has nothing left to do, and return it."""

    def wait(explorer):
        assert explorer.wait(PATIENCE), "still computing"
        assert not explorer.busy
        return explorer

    return wait
