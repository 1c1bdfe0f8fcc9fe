"""A studio over a workspace of its own."""

import pytest

from studio.state import Studio


@pytest.fixture
def studio(workspace) -> Studio:
    return Studio(workspace)
