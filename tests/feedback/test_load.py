"""A small load of the site in both databases; tests/feedback/load.py has the large one."""

import pytest

from tests.feedback.load import load


@pytest.mark.slow(20)
@pytest.mark.parametrize("database, kills", [("sqlite", 1), ("postgresql", 0)])
def test_people_at_once_lose_nothing_and_get_nothing_twice(database, kills, request, tmp_path):
    url = f"sqlite:///{tmp_path}/feedback.db" if database == "sqlite" else request.getfixturevalue("postgres_url")
    found = load(url, people=4, seconds=3, kills=kills, think=0.02)
    assert (found["broken"], found["lost"], found["failures"], found["tracebacks"]) == ([], [], [], 0)
    assert found["acknowledged"] > 5
    assert found["acknowledged"] <= found["done"] == found["messages"] + found["reviews"] + found["rankings"]
