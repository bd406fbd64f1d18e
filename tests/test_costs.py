"""What passes cost: on lines between the measured ones, from times that a test gives."""

import time

import pytest

from hf_mtp.decoding.schedule.costs import FIRST_GUESS, SLOW_SECONDS, PassCosts, measure_costs


def test_costs_lie_on_lines_between_the_measured_ones():
    costs = PassCosts([(1, 1.0), (5, 1.4), (17, 2.0)], [(3, 1.5), (9, 2.7)])
    for columns, cost in ((1, 1.0), (3, 1.2), (5, 1.4), (11, 1.7), (17, 2.0), (29, 2.6)):
        assert costs.of(columns, masks=False) == pytest.approx(cost)
    for columns, cost in ((3, 1.5), (6, 2.1), (9, 2.7), (15, 3.9), (1, 1.5)):  # never below the smallest measured
        assert costs.of(columns, masks=True) == pytest.approx(cost)


def test_the_first_guess_grows():
    for masks in (False, True):
        of = [FIRST_GUESS.of(columns, masks) for columns in range(1, 90)]
        assert of == sorted(of)
    assert FIRST_GUESS.of(1, masks=False) == 1.0


@pytest.fixture
def clock(monkeypatch):
    """A clock that a pass moves on."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def pass_that_takes(clock, seconds, ran: list):
    def run(columns: int, masks: bool) -> None:
        ran.append((columns, masks))
        clock[0] += seconds(columns, masks, ran.count((columns, masks)))

    return run


def test_of_two_times_the_shorter_counts(clock):
    """The first pass of each size is slow, as a warm-up is, and the last ones are."""
    ran = []
    run = pass_that_takes(clock, lambda n, masks, nth: n * 1e-4 * (9 if nth == 1 or nth > 3 else 1), ran)
    costs = measure_costs(run, (5, 17), (3, 9))
    assert costs.plain == [(1, 1.0), (5, pytest.approx(5.0)), (17, pytest.approx(17.0))]
    assert costs.masked[1] == (9, pytest.approx(9.0))
    assert ran[:3] == [(9, True), (1, False), (1, False)]


def test_slow_passes_are_timed_once(clock):
    ran = []
    measure_costs(pass_that_takes(clock, lambda *_: SLOW_SECONDS * 1.1, ran), (5,), (3,))
    assert ran == [(3, True), (1, False), (1, False), (1, False), (5, False), (3, True)]


def test_dips_are_noise(clock):
    seconds = {1: 1.0, 5: 0.95, 17: 2.0, 3: 3.0, 9: 2.8}
    costs = measure_costs(pass_that_takes(clock, lambda columns, *_: seconds[columns], []), (5, 17), (3, 9))
    assert costs == PassCosts([(1, 1.0), (5, 1.0), (17, 2.0)], [(3, 3.0), (9, 3.0)])


def test_slow_sizes_are_padded(clock):
    seconds = {1: 1.0, 3: 1.5, 5: 1.75, 9: 2.5, 13: 3.0, 17: 2.125, 33: 3.0, 41: 2.25}
    run = pass_that_takes(clock, lambda columns, *_: seconds[columns], [])
    costs = measure_costs(run, (5, 9, 13, 17), (3, 9, 13, 17, 33, 41))
    assert costs.plain == [(1, 1.0), (5, 1.75), (17, 2.125)] and costs.plain_gaps == [(5, 17)]
    assert costs.masked == [(3, 1.5), (17, 2.125), (41, 2.25)] and costs.masked_gaps == [(3, 17), (17, 41)]
    assert [costs.padded(columns, False) for columns in (1, 5, 6, 16, 17, 18)] == [1, 5, 17, 17, 17, 18]
    assert costs.of(6, masks=False) == costs.of(13, masks=False) == 2.125
    assert measure_costs(run, (), (13, 17)).masked_gaps == [(0, 17)]
    assert measure_costs(run, (3,), (3,)).plain == [(1, 1.0), (3, 1.5)]


def test_one_measured_size_grows_a_little(clock):
    costs = measure_costs(pass_that_takes(clock, lambda columns, *_: float(columns), []), (), (10,))
    assert costs.masked[0] == (10, 10.0)
    assert costs.of(11, masks=True) > 10.0
    assert costs.of(5, masks=False) == pytest.approx(1.08)


def test_processes_agree_on_every_time(clock):
    """Another process is three times slower: its times count."""
    seconds = pass_that_takes(clock, lambda columns, *_: 0.001 * columns, [])
    alone = measure_costs(seconds, (5,), (3,))
    given = []
    agreed = measure_costs(seconds, (5,), (3,), lambda own: given.append(own) or (0.1 if len(given) == 1 else 0.005))
    assert len(given) == 1 + 3
    assert agreed == PassCosts([(1, 1.0), (5, 1.0)], [(3, 1.0), (4, 1.02)])
    assert alone.plain == [(1, 1.0), (5, pytest.approx(5.0))]
