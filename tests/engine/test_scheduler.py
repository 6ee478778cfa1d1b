"""The scheduler's promises, on a simulated device and clock: fair, prompt, starving nobody, losing no time."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartdiff_jax.config.model import known_models
from smartdiff_jax.config.request import GenerateParams, resolve
from smartdiff_jax.engine.costs import GUESS_PER_TOKEN, Costs, Work
from smartdiff_jax.engine.scheduler import STRETCH, WEIGHTS, Entry, Scheduler

CHUNK = 0.5


def simulate(arrivals: list[Entry], pick=Scheduler.pick, until: float = float("inf")):
    """One device, chunk by chunk; returns when each job began and ended, and the seconds each flow had."""
    scheduler, left, now = Scheduler(), {entry.id: entry.cost for entry in arrivals}, 0.0
    coming = sorted(arrivals, key=lambda entry: entry.created_at)
    began, ended, had = {}, {}, {}
    while (coming or len(scheduler)) and now < until:
        while coming and coming[0].created_at <= now:
            scheduler.put(coming.pop(0))
        job = pick(scheduler)
        if job is None:
            now = coming[0].created_at
            continue
        began.setdefault(job, now)
        seconds = min(CHUNK, left[job])
        now, left[job] = now + seconds, left[job] - seconds
        flow = scheduler._entries[job].flow
        had[flow] = had.get(flow, 0.0) + seconds
        scheduler.charge(job, seconds)
        if left[job] <= 1e-9:
            ended[job] = now
            scheduler.remove(job)
    return began, ended, had


def entry(name, owner="ann", created_at=0.0, cost=1.0, priority="normal", share=1.0):
    return Entry(name, owner, priority, created_at, cost, share=share)


def fifo(scheduler):
    return min(scheduler._entries.values(), key=lambda entry: (entry.created_at, entry.id), default=None).id \
        if scheduler._entries else None  # fmt: skip


@pytest.mark.parametrize("owners", [1, 2, 20])
def test_pictures_behind_a_video_start_within_a_chunk_and_cost_no_time(owners):
    video = entry("video", "filmer" if owners > 1 else "ann", cost=160.0)
    pictures = [entry(f"p{n:02}", f"ann{n % owners}" if owners > 1 else "ann", 1.0 + 7 * n) for n in range(20)]
    began, ended, _ = simulate([video, *pictures])
    _, ended_fifo, _ = simulate([video, *pictures], pick=fifo)
    for picture in pictures:
        assert began[picture.id] - picture.created_at <= CHUNK + 1e-6
        assert ended[picture.id] - picture.created_at <= 2 * picture.cost + 2 * CHUNK
    slow = sorted(ended_fifo[p.id] - p.created_at for p in pictures)[-2]
    assert slow / sorted(ended[p.id] - p.created_at for p in pictures)[-2] >= 5
    assert max(ended.values()) == pytest.approx(max(ended_fifo.values()))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(WEIGHTS)), st.sampled_from([1.0, 2.0, 0.5])), min_size=2, max_size=4),
    st.lists(st.floats(0.1, 30.0), min_size=1, max_size=4),
    st.floats(5.0, 20.0),
)
def test_flows_with_work_share_the_device_by_weight(flows, costs, until):
    costs.append(until)  # so that no flow runs out of work
    arrivals = [
        entry(f"{owner}-{n}", f"user{owner}", 0.0, cost, priority, share)
        for owner, (priority, share) in enumerate(flows)
        for n, cost in enumerate(costs)
    ]
    _, _, had = simulate(arrivals, until=until)
    served = [
        (had.get((f"user{owner}", priority), 0.0) / (share * WEIGHTS[priority]), CHUNK / (share * WEIGHTS[priority]))
        for owner, (priority, share) in enumerate(flows)
    ]
    for one, chunk_one in served:
        for other, chunk_other in served:
            assert one - other <= chunk_one + chunk_other + 1e-6


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_everything_ends_and_the_device_never_idles_while_there_is_work(seed, owners):
    rng = random.Random(seed)
    arrivals = [
        entry(f"j{n}", f"user{rng.randrange(owners)}", rng.uniform(0, 30), rng.choice([0.1, 1.0, 8.0]),
              rng.choice(list(WEIGHTS)))
        for n in range(20)
    ]  # fmt: skip
    began, ended, had = simulate(arrivals)
    assert set(ended) == {job.id for job in arrivals}
    assert sum(had.values()) == pytest.approx(sum(job.cost for job in arrivals))
    _, ended_fifo, _ = simulate(arrivals, pick=fifo)
    assert max(ended.values()) == pytest.approx(max(ended_fifo.values()))
    assert all(began[job.id] >= job.created_at for job in arrivals)


def test_a_stream_of_pictures_does_not_starve_a_video():
    """Pictures that come as fast as the device can make them: the video ends when it is due and a little later."""
    pictures = [entry(f"p{n:04}", created_at=float(n), cost=1.0) for n in range(300)]
    _, ended, _ = simulate([entry("video", cost=20.0), *pictures])
    assert ended["video"] <= STRETCH * 20.0 + 2 * 20.0


def test_a_user_who_was_away_has_saved_nothing_up():
    busy = [entry(f"b{n}", "busy", cost=1.0) for n in range(200)]
    late = [entry(f"l{n}", "late", 100.0, cost=1.0) for n in range(50)]
    _, ended, _ = simulate([*busy, *late])
    between = sum(100.0 < ended[job.id] <= 140.0 for job in busy)
    assert 19 <= between <= 21  # half of the forty seconds


def test_leaving_and_coming_back_forgives_no_debt():
    scheduler = Scheduler()
    scheduler.put(entry("a", "ann", cost=100.0)), scheduler.put(entry("b", "bob", cost=100.0))
    scheduler.charge("a", 10.0)
    scheduler.remove("a")
    scheduler.put(entry("a2", "ann", cost=0.1))
    assert scheduler.pick() == "b"


def test_what_is_left_is_told_as_it_is_learnt_and_changes_no_turn():
    scheduler = Scheduler()
    scheduler.put(entry("a", cost=1.0)), scheduler.put(entry("b", cost=2.0))
    scheduler.charge("a", 5.0)  # it took longer than was thought
    assert scheduler.forecast()["a"].seconds == 0.0
    scheduler.expect("a", 4.0)
    scheduler.charge("a", 1.0)
    forecast = scheduler.forecast()
    assert (forecast["a"].seconds, forecast["b"].seconds) == (3.0, 5.0) and scheduler.pick() == "a"
    scheduler.charge("a", 9.0)
    assert scheduler.forecast()["a"].seconds == 0.0


def test_pick_obeys_what_may_run():
    scheduler = Scheduler()
    for name in "ab":
        scheduler.put(entry(name, cost=1.0 if name == "a" else 2.0))
    assert scheduler.pick() == "a" and scheduler.pick(["b"]) == "b" and scheduler.pick([]) is None
    assert Scheduler().pick() is None


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_the_forecast_is_what_happens_with_one_flow(seed):
    rng = random.Random(seed)
    arrivals = [entry(f"j{n}", cost=rng.uniform(0.1, 9.0)) for n in range(12)]
    scheduler = Scheduler()
    for job in arrivals:
        scheduler.put(job)
    forecast = scheduler.forecast()
    _, ended, _ = simulate(arrivals)
    assert {job: f.seconds for job, f in forecast.items()} == pytest.approx(ended)
    assert sorted(ended, key=ended.get) == sorted(forecast, key=lambda job: forecast[job].position)


def test_a_forecast_of_many_flows_ends_when_all_is_done():
    scheduler = Scheduler()
    for n in range(200):
        scheduler.put(entry(f"j{n}", f"user{n % 7}", float(n), cost=1.0 + n % 3))
    forecast = scheduler.forecast(rate=2.0)
    assert max(f.seconds for f in forecast.values()) == pytest.approx(scheduler.backlog() / 2.0)
    assert sorted(f.position for f in forecast.values()) == list(range(200))


def test_costs_learn_and_scale_by_tokens():
    work = Work("pocket cpu", 100, "euler none 2", steps=10, outputs=2)
    costs = Costs()
    assert costs.estimate(work).total == pytest.approx(2 * 11 * 100 * GUESS_PER_TOKEN) and not costs.estimate(work).measured
    for _ in range(50):
        costs.observe(work, "denoise", 0.2)
        costs.observe(work, "decode", 1.0)
    found = costs.estimate(work)
    assert (found.step, found.decode, found.measured) == (pytest.approx(0.2), pytest.approx(1.0), True)
    assert found.total == pytest.approx(2 * (10 * 0.2 + 1.0))
    assert costs.left(work, "denoise", 0.0) == pytest.approx(found.total)
    assert costs.left(work, "denoise", 0.5) == pytest.approx(2 * (5 * 0.2 + 1.0))
    assert costs.left(work, "decode", 0.5) == pytest.approx(1.0)
    larger = costs.estimate(dataclasses.replace(work, tokens=300))
    assert larger.step == pytest.approx(0.6) and not larger.measured
    for _ in range(60):
        costs.observe(work, "denoise", 0.1)  # what is measured now counts more than what was
    assert costs.estimate(work).step == pytest.approx(0.1, rel=0.1)
    again = Costs(costs.changes())
    assert again.estimate(work) == costs.estimate(work) and costs.changes() == {}


def test_a_cache_and_guidance_are_shapes_of_their_own():
    spec = known_models()["pocket-video"]
    params = resolve(GenerateParams(prompt=""), spec, size_multiple=8, frame_multiple=4, count_tokens=lambda *size: 100)
    guided, alone = (Work.of("m", params, 100, guided) for guided in (True, False))
    assert guided.bucket("denoise") != alone.bucket("denoise") and guided.bucket("decode") == alone.bucket("decode")
