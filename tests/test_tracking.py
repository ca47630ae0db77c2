"""What of a result stays on the runner, as a plain function (I1, I2, I5)."""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import subprocess
import sys
import threading
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_dask import ChildSpec, Trackable, keep, track_resources
from flame_dask.child_spec import is_object, stopper_of
from flame_dask.tracking import Handle, Resource, Tracker, resolve, sending, waiter_of


def tracked(data: Any) -> tuple[Any, list[Any]]:
    """Return the data with numbers for what is kept, and what is kept."""
    found, acc = track_resources(data, [], "runner-1")
    return found, [resource.value for resource in acc]


class Point(NamedTuple):
    x: Any
    y: Any = None


class Odd(NamedTuple):
    """Its constructor is not that of a tuple."""

    x: Any

    @classmethod
    def made(cls, x: Any) -> Odd:
        return tuple.__new__(cls, (x,))


@dataclasses.dataclass
class Plain:
    x: Any
    y: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any = 0

    def __post_init__(self) -> None:
        if isinstance(self.x, Handle):
            raise TypeError("its constructor is for the caller, not for copies")


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Any
    y: Any = 0


class MyList(list[Any]):
    """A list with more to it than its items, and a constructor of its own."""

    def __init__(self, name: str, *items: Any) -> None:
        super().__init__(items)
        self.name = name


class MyDict(dict[Any, Any]):
    pass


class MyTuple(tuple[Any, ...]):
    __slots__ = ()


THING = object()


def kept() -> Any:
    return keep(THING)


WRAPPED: dict[str, Any] = {
    "itself": (kept, lambda found: found),
    "tuple": (lambda: (1, kept()), lambda found: found[1]),
    "tuple of its own": (lambda: MyTuple([kept()]), lambda found: found[0]),
    "named tuple": (lambda: Point(kept(), 2), lambda found: found.x),
    "list": (lambda: [0, kept()], lambda found: found[1]),
    "list of its own": (lambda: MyList("rows", kept()), lambda found: found[0]),
    "set": (lambda: {kept()}, lambda found: next(iter(found))),
    "frozenset": (lambda: frozenset([kept()]), lambda found: next(iter(found))),
    "value": (lambda: {"a": kept()}, lambda found: found["a"]),
    "key": (lambda: {kept(): "a"}, lambda found: next(iter(found))),
    "dict of its own": (lambda: MyDict(a=kept()), lambda found: found["a"]),
    "defaultdict": (
        lambda: collections.defaultdict(list, {"a": [kept()]}),
        lambda found: found["a"][0],
    ),
    "ordered dict": (
        lambda: collections.OrderedDict([("b", 1), ("a", kept())]),
        lambda found: found["a"],
    ),
    "counter": (lambda: collections.Counter({kept(): 3}), lambda found: next(iter(found))),
    "dataclass": (lambda: Plain(kept()), lambda found: found.x),
    "frozen dataclass": (lambda: Frozen(kept()), lambda found: found.x),
    "dataclass with slots": (lambda: Slotted(kept()), lambda found: found.x),
    "nested": (
        lambda: {"a": [Plain((1, {"b": Point(0, [kept()])}))]},
        lambda found: found["a"][0].x[1]["b"].y[0],
    ),
}


@pytest.mark.parametrize("case", list(WRAPPED))
def test_i1_what_is_kept_is_found(case: str) -> None:
    make, part = WRAPPED[case]
    data = make()
    found, values = tracked(data)
    assert values == [THING]
    assert part(found) == Handle(0, False, "object")
    assert case == "itself" or type(found) is type(data)
    assert case == "itself" or isinstance(part(data), keep), "the call's own is not changed"


def test_i1_what_a_container_is_beside_its_items_stays() -> None:
    lists = collections.defaultdict(list, {"a": kept()})
    assert tracked(lists)[0].default_factory is list
    assert [*tracked(collections.OrderedDict([("b", kept()), ("a", 1)]))[0]] == ["b", "a"]
    assert tracked(MyList("rows", kept()))[0].name == "rows"
    assert next(iter(tracked(collections.Counter({kept(): 3}))[0].values())) == 3
    assert tracked(Frozen(kept(), "y"))[0].y == "y"
    assert tracked(Odd.made(kept()))[0].x == Handle(0, False, "object")


def test_i1_without_any_it_is_the_same_object() -> None:
    data = {"a": [1, (2, {3}), Plain([4])], "b": MyList("rows", 5), Slotted(6): frozenset([7])}
    found, values = tracked(data)
    assert found is data
    assert values == []
    # And beside one that is kept.
    found, _ = tracked({"kept": kept(), "data": data})
    assert found["data"] is data


def test_i1_the_same_object_twice() -> None:
    both = kept()
    rows = [both]
    found, values = tracked({"a": rows, "b": rows, "c": both})
    assert values == [THING]
    assert found["a"] is found["b"]
    assert found["c"] is found["a"][0]
    # Two wrappers are two resources, even if they hold the same.
    assert len(tracked([keep(THING), keep(THING)])[1]) == 2


def test_i1_what_contains_itself() -> None:
    rows: list[Any] = [kept()]
    rows.append({"rows": rows, "point": Plain(rows)})
    found, values = tracked(rows)
    assert values == [THING]
    assert found[1]["rows"] is found
    assert found[1]["point"].x is found
    assert isinstance(found[0], Handle)
    alone: list[Any] = []
    alone.append(alone)
    assert tracked(alone) == (alone, [])
    node = Plain(kept())
    node.y = node
    found, _ = tracked(node)
    assert found.y is found
    assert isinstance(found.x, Handle)


def test_i1_a_long_chain_without_any() -> None:
    """Which pickle may be able to send."""
    chain: Any = None
    for _ in range(50_000):
        chain = [chain]
    assert tracked(chain)[0] is chain
    while chain:  # or else it would be taken apart in one go
        chain = chain.pop()


def test_i1_classes_are_left_alone() -> None:
    class Connection:
        def __flame_track__(self, tracker: Tracker) -> Any:
            return tracker.keep(self)

    data = [Connection, keep, Plain, subprocess.Popen, threading.Thread]
    assert tracked(data) == (data, [])
    assert isinstance(Connection(), Trackable)
    connection = Connection()
    assert tracked([connection])[1] == [connection]


def test_i1_an_object_with_an_answer_to_every_name() -> None:
    class Anything:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: pytest.fail("nobody has asked it to be tracked")

    thing = Anything()
    assert tracked([thing]) == ([thing], [])


def test_i2_processes_and_threads() -> None:
    thread = threading.Thread(target=int)
    process = multiprocessing.get_context("spawn").Process(target=int)
    with subprocess.Popen([sys.executable, "-c", ""]) as popen:
        found, acc = track_resources([thread, process, popen], [], "r-1")
        assert [resource.value for resource in acc] == [thread, process, popen]
        assert [handle.held for handle in found] == [True, True, True]
        assert [handle.kind for handle in found] == ["Thread", "SpawnProcess", "Popen"]
        wait = acc[2].ended
        assert wait is not None
        wait()
        assert popen.returncode == 0
    assert waiter_of(object()) is None


def test_i5_containers_of_ones_own() -> None:
    class Box:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __flame_track__(self, tracker: Tracker) -> Any:
            assert tracker.runner == "r-1"
            inner, acc = track_resources(self.inner, tracker.acc, tracker.runner)
            assert acc is tracker.acc
            return Box(inner)

    box = Box([keep(1), Box({"a": keep(2)})])
    acc = [Resource(0, None, 1)]
    found, same = track_resources((keep(3), box), acc, "r-1")
    assert same is acc
    assert [resource.value for resource in acc] == [0, 3, 1, 2]
    assert found[0].number == 1
    assert found[1].inner[0].number == 2
    assert found[1].inner[1].inner["a"].number == 3
    assert isinstance(box.inner[0], keep)


def test_i2_keep() -> None:
    _, acc = track_resources([keep(1), keep(2, concurrency=4)], [], "r-1")
    assert [resource.concurrency for resource in acc] == [1, 4]
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            keep(1, concurrency=wrong)


def test_i4_keep_is_sent_whole() -> None:
    import pickle

    back = pickle.loads(pickle.dumps(keep([1], concurrency=3)))
    assert (back.value, back.concurrency) == ([1], 3)


def test_i1_a_handle_is_only_for_a_result() -> None:
    import pickle

    handle = Handle(0, False, "object")
    with pytest.raises(TypeError, match="only for a result"):
        pickle.dumps(handle)
    with sending("pool", "call-1"):
        data = pickle.dumps(handle)
    with pytest.raises(TypeError, match="only for a result"):
        pickle.dumps(handle)
    assert b"call-1" in data


def test_i1_a_handle_needs_a_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flame_dask.tracking.resolver", None)
    with pytest.raises(RuntimeError, match="its parent only"):
        resolve("pool", "call-1", 0, False, "file")


Data = st.recursive(
    st.one_of(st.integers(), st.text(max_size=3), st.builds(kept)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.builds(Point, inner, inner),
        st.builds(Plain, inner, inner),
        st.builds(Slotted, inner, inner),
        st.frozensets(st.builds(kept), max_size=2),
    ),
    max_leaves=20,
)


def count(data: Any, kind: type) -> int:
    """How many there are of a kind, each place counted."""
    if isinstance(data, kind):
        return 1
    if isinstance(data, dict):
        return sum(count(item, kind) for pair in data.items() for item in pair)
    if isinstance(data, list | tuple | frozenset):
        return sum(count(item, kind) for item in data)
    if isinstance(data, Plain | Slotted):
        return count(data.x, kind) + count(data.y, kind)
    return 0


def shape(data: Any) -> Any:
    """The same, with one word for what is kept and what stands for it."""
    if isinstance(data, Handle | keep):
        return "kept"
    if isinstance(data, dict):
        return {key: shape(value) for key, value in data.items()}
    if isinstance(data, frozenset):
        return type(data).__name__, len(data)
    if isinstance(data, list | tuple):
        return type(data).__name__, [shape(item) for item in data]
    if isinstance(data, Plain | Slotted):
        return type(data).__name__, shape(data.x), shape(data.y)
    return data


@given(Data)
def test_i1_all_of_them_and_nothing_else(data: Any) -> None:
    before, many = shape(data), count(data, keep)
    found, acc = track_resources(data, [], "r-1")
    assert len(acc) == count(found, Handle) == many
    assert count(found, keep) == 0
    assert shape(found) == before
    assert count(data, keep) == many, "the call's own is not changed"
    assert (found is data) == (many == 0)


# -- what can be placed (H1, H2) -------------------------------------------------------------------


class Stoppable:
    def __init__(self, *names: str) -> None:
        self.done: list[str] = []
        for name in names:
            setattr(self, name, lambda name=name: self.done.append(name))


class Managed:
    def __init__(self) -> None:
        self.done: list[Any] = []

    def __exit__(self, *exc_info: object) -> None:
        self.done.append(exc_info)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("stop", "close", "halt"), "stop"), (("close", "halt"), "close"), (("halt",), None)],
)
def test_h2_how_a_child_is_stopped(names: tuple[str, ...], expected: str | None) -> None:
    child = Stoppable(*names)
    stop = stopper_of(Stoppable, child)
    if expected is None:
        assert stop is None
        return
    assert stop is not None
    stop()
    assert child.done == [expected]


def test_h2_the_end_of_a_with_block_stops_a_child() -> None:
    child = Managed()
    stop = stopper_of(Managed, child)
    assert stop is not None
    stop()
    assert child.done == [(None, None, None)]


def test_h2_a_spec_says_how_a_child_is_stopped() -> None:
    child = Stoppable("stop", "halt")
    by_name = stopper_of(ChildSpec(start=Stoppable, stop="halt"), child)
    by_function = stopper_of(
        ChildSpec(start=Stoppable, stop=lambda child: child.done.append("f")), child
    )
    assert by_name is not None
    assert by_function is not None
    by_name()
    by_function()
    assert child.done == ["halt", "f"]
    with pytest.raises(AttributeError, match="hold"):
        stopper_of(ChildSpec(start=Stoppable, stop="hold"), child)


def test_h2_a_process_is_asked_by_a_signal() -> None:
    with subprocess.Popen(["sleep", "60"]) as popen:
        stop = stopper_of(ChildSpec(start=subprocess.Popen), popen)
        assert stop is not None
        stop()
        assert popen.wait(10) == -15


def test_h1_specs() -> None:
    spec = ChildSpec(start=Stoppable, args=("stop",))
    assert (spec.id, spec.kwargs) == ("Stoppable", {})
    assert ChildSpec(start=Stoppable, id="mine").id == "mine"
    assert is_object(spec)
    assert is_object(Stoppable)
    assert not is_object(lambda: None)
    with pytest.raises(TypeError, match="can't be called"):
        ChildSpec(start=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a function of the child, or a method's name"):
        ChildSpec(start=Stoppable, stop=5)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.id = "other"  # type: ignore[misc]
