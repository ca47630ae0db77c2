"""Who gets the next call (C5), against a model that sorts all runners each time."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flame_dask.core.policy import Placement
from flame_dask.core.records import Runner


class PlacementMachine(RuleBasedStateMachine):
    """Runners come, go, change their kind, get and lose leases; more or fewer are favoured."""

    @initialize(placement=st.sampled_from(["spread", "pack"]), slots=st.integers(1, 3))
    def start(self, placement: str, slots: int) -> None:
        self.name = placement
        self.slots = slots
        self.placement = Placement(placement, slots)
        self.target = 0
        self.runners: list[Runner] = []
        self.made = 0

    def age(self, runner: Runner) -> tuple[bool, int]:
        return (runner.kind != "min", runner.no)

    def expected(self) -> Runner | None:
        by_age = sorted(self.runners, key=self.age)
        for group in (by_age[: self.target], by_age[self.target :]):
            sign = -1 if self.name == "pack" else 1
            free = [runner for runner in group if len(runner.leases) < self.slots]
            if free:
                return min(free, key=lambda r: (sign * len(r.leases), r.no))
        return None

    @rule(kind=st.sampled_from(["min", "elastic"]))
    def add(self, kind: str) -> None:
        self.made += 1
        runner = Runner(self.made, f"r{self.made}", 1, False, None)
        runner.kind = kind  # type: ignore[assignment]
        self.runners.append(runner)
        self.placement.add(runner)

    @precondition(lambda self: self.runners)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        runner = data.draw(st.sampled_from(self.runners))
        self.runners.remove(runner)
        self.placement.remove(runner)

    @precondition(lambda self: self.runners)
    @rule(data=st.data())
    def change_kind(self, data: st.DataObject) -> None:
        runner = data.draw(st.sampled_from(self.runners))
        runner.kind = "min" if runner.kind == "elastic" else "elastic"
        self.placement.rank(runner)

    @rule(times=st.integers(1, 4))
    def lease(self, times: int) -> None:
        for _ in range(times):
            runner = self.placement.pick()
            if runner is not None:
                runner.leases[f"c{len(runner.leases)}"] = None
                self.placement.touch(runner)

    @precondition(lambda self: any(runner.leases for runner in self.runners))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        runner = data.draw(st.sampled_from([r for r in self.runners if r.leases]))
        runner.leases.popitem()
        self.placement.touch(runner)

    @rule(count=st.integers(0, 6))
    def favour(self, count: int) -> None:
        self.target = count
        self.placement.favour(count)

    @precondition(lambda self: hasattr(self, "placement"))
    @invariant()
    def picks_as_the_model_does(self) -> None:
        assert self.placement.pick() is self.expected()
        assert len(self.placement) == len(self.runners)
        by_age = sorted(self.runners, key=self.age)
        assert {r for r in self.runners if r.group == "favoured"} == set(by_age[: self.target])


TestPlacementMachine = PlacementMachine.TestCase


@pytest.mark.parametrize("placement", ["spread", "pack"])
def test_runners_that_come_and_go_for_years_leave_nothing_behind(placement):
    """The heap of the favoured ones kept every runner that ever was, once."""
    ranking = Placement(placement, 1)
    ranking.favour(1)
    for number in range(10_000):
        runner = Runner(number, f"r{number}", 1, False, None)
        ranking.add(runner)
        runner.leases["c"] = None
        ranking.touch(runner)
        ranking.remove(runner)
    entries = [
        len(heap._heap) for group in (ranking._age, ranking._load) for heap in group.values()
    ]
    assert max(entries) < 200
