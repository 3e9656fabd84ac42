"""How a team of threads shrinks while other processes have its cores, from invented times of its regions."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("cpp")

MS = 1_000_000
QUIET = (2 * MS, MS // 10, MS // 10)
"""Wall time of a region, loss of the thread that loses most, and loss of all threads."""


def sizes(wanted: int, regions: list[tuple[int, int, int]]) -> list[int]:
    from narrows._core import crew_sizes

    return list(crew_sizes(wanted, regions))


def test_a_quiet_machine_keeps_the_team_whole() -> None:
    assert set(sizes(4, [QUIET] * 1000)) == {4}


def test_a_short_disturbance_changes_nothing() -> None:
    assert set(sizes(2, [QUIET] * 9 + [(8 * MS, 6 * MS, 6 * MS)] + [QUIET] * 50)) == {2}


@pytest.mark.parametrize(
    ("wanted", "worst", "total", "left"),
    [(2, 0.4, 0.4, 1), (16, 0.5, 0.7, 15), (16, 0.6, 2.5, 13), (5, 0.7, 3.0, 2), (3, 0.9, 5.0, 1)],
)
def test_a_team_shrinks_by_the_cores_it_has_lost(wanted: int, worst: float, total: float, left: int) -> None:
    wall = 5 * MS
    found = sizes(wanted, [(wall, int(worst * wall), int(total * wall))] * 3)
    assert found == [wanted, wanted, left]


def test_a_busy_machine_is_tried_again_for_a_small_part_of_the_time() -> None:
    """Regions of a whole team lose half of their time. One thread loses nothing, because its loss is not recorded."""
    found = sizes(2, [(5 * MS, 2 * MS, 2 * MS)] * 2000)
    assert 1 <= found[1000:].count(2) <= 50


def test_a_team_is_whole_again_when_the_machine_is_quiet() -> None:
    lost = (5 * MS, 2 * MS, 2 * MS)
    assert set(sizes(2, [lost] * 200 + [QUIET] * 1000)[-50:]) == {2}
