"""The corpus that whole jobs train on."""

import pytest
from text import write_tokens


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small corpus as prepared tokens; read only."""
    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small text; read only."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"In year {n} the harvest was {n % 7}, and {n % 11} of {n % 13} ships returned.\n" for n in range(2000))
    )
    return path
