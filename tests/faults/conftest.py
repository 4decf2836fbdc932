"""The corpus that whole jobs train on."""

import pytest
from text import write_tokens


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small corpus as prepared tokens; read only."""
    return write_tokens(tmp_path_factory.mktemp("data"))
