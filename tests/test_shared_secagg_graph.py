"""No dropouts and colluders that a plan allows can cut the mask graph."""

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.secagg import graph


def is_connected(alive: Iterable[int], n: int, degree: int) -> bool:
    alive = set(alive)
    seen: set[int] = set()
    todo = [min(alive)]
    while todo:
        site = todo.pop()
        if site not in seen:
            seen.add(site)
            todo += alive.intersection(graph.neighbours(site, n, degree))
    return seen == alive


def accepted(n: int) -> list[tuple[int, int]]:
    return [
        (threshold, colluders)
        for colluders in range(1, n - 1)
        for threshold in range(graph.least_threshold(n, colluders), n + 1)
    ]


@pytest.mark.parametrize("n", range(3, 11))
def test_no_allowed_removal_cuts_a_small_graph(n) -> None:
    for threshold, colluders in accepted(n):
        degree = graph.mask_degree(n, threshold, colluders)
        for removed in itertools.combinations(range(n), n - threshold + colluders):
            assert is_connected(set(range(n)) - set(removed), n, degree)


@st.composite
def removals(draw) -> tuple[int, int, set[int]]:
    n = draw(st.integers(11, 255))
    colluders = draw(st.integers(1, n // 3))
    threshold = draw(st.integers(graph.least_threshold(n, colluders), n))
    degree = graph.mask_degree(n, threshold, colluders)
    # Two runs of neighbours are what cuts a ring; the rest may be anywhere.
    count = n - threshold + colluders
    first, second = draw(st.integers(0, n - 1)), draw(st.integers(0, n - 1))
    split = draw(st.integers(0, count))
    removed = {(first + i) % n for i in range(split)}
    removed |= {(second + i) % n for i in range(count - split)}
    return n, degree, removed


@settings(max_examples=60, deadline=None)
@given(removals())
def test_no_allowed_removal_cuts_a_large_graph(case) -> None:
    n, degree, removed = case
    assert is_connected(set(range(n)) - removed, n, degree)


@pytest.mark.parametrize(("n", "threshold", "colluders"), [(10, 8, 2), (100, 90, 10)])
def test_a_smaller_degree_would_be_cut(n, threshold, colluders) -> None:
    degree = graph.mask_degree(n, threshold, colluders) - 2
    around = set(graph.neighbours(0, n, degree))
    assert len(around) <= n - threshold + colluders
    assert not is_connected(set(range(n)) - around, n, degree)


@pytest.mark.parametrize(
    ("cohort", "degree"),
    [((3, 3, 1), 2), ((4, 3, 1), 3), ((10, 8, 2), 6), ((100, 90, 10), 22), ((10, 6, 1), 6)],
)
def test_degrees_of_the_protocols_examples(cohort, degree) -> None:
    assert graph.mask_degree(*cohort) == degree


@settings(deadline=None)
@given(st.data())
def test_being_neighbours_is_mutual(data) -> None:
    n = data.draw(st.integers(3, 255))
    degree = data.draw(st.sampled_from([n - 1, *range(2, n, 2)]))
    partners = [set(graph.neighbours(i, n, degree)) for i in range(n)]
    for site, others in enumerate(partners):
        assert site not in others
        assert len(others) == degree
        assert all(site in partners[other] for other in others)


@pytest.mark.parametrize(
    ("n", "threshold", "colluders", "word"),
    [
        (2, 2, 1, "3 to 255"),
        (256, 200, 1, "3 to 255"),
        (4, 3, 0, "colluders"),
        (4, 4, 3, "colluders"),
        (4, 5, 1, "3..4"),
        (10, 5, 1, "6..10"),
        (10, 6, 2, "7..10"),
        (5, 4, 3, "5..5"),
    ],
)
def test_an_unsafe_cohort_is_refused(n, threshold, colluders, word) -> None:
    with pytest.raises(ConfigError, match=word):
        graph.check_parameters(n, threshold, colluders)
    with pytest.raises(ConfigError):
        graph.mask_degree(n, threshold, colluders)


@pytest.mark.parametrize("n", range(3, 20))
def test_accepted_thresholds_are_those_that_no_two_sets_can_both_reach(n) -> None:
    for threshold, colluders in accepted(n):
        graph.check_parameters(n, threshold, colluders)
        assert 2 * threshold > n + colluders
        assert threshold - colluders >= 2
    assert graph.tolerated_dropouts(n, graph.least_threshold(n, 1)) == (n - 1) // 2 - (n % 2)


@pytest.mark.parametrize(("index", "n", "degree"), [(0, 8, 3), (0, 8, 0), (0, 8, 8), (8, 8, 4)])
def test_a_graph_that_does_not_exist_is_refused(index, n, degree) -> None:
    with pytest.raises(ConfigError):
        graph.neighbours(index, n, degree)
