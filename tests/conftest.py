"""What several test files share."""
import pytest

import batches


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Six training and two test slides through the real path."""
    folder = tmp_path_factory.mktemp("world")
    batches.make_world(folder, train=6, test=2)
    return folder
