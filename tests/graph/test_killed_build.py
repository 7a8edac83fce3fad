"""A build that is killed, at any point, leaves the old graph or the new one; the next run cleans up."""

import subprocess
import sys

import pytest

# One process forks for every build, and for every look at the result; a build is killed at one of the points
# where the interpreter asks the system for something (an audit event: open, mkdir, rename, ...), or at some
# time. The process itself only imports and forks: it has no thread, and no lock a fork could be left with.
SCRIPT = """
import os, random, signal, sys, threading, traceback
from pathlib import Path
import numpy as np, pyarrow as pa
from tqdm import tqdm
from pinclip import io
from pinclip.graph import build, statistics
from pinclip.graph.build import Holdout, build_graph
from pinclip.graph.edge_source import EdgeArrays
from pinclip.graph.folder import GraphFolder

root, way = Path(sys.argv[1]), sys.argv[2]
out = root / "g"
rng = random.Random(0)
statistics.plot = lambda graph, path: path.write_bytes(b"plot")
if way == "rename aside":
    io._exchange = lambda one, other: False
# tqdm's own lock is shared among forks: one that is killed while it holds it would hang all others.
tqdm.set_lock(threading.RLock())
EDGES = [np.random.default_rng(seed).integers(0, 50, (2, 900)) for seed in (0, 1)]

def make(which):
    pins, boards = EDGES[which]
    source = EdgeArrays("arrays", pa.array(pins), pa.array(boards))
    build_graph(source, out, holdout=Holdout("edges", 0.3, which), threads=2, progress=False)

def fork(function, *arguments):
    assert threading.active_count() == 1
    child = os.fork()
    if child == 0:
        try:
            os._exit(function(*arguments) or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

def make_under(which, hook):
    sys.addaudithook(hook)
    make(which)

def make_for(which, seconds):
    signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process: nothing handles it
    make(which)

def counting(reached):
    # The events of the new folder: before it comes the removal of what the last killed build left.
    count = [0]
    def hook(event, arguments):
        if not count[0] and not (event == "os.mkdir" and ".g.writing-" in str(arguments[0])):
            return
        if event.startswith(("open", "os.", "shutil.", "ctypes.")):
            count[0] += 1  # before the kill, which is an event itself
            reached(count[0])
    return hook

def killing(at):
    return counting(lambda count: count == at + 1 and os.kill(os.getpid(), signal.SIGKILL))

def seed():
    graph = GraphFolder.open(out)
    graph.check_split()
    return graph.split["seed"]

def standing():
    found = fork(seed)
    assert found in (0, 1), found
    return found

read, write = os.pipe()
assert fork(make, 1) == 0
assert fork(make_under, 0, counting(lambda _: os.write(write, b"."))) == 0
total = len(os.read(read, 1 << 20))
now, old, new, lost = standing(), 0, 0, 0
# The places are changed in the last of the events; every one of them, and some of those before.
points = [*rng.sample(range(total), 25), *range(total - 60, total)]
for point in [*points, *(None,) * 15]:
    if point is None:
        status = fork(make_for, 1 - now, rng.uniform(0.001, 0.15))
        assert status in (0, -signal.SIGALRM), status
    else:
        status = fork(make_under, 1 - now, killing(point))
        assert status == -signal.SIGKILL, status
    if way == "rename aside" and not out.exists():
        lost += point is not None
        assert len(list(root.glob(".g.writing-*.old"))) == 1
        assert fork(make, now) == 0
    after = standing()
    old, new = old + (after == now), new + (after != now)
    now = after
assert fork(make, 1 - now) == 0
assert standing() == 1 - now
assert os.listdir(root) == ["g"], os.listdir(root)
print(total, old, new, lost)
"""


@pytest.mark.parametrize("way", ["exchange", "rename aside"])
def test_a_killed_build(tmp_path, way):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), way], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    total, old, new, lost = map(int, done.stdout.split())
    assert total > 80
    assert old > 40
    assert new > 5
    # Between its two renames the fallback leaves the old graph aside; the exchange never does.
    assert lost == (1 if way == "rename aside" else 0)
