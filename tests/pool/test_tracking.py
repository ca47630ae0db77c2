"""What calls leave on their runners (I)."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from flame_dask import (
    CallCancelled,
    CallTimeout,
    FlamePool,
    PoolClosed,
    RemoteObject,
    RunnerLost,
    SerializationError,
    keep,
    track_resources,
)
from support import LOCAL, alive, free, lines, runner_pid, states, wait_for_file, work

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = pytest.mark.usefixtures("processes_end")


# -- what calls leave ------------------------------------------------------------------------------


class Account:
    """It can't be pickled."""

    def __init__(self, money: int = 0) -> None:
        self.money = money
        self.lock = threading.Lock()

    def pay(self, by: int) -> int:
        with self.lock:
            self.money += by
            return self.money

    def identity(self) -> int:
        return id(self)

    def fail(self) -> None:
        raise LookupError("on purpose")

    def spin(self) -> None:
        while True:
            time.sleep(0.005)

    def gate(self, log: str, gate: str) -> int:
        return work(log, gate)

    def open(self, money: int) -> Any:
        return [keep(Account(money)), money]

    def open_badly(self) -> Any:
        return [keep(Account(1)), threading.Lock()]


def account(money: int = 0) -> Any:
    return keep(Account(money))


def start(*command: str) -> Any:
    return subprocess.Popen(command)


TRACKED = {"track_resources": True}


# -- I1: a result, and its lease -------------------------------------------------------------------


def test_i1_handles_come_in_their_places(lasting: FlamePool) -> None:
    def make() -> Any:
        return {"a": [account(1)], "b": (account(2), "plain"), "c": [3]}

    found = lasting.call(make, **TRACKED)
    [x], (y, plain), rest = found["a"], found["b"], found["c"]
    assert (plain, rest) == ("plain", [3])
    assert isinstance(x, RemoteObject)
    assert (x.call("pay", 10), y.call("pay", by=20)) == (11, 22)
    assert x.runner in {runner.id for runner in lasting.status().runners}
    assert repr(x) == f"<RemoteObject: Account, on {x.runner}>"
    assert x.alive
    assert lasting.status().leases == 1, "one lease for both"
    x.release()
    assert y.call("pay", 1) == 23
    assert lasting.status().leases == 1
    assert not x.alive
    assert repr(x) == "<RemoteObject: Account, released>"
    y.release()


def test_i1_c2_d1_the_lease_and_its_runner(
    make_pool: MakePool, own: dict[str, Any], until: Until
) -> None:
    def make() -> Any:
        return {"a": [account(1)], "b": (account(2), "plain")}

    pool = make_pool(max=1, max_concurrency=1, idle_shutdown_after=0.3, **own)
    found = pool.call(make, timeout=20, **TRACKED)
    x, y = found["a"][0], found["b"][0]
    began = time.monotonic()
    for handle in (x, y):
        with pytest.raises(CallTimeout) as caught:
            pool.call(int, queue_timeout=0.2)
        assert caught.value.phase == "queued"
        until(lambda: time.monotonic() > began + 1)
        assert states(pool) == ["ready"]
        assert handle.call("pay", 1) > 1
        handle.release()
    assert pool.call(int, queue_timeout=5) == 0
    until(lambda: states(pool) == [], 10)


def test_i1_its_time_limit_is_for_the_call_alone(lasting: FlamePool, until: Until) -> None:
    began = time.monotonic()
    total = lasting.call(account, timeout=0.5, **TRACKED)
    until(lambda: time.monotonic() > began + 2)
    assert total.call("pay", 1) == 1
    total.release()
    with pytest.raises(CallTimeout):
        lasting.call(wait_for_file, "/no/such/file", timeout=0.3, **TRACKED)


def test_i1_a_result_without_any_is_like_others(lasting: FlamePool, until: Until) -> None:
    async def inc(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    def fail() -> None:
        raise LookupError("on purpose", 7)

    assert lasting.call(divmod, 7, 2, **TRACKED) == (3, 1)
    assert lasting.call(inc, 1, **TRACKED) == 2
    assert lasting.call(bytes, 3_000_000, **TRACKED) == bytes(3_000_000)
    with pytest.raises(LookupError) as caught:
        lasting.call(fail, **TRACKED)
    assert caught.value.args == ("on purpose", 7)
    until(lambda: free(lasting), 2)


def test_i1_a_large_result_beside(lasting: FlamePool) -> None:
    found, array = lasting.call(lambda: (account(5), np.arange(2_000_000)), **TRACKED)
    assert array.sum() == np.arange(2_000_000).sum()
    assert found.call("pay", 1) == 6
    found.release()


def test_i1_i5_containers_of_ones_own(lasting: FlamePool) -> None:
    class Box:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __flame_track__(self, tracker: Any) -> Any:
            inner, _ = track_resources(self.inner, tracker.acc, tracker.runner)
            return Box((tracker.runner, inner))

    box = lasting.call(lambda: Box([account(3)]), **TRACKED)
    runner, [found] = box.inner
    assert found.runner == runner
    assert found.call("pay", 1) == 4
    found.release()


def test_i1_what_goes_wrong_while_it_is_tracked(lasting: FlamePool, until: Until) -> None:
    class Broken:
        def __flame_track__(self, tracker: Any) -> Any:
            tracker.keep(object())
            raise LookupError("not today")

    with pytest.raises(LookupError, match="not today"):
        lasting.call(lambda: [account(), Broken()], **TRACKED)
    with pytest.raises(SerializationError) as caught:
        lasting.call(lambda: {"a": account(), "b": threading.Lock()}, **TRACKED)
    assert "b" in caught.value.part
    until(lambda: free(lasting), 3)


# -- I2: processes and threads ---------------------------------------------------------------------


def test_i2_a_process_is_held_until_it_ends(
    lasting: FlamePool, tmp_path: Path, until: Until
) -> None:
    process = lasting.call(start, "sleep", "60", **TRACKED)
    assert process.call("poll") is None
    where, pid = lasting.call(lambda popen: (os.getpid(), popen.pid), process)
    assert psutil.Process(pid).ppid() == where
    del process
    gc.collect()
    short = lasting.call(start, "sleep", "0.2", **TRACKED)
    until(lambda: lasting.status().leases == 1, 5)
    assert not short.alive
    with pytest.raises(CallCancelled):
        short.call("poll")
    assert alive(pid), "though nobody refers to it"
    os.kill(pid, signal.SIGTERM)
    until(lambda: free(lasting), 3)


def test_i2_d1_a_process_keeps_its_runner(
    make_pool: MakePool, own: dict[str, Any], until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=1, idle_shutdown_after=0.2, **own)
    began = time.monotonic()
    process = pool.call(start, "sleep", "1.5", **TRACKED)
    until(lambda: states(pool) == [], 10)
    assert time.monotonic() - began > 1.5
    assert not process.alive


def test_i2_a_thread_is_held_until_it_ends(
    lasting: FlamePool, tmp_path: Path, until: Until
) -> None:
    gate = tmp_path / "gate"

    def begin() -> Any:
        thread = threading.Thread(target=wait_for_file, args=(str(gate),), daemon=True)
        thread.start()
        return thread

    thread = lasting.call(begin, **TRACKED)
    assert thread.call("is_alive")
    gate.touch()
    until(lambda: free(lasting), 3)
    assert not thread.alive


def test_i2_a_process_may_be_let_go_of(lasting: FlamePool, until: Until) -> None:
    process = lasting.call(start, "sleep", "60", **TRACKED)
    pid = lasting.call(lambda popen: popen.pid, process)
    process.release()
    until(lambda: free(lasting), 3)
    if alive(pid):  # it lives as long as what the call ran in
        os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), 3)


def test_i2_a_thread_that_was_never_started(lasting: FlamePool, until: Until) -> None:
    lasting.call(lambda: threading.Thread(target=int), **TRACKED)
    until(lambda: free(lasting), 3)


# -- I2: handles -----------------------------------------------------------------------------------


def test_i2_as_an_argument_it_is_the_object_itself(lasting: FlamePool) -> None:
    x, y = lasting.call(lambda: [account(1), account(2)], **TRACKED)
    same = x.call("identity")
    assert lasting.call(id, x) == same
    assert lasting.call(lambda found: id(found["rows"][0][1]), {"rows": [(0, x)]}) == same
    assert lasting.call(lambda: id(x)) == same
    assert lasting.submit(id, x).result(10) == same

    def transfer(source: Any, target: Any, money: int) -> tuple[int, int]:
        return source.pay(-money), target.pay(money)

    assert lasting.call(transfer, x, y, 1) == (0, 3)
    assert lasting.call(lambda both: both[0] is both[1], [x, x])
    assert list(lasting.map(transfer, [x] * 3, [y] * 3, [1] * 3))[-1] == (-3, 6)
    future = lasting.submit(pow, 2, 10)
    assert x.call("pay", future) == 1021
    x.release()
    y.release()


def test_i2_a_call_with_it_needs_no_slot(make_pool: MakePool) -> None:
    pool = make_pool(max=1, max_concurrency=1, backend=LOCAL)
    with pool.call(account, **TRACKED) as found:
        assert pool.call(lambda account: account.pay(1), found) == 1
        assert found.call("pay", 1) == 2
    assert pool.call(int) == 0


def test_i2_a_call_holds_what_it_needs(lasting: FlamePool, tmp_path: Path, until: Until) -> None:
    """It has been sent: nobody else need refer to it any more."""
    x, y = lasting.call(lambda: [account(1), account(2)], **TRACKED)
    gate = tmp_path / "gate"
    busy = x.submit("gate", str(tmp_path / "log"), str(gate))
    future = lasting.submit(lambda x, y: x.pay(0) + y.pay(0), x, y)
    waiting = lasting.submit(lambda n, y: n + y.pay(0), lasting.submit(wait_for_file, str(gate)), y)
    until(lambda: lines(tmp_path / "log"))
    del x, y
    gc.collect()
    gate.touch()
    assert future.result(10) == 3
    assert waiting.result(10) > 2
    assert busy.result(10)
    until(lambda: free(lasting), 3)


def test_i2_what_is_not_together(make_pool: MakePool, lasting: FlamePool) -> None:
    """A clear error: in another process, on another runner, in another pool."""
    pool = make_pool(max=2, max_concurrency=1, backend=LOCAL)
    one, two = (pool.call(account, queue_timeout=20, **TRACKED) for _ in range(2))
    assert one.runner != two.runner
    with pytest.raises(ValueError, match="not in the same process"):
        pool.call(lambda *both: None, one, two)
    mine = lasting.call(account, **TRACKED)
    with pytest.raises(ValueError, match="call that pool"):
        pool.call(id, mine)
    with pytest.raises(ValueError, match="call that pool"):
        lasting.submit(id, [one])
    with pytest.raises(ValueError, match="not in the same process"):
        pool.call(lambda *both: None, one, mine)
    assert lasting.call(id, mine) == mine.call("identity")
    mine.release()


def test_i2_of_two_calls(lasting: FlamePool, kind: dict[str, Any]) -> None:
    """In threads they are in one process, and each of its own they are not."""
    one, two = (lasting.call(account, money, **TRACKED) for money in (1, 2))
    if kind["isolation"] == "thread":
        assert lasting.call(lambda x, y: x.pay(0) + y.pay(0), one, two) == 3
    else:
        with pytest.raises(ValueError, match="not in the same process"):
            lasting.call(lambda *both: None, one, two)
    one.release()
    two.release()


def test_i2_only_for_ordinary_calls(lasting: FlamePool) -> None:
    found = lasting.call(account, **TRACKED)
    with pytest.raises(ValueError, match="not of a stream"):
        lasting.stream(lambda account: iter([1]), found)
    with pytest.raises(ValueError, match="not of a child"):
        lasting.place_child(Account, found)
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(found)
    found.release()


def test_i2_what_goes_wrong_in_a_method(lasting: FlamePool, until: Until) -> None:
    found = lasting.call(account, **TRACKED)
    with pytest.raises(LookupError, match="on purpose"):
        found.call("fail")
    with pytest.raises(CallTimeout) as caught:
        found.call("spin", timeout=0.3)
    assert caught.value.phase == "running"
    with pytest.raises(SerializationError):
        found.get()
    with pytest.raises(SerializationError):
        found.call("pay", threading.Lock())
    assert found.call("pay", 1) == 1
    found.release()


def test_i2_get(lasting: FlamePool) -> None:
    found = lasting.call(lambda: keep({"depth": [3]}), **TRACKED)
    assert found.get() == {"depth": [3]}
    assert found.get(timeout=10) == {"depth": [3]}
    assert found.call("update", width=4) is None
    assert found.get() == {"depth": [3], "width": 4}
    found.release()


def test_i2_several_at_the_same_time(lasting: FlamePool, tmp_path: Path, until: Until) -> None:
    """Of one object, as it says; those of all others share a thread, and their time counts so."""

    def make() -> Any:
        return keep(Account(), concurrency=2), account(), account()

    wide, x, y = lasting.call(make, **TRACKED)
    log, gate = tmp_path / "log", tmp_path / "gate"
    futures = [wide.submit("gate", str(log), str(gate)) for _ in range(2)]
    until(lambda: len(lines(log)) == 2)
    with pytest.raises(CallTimeout) as caught:
        wide.call("pay", 0, timeout=0.2)
    assert caught.value.phase == "queued"
    futures += [wide.submit("pay", 1), x.submit("gate", str(log), str(gate))]
    until(lambda: len(lines(log)) == 3)
    with pytest.raises(CallTimeout) as caught:
        y.call("pay", 0, timeout=0.2)
    assert caught.value.phase == "queued"
    wide.release()  # what it was asked for so far is done
    gate.touch()
    for future in futures:
        assert future.result(10)
    x.release()
    y.release()


# -- I3: its end -----------------------------------------------------------------------------------


def test_i3_release(lasting: FlamePool, until: Until) -> None:
    found = lasting.call(account, **TRACKED)
    found.release()
    found.release()
    until(lambda: free(lasting), 3)
    for use in (
        lambda: found.call("pay", 1),
        lambda: found.submit("pay", 1),
        found.get,
        lambda: found.runner,
    ):
        with pytest.raises(ValueError, match="has been released"):
            use()
    with pytest.raises(SerializationError, match="has been released"):
        lasting.call(id, found)
    with lasting.call(account, **TRACKED) as inside:
        assert inside.call("pay", 1) == 1
    until(lambda: free(lasting), 3)


def test_i3_the_last_reference_goes(lasting: FlamePool, until: Until) -> None:
    found = lasting.call(account, **TRACKED)
    also = found
    del found
    gc.collect()
    assert also.call("pay", 1) == 1
    del also
    gc.collect()
    until(lambda: free(lasting), 3)


def test_i3_one_of_two_handles_is_released(lasting: FlamePool, until: Until) -> None:
    future = lasting.submit(account, **TRACKED)
    one, two = future.result(10), future.result(10)
    one.release()
    until(lambda: free(lasting), 3)
    with pytest.raises(CallCancelled):
        two.call("pay", 1)


def test_i3_f2_its_runner_is_killed(
    make_pool: MakePool, kind: dict[str, Any], until: Until
) -> None:
    """The call had its answer, and is not started anew."""
    pool = make_pool(max=1, max_concurrency=2, **kind)
    future = pool.submit(account, timeout=20, retries=2, **TRACKED)
    found = future.result(20)
    busy = found.submit("spin")
    os.kill(runner_pid(pool), signal.SIGKILL)
    for use in (lambda: busy.result(10), lambda: found.call("pay", 1), found.get):
        with pytest.raises(RunnerLost) as caught:
            use()
        assert caught.value.cause == "signal"
    assert not found.alive
    assert repr(found) == "<RemoteObject: Account, gone>"
    with pytest.raises(RunnerLost):
        future.result(10).call("pay", 1)
    found.release()
    until(lambda: free(pool), 5)
    counters = pool.status().counters
    assert (counters["lost"], counters["retried"]) == (1, 0)


def test_i3_a6_the_pool_closes(make_pool: MakePool, kind: dict[str, Any], until: Until) -> None:
    """At once, though there is time; and nothing goes on."""
    pool = make_pool(max=1, max_concurrency=4, **{**kind, "shutdown_timeout": 20})
    found, future = pool.call(account, **TRACKED), pool.submit(account, **TRACKED)
    process = pool.call(start, "sleep", "60", **TRACKED)
    pid = pool.call(lambda popen: popen.pid, process)
    future.result(10)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 8
    until(lambda: not alive(pid), 3)
    for use in (lambda: found.call("pay", 1), found.get, lambda: process.call("poll")):
        with pytest.raises(PoolClosed):
            use()
    with pytest.raises(PoolClosed):
        future.result().call("pay", 1)
    found.release()
    assert not found.alive


# -- I4: without tracking --------------------------------------------------------------------------


def test_i4_without_tracking(lasting: FlamePool) -> None:
    back = lasting.call(lambda: [keep({"a": 1}, concurrency=2)])
    assert isinstance(back[0], keep)
    assert (back[0].value, back[0].concurrency) == ({"a": 1}, 2)
    for make in (account, lambda: start("true"), lambda: threading.Thread(target=int)):
        with pytest.raises(SerializationError):
            lasting.call(make)


# -- futures, executors, options -------------------------------------------------------------------


def test_i1_b3_futures(lasting: FlamePool, until: Until) -> None:
    future = lasting.submit(account, 1, **TRACKED)
    one, two = future.result(10), future.result(10)
    assert one.call("pay", 1) == 2
    assert two.call("pay", 1) == 3
    del one, two
    gc.collect()
    assert future.result().call("pay", 1) == 4, "the future holds it"
    again = future.result()
    del future
    gc.collect()
    assert again.call("pay", 1) == 5
    del again
    gc.collect()
    until(lambda: free(lasting), 3)


def test_i3_a_future_without_its_result(lasting: FlamePool, until: Until) -> None:
    future: Any = lasting.submit(account, **TRACKED)
    future.exception(10)
    assert lasting.status().leases == 1
    future.cancel()  # too late
    assert future.result().call("pay", 1) == 1
    del future
    gc.collect()
    until(lambda: free(lasting), 3)


def test_i1_b4_map(lasting: FlamePool, until: Until) -> None:
    found = list(lasting.map(account, [1, 2, 3], **TRACKED))
    assert [one.call("pay", 1) for one in found] == [2, 3, 4]
    assert lasting.status().leases == 3
    del found
    gc.collect()
    until(lambda: free(lasting), 3)


def test_i1_a1_as_an_option_of_the_pool(make_pool: MakePool, until: Until) -> None:
    pool = make_pool(max=1, max_concurrency=4, track_resources=True, backend=LOCAL)
    with pool.call(account, 1) as found:
        assert found.call("pay", 1) == 2
        [more, money] = found.call("open", 7)  # also of methods
        assert (more.call("pay", 1), money) == (8, 7)
        more.release()
    with pool.get_executor() as executor:
        future = executor.submit(account, 3)
        assert future.result(10).call("pay", 1) == 4
        del future
    with pytest.raises(SerializationError):
        pool.call(account, track_resources=False)
    assert pool.call(keep, {"a": 1}).get() == {"a": 1}
    pool.cast(account)
    gc.collect()
    until(lambda: free(pool), 3)
    assert pool.status().counters["cast_errors"] == 0


# -- what a method gives ---------------------------------------------------------------------------


def test_i1_i2_a_method_leaves_something(lasting: FlamePool, until: Until) -> None:
    found = lasting.call(account, **TRACKED)
    [inner, money] = found.call("open", 5, **TRACKED)
    assert (inner.call("pay", 1), money) == (6, 5)
    assert inner.runner == found.runner
    assert lasting.call(lambda x, y: x is y, found, inner) is False
    with pytest.raises(SerializationError):
        found.call("open_badly", **TRACKED)
    found.release()
    assert inner.call("pay", 1) == 7
    assert lasting.status().leases == 1
    del inner
    gc.collect()
    until(lambda: free(lasting), 3)


def test_i3_what_a_method_leaves_for_nobody(
    lasting: FlamePool, tmp_path: Path, until: Until
) -> None:
    """Its caller has given up: it is let go of. That of another caller stays."""

    class Bank(Account):
        def open_late(self, log: str, gate: str) -> Any:
            work(log, gate)
            return account(1)

    bank = lasting.call(lambda: keep(Bank(), concurrency=3), **TRACKED)
    until(lambda: lasting.status().leases == 1)
    log, gate = tmp_path / "log", tmp_path / "gate"
    dropped = bank.submit("open_late", str(log), str(gate), **TRACKED)
    wanted = bank.submit("open_late", str(log), str(gate), **TRACKED)
    until(lambda: len(lines(log)) == 2)
    del dropped
    gate.touch()
    mine = wanted.result(10)
    assert mine.call("pay", 1) == 2
    bank.release()
    assert mine.call("pay", 1) == 3
    assert lasting.status().leases == 1
    mine.release()
    del wanted
    until(lambda: free(lasting), 3)


def test_i2_a_child_leaves_something(lasting: FlamePool, until: Until) -> None:
    child = lasting.place_child(Account)
    [inner, _] = child.call("open", 5, **TRACKED)
    assert inner.call("pay", 1) == 6
    assert lasting.call(lambda child, inner: child.pay(inner.pay(0)), child, inner) == 6
    child.stop()
    with pytest.raises(CallCancelled):
        inner.call("pay", 1)
    assert not inner.alive


# -- in a pool that is asynchronous ----------------------------------------------------------------


def test_a4_asynchronous(own: dict[str, Any], fast: dict[str, Any]) -> None:
    async def main() -> None:
        async with FlamePool(
            "async", max=1, max_concurrency=1, asynchronous=True, **fast, **own
        ) as pool:
            async with await pool.call(account, 1, **TRACKED) as found:
                assert await found.call("pay", 1) == 2
                assert await found.submit("pay", 1) == 3
                assert await pool.call(lambda account: account.pay(1), found) == 4
                with pytest.raises(CallTimeout):
                    await pool.call(int, queue_timeout=0.1)
                with pytest.raises(SerializationError):
                    await found.get()
            assert await pool.call(int, queue_timeout=5) == 0
            future = pool.submit(account, 2, **TRACKED)
            again = await future
            assert await again.call("pay", 1) == 3
            again.release()
            assert await pool.call(int, queue_timeout=5) == 0

    asyncio.run(main())
