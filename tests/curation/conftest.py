"""What all tests of curation share."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def cards_without_plots(plain_plots) -> None:
    """Cards are not what these tests are about."""
