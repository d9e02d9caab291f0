"""The latest request wins, whatever happens to those before it."""

import subprocess
import sys
import threading

from grokkit.widgets.latest import Latest

PATIENCE = 30.0


class Recorder:
    """A computation that stops where it is told to, and what came of it."""

    def __init__(self):
        self.delivered, self.failed, self.busy, self.closed = [], [], [], []
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.latest = Latest(
            self.compute, self.delivered.append, self.failed.append, self.busy.append
        )

    def compute(self, request):
        try:
            yield f"{request} begun"
            if "slow" in request:
                self.reached.set()
                assert self.go_on.wait(PATIENCE)
            if "wrong" in request:
                raise ValueError("a wrong request")
            yield f"{request} done"
        finally:
            self.closed.append(request)

    def finish(self):
        assert self.latest.wait(PATIENCE)


def test_results_come_in_order_and_busy_is_told():
    recorder = Recorder()
    recorder.latest.submit("one")
    recorder.finish()
    assert recorder.delivered == ["one begun", "one done"]
    assert recorder.busy == [True, False]
    recorder.latest.submit("two")  # a thread was not kept for it
    recorder.finish()
    assert recorder.delivered[2:] == ["two begun", "two done"]


def test_a_newer_request_drops_what_is_stale():
    recorder = Recorder()
    recorder.latest.submit("slow")
    assert recorder.reached.wait(PATIENCE)
    assert not recorder.latest.wait(0.0)
    recorder.latest.submit("never looked at")
    recorder.latest.submit("newer")
    recorder.go_on.set()
    recorder.finish()
    assert recorder.delivered == ["slow begun", "newer begun", "newer done"]
    assert recorder.closed == ["slow", "newer"]  # closed in the thread, not when collected
    assert recorder.busy == [True, False]


def test_an_error_ends_its_request_alone():
    recorder = Recorder()
    recorder.latest.submit("wrong")
    recorder.finish()
    (error,) = recorder.failed
    assert str(error) == "a wrong request" and recorder.delivered == ["wrong begun"]
    recorder.latest.submit("right")
    recorder.finish()
    assert recorder.delivered[-1] == "right done" and len(recorder.failed) == 1


def test_a_stale_error_is_dropped():
    recorder = Recorder()
    recorder.latest.submit("slow and wrong")
    assert recorder.reached.wait(PATIENCE)
    recorder.latest.submit("newer")
    recorder.go_on.set()
    recorder.finish()
    assert recorder.closed == ["slow and wrong", "newer"]
    assert recorder.failed == [] and recorder.delivered[-1] == "newer done"


def test_explorers_take_turns():
    first, second = Recorder(), Recorder()
    first.latest.submit("slow")
    assert first.reached.wait(PATIENCE)
    second.latest.submit("waits")
    assert not second.latest.wait(0.2) and second.delivered == [] and second.busy == [True]
    first.go_on.set()
    first.finish()
    second.finish()
    assert second.delivered == ["waits begun", "waits done"]


CELLS = """
import threading
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()

def run(cell):
    shell.run_cell(cell).raise_error()

run('''
import threading
from grokkit.widgets.latest import Latest
began, go_on, done = threading.Event(), threading.Event(), []
def compute(request):
    began.set()
    if request == "slow":
        assert go_on.wait(60)
    done.append(request)
    yield request
latest = Latest(compute, print, print, lambda busy: None)
latest.submit("first")
assert not began.wait(0.3), "an explorer began while a cell ran"
''')
assert shell.user_ns["latest"].wait(60) and shell.user_ns["done"] == ["first"]
run("latest.submit('second'); assert latest.wait(60) and done[-1] == 'second'; began.clear()")
run("latest.submit('slow')")
assert shell.user_ns["began"].wait(60)
threading.Timer(0.3, shell.user_ns["go_on"].set).start()
run("assert done[-1] == 'slow', 'a cell began while an explorer computed'")
try:
    run("latest.submit('after an error'); 1 / 0")
except ZeroDivisionError:
    pass
assert shell.user_ns["latest"].wait(60) and shell.user_ns["done"][-1] == "after an error"
print("all held")
"""


def test_explorers_and_cells_take_turns():
    told = subprocess.run(
        [sys.executable, "-c", CELLS], check=False, stdout=subprocess.PIPE, text=True, timeout=120
    ).stdout
    assert told.splitlines()[-1:] == ["all held"], told
