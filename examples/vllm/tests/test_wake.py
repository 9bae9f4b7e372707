"""The wait of an idle step: what ends it, and what never waits."""

import queue
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from kvferry.vllm import core
from kvferry.vllm.wake import Alarm, Bell

LIMIT = 30


class Producer:
    """A producer whose freed offers a test chooses."""

    def __init__(self) -> None:
        self.freed = threading.Event()

    def has_freed(self, limit: float) -> bool:
        return self.freed.wait(limit)


def idle_core(unfinished: int = 0, **more: Any) -> core.Core:
    """A core that waits with its next idle step."""
    scheduler = SimpleNamespace(get_num_unfinished_requests=lambda: unfinished)
    it = core.Core(SimpleNamespace(input_queue=queue.Queue(), scheduler=scheduler, **more))
    for _ in range(core.BRISK):
        it.wait()
    return it


@pytest.fixture(autouse=True)
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    # Longer than the tests wait: only an event ends the wait.
    monkeypatch.setattr(core, "IDLE_WAIT", 10 * LIMIT)


def waiting(it: core.Core) -> threading.Thread:
    thread = threading.Thread(target=it.wait, daemon=True)
    thread.start()
    return thread


def ends(thread: threading.Thread) -> bool:
    thread.join(LIMIT)
    return not thread.is_alive()


def test_an_arriving_request_ends_the_wait() -> None:
    it = idle_core()
    step = waiting(it)
    it._core.input_queue.put_nowait("a request")
    assert ends(step)
    assert it._core.input_queue.get_nowait() == "a request", "the loop still finds it"


def test_a_freed_offer_ends_the_wait() -> None:
    it, producer = idle_core(), Producer()
    address = it.alarm()
    assert address is not None
    bell = Bell(address, producer.has_freed)
    step = waiting(it)
    producer.freed.set()
    assert ends(step)
    # The report of the freed offer may need further steps.
    for _ in range(core.BRISK):
        assert ends(waiting(it))
    bell.stop()


def test_news_that_come_between_two_steps_are_not_lost() -> None:
    it = idle_core()
    it._ring()
    assert ends(waiting(it))


@pytest.mark.parametrize("it", [dict(unfinished=1), dict(engines_running=True)])
def test_a_step_does_not_wait_while_requests_or_other_ranks_run(it: dict[str, Any]) -> None:
    assert ends(waiting(idle_core(**it)))


def test_an_engine_with_a_queue_of_steps_waits_only_when_all_reports_have_come() -> None:
    it = idle_core(batch_queue_size=9)
    it.busy()
    for _ in range(9 + 1):
        it.wait()
    assert it._brisk == 0


def test_without_a_socket_an_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(core, "Alarm", full)
    it = idle_core()
    assert it.alarm() is None and it.alarm() is None


def test_a_bell_without_an_alarm_and_a_stopped_bell_end() -> None:
    gone = Bell("/nonexistent/news", Producer().has_freed)
    assert ends(gone._thread)
    alarm = Alarm(lambda: None)
    bell = Bell(alarm.path, Producer().has_freed)
    bell.stop()
    assert ends(bell._thread)
    alarm.close()
