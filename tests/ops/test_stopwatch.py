"""The stopwatch, on a device that keeps a diary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from normc.ops import stopwatch


class Device:
    """Runs what it is given at once; a flush, holding it up and each call take their time."""

    def __init__(self) -> None:
        self.now, self.diary, self.rounds = 0.0, list[str](), 0

    def spend(self, what: str, microseconds: float) -> None:
        self.diary.append(what)
        self.now += microseconds / 1e3

    def synchronize(self) -> None:
        self.diary.append("wait")

    def namespace(self) -> Any:
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def elapsed_time(self, other: Any) -> float:
                return other.at - self.at

        class Within:
            def __init__(self, index: object) -> None:
                device.diary.append(f"on {index}")

            def __enter__(self) -> None: ...
            def __exit__(self, *_: object) -> None: ...

        def empty(count: int, dtype: object, device: object) -> Any:
            assert 4 * count >= 2**28
            return SimpleNamespace(zero_=lambda: self.spend("flush", 80.0))

        def hold(cycles: int) -> None:
            assert 20e-6 * 2e9 <= cycles <= stopwatch.LONGEST * 2e9
            self.spend("hold", 1000.0)

        cuda = SimpleNamespace(
            Event=Event, device=Within, synchronize=self.synchronize, _sleep=hold
        )
        return SimpleNamespace(cuda=cuda, empty=empty, int32=None, device=object)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(stopwatch, "torch", made.namespace())
    return made


def test_the_median_of_each_call_alone(device: Device) -> None:
    slow = iter([9.0] * stopwatch.WARM_UP + [10.0, 900.0] + [11.0] * 100)
    calls = {"a": lambda: device.spend("a", next(slow)), "b": lambda: device.spend("b", 25.0)}
    found = stopwatch.events(calls, "cuda:3")  # type: ignore[arg-type]
    assert found == {"a": pytest.approx(11.0), "b": pytest.approx(25.0)}
    assert device.diary[0] == "on cuda:3"


def test_each_call_is_flushed_before_and_all_take_turns(device: Device) -> None:
    calls = {n: (lambda n=n: device.spend(n, 5.0)) for n in "abc"}
    stopwatch.events(calls, "cuda")  # type: ignore[arg-type]
    work = [entry for entry in device.diary if entry != "wait"][1 + 3 * stopwatch.WARM_UP :]
    assert stopwatch.ROUNDS >= 11
    assert len(work) == 3 * 3 * stopwatch.ROUNDS
    assert all(work[i : i + 2] == ["flush", "hold"] for i in range(0, len(work), 3))
    order = [work[i] for i in range(2, len(work), 3)]
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({one[0] for one in rounds}) == 3, "none comes always first"
    for one, other in zip(rounds, rounds[1:], strict=False):
        assert one != other


def test_a_single_call_and_the_table() -> None:
    assert stopwatch.turns(["a"], 5) == ["a"]
    assert [stopwatch.turns("abc", i) for i in range(3)] == [list("abc"), list("cba"), list("bca")]
    assert stopwatch.TIMERS == {"cuda": stopwatch.events}
