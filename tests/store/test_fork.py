"""After a fork, the child is told to open a store of its own, and the parent's goes on unharmed."""

import multiprocessing
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

import trajstore
from tests.store.children import servers_of, until

REFUSED = 17


@pytest.fixture(autouse=True)
def _fork_with_threads_is_the_point():
    """Python 3.12 warns of every fork in a process with threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def in_child(run, *, seconds=30.0):
    """Exit status of a forked child that runs a function; it is killed when it hangs."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = run() or 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        threading.Event().wait(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


def refused(call):
    """Runs a call in a child; `REFUSED` if it got the error that it should."""

    def run():
        try:
            call()
        except trajstore.Conflict as error:
            return REFUSED if "before a fork" in str(error) else 1
        return 2

    return run


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.create(),
        lambda store: store.get("a"),
        lambda store: store.load("a"),
        lambda store: store.events("a"),
        lambda store: store.list(),
        lambda store: store.wait("a", timeout=0.1),
        lambda store: store.flush(),
        lambda store: store.rebuild_summaries(),
    ],
    ids=["create", "get", "load", "events", "list", "wait", "flush", "rebuild_summaries"],
)
def test_a_forked_child_is_refused_with_the_remedy(embedded, call):
    embedded.create(id="a")
    embedded.flush()
    assert in_child(refused(lambda: call(embedded))) == REFUSED


def test_the_end_of_a_forked_child_costs_the_parent_nothing(folder):
    with trajstore.open(folder, partitions=1) as store:
        store.create(id="a")
        store.flush()
        (server,) = servers_of(folder)

        def leave():
            store.close()  # a `with` block that the child leaves
            return 0

        assert in_child(leave) == 0
        assert in_child(lambda: 0) == 0
        assert servers_of(folder) == [server]
        store.create(id="b")
        store.flush()
        with trajstore.open(folder) as other:
            assert [found.id for found in other.list()] == ["a", "b"]
        assert servers_of(folder) == [server]  # the parent is a member still
    assert servers_of(folder) == []


def test_a_forked_child_opens_the_folder_anew(folder):
    with trajstore.open(folder, partitions=1) as store:
        store.create(id="a")
        store.flush()

        def use():
            with trajstore.open(folder) as own:
                own.create(id="b")
                own.flush()
                return len(own.list())

        assert in_child(use) == 2
        assert [found.id for found in store.list()] == ["a", "b"]
    assert servers_of(folder) == []


def test_a_child_that_outlives_its_parents_store_does_not_keep_the_server(folder):
    store = trajstore.open(folder, partitions=1)
    gate, opener = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(opener)
        os.read(gate, 1)
        os._exit(0)
    try:
        store.close()
        assert servers_of(folder) == []
        with trajstore.open(folder):
            assert len(servers_of(folder)) == 1
        assert servers_of(folder) == []
    finally:
        os.close(gate)
        os.close(opener)
        os.waitpid(pid, 0)


def test_a_fork_at_any_moment_of_opening_and_closing_leaves_no_lock_with_the_child(folder):
    """A child of a fork in another thread would hold copies of the lock files that are open just then."""
    with ThreadPoolExecutor(1) as threads:
        using = threads.submit(lambda: [trajstore.open(folder, partitions=1).close() for _ in range(5)])

        def holds_a_lock():
            opened = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
            return len([path for path in opened if os.path.basename(path) in ("members", "door", "alive")])

        forks = 0
        while not using.done() or forks < 20:
            assert in_child(holds_a_lock) == 0
            forks += 1
        using.result(0)
    assert servers_of(folder) == []


def use_store(folder, name):
    """What a multiprocessing child does."""
    with trajstore.open(folder) as store:
        store.create(id=name)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_of_multiprocessing_share_the_folder(folder, method):
    with trajstore.open(folder, partitions=1) as store:
        context = multiprocessing.get_context(method)
        children = [context.Process(target=use_store, args=(folder, f"child-{i}")) for i in range(2)]
        for process in children:
            process.start()
        for process in children:
            process.join(60)
            assert process.exitcode == 0
        assert [found.id for found in store.list()] == ["child-0", "child-1"]
    assert servers_of(folder) == []


def test_a_subprocess_inherits_no_lock(folder, child):
    store = trajstore.open(folder, partitions=1)
    other = child()
    other.do("pass")
    descriptors = [os.readlink(f"/proc/{other.pid}/fd/{name}") for name in os.listdir(f"/proc/{other.pid}/fd")]
    assert not [path for path in descriptors if path.startswith(str(folder))]
    store.close()
    until(lambda: not servers_of(folder), what="the server's end")


@pytest.mark.parametrize("ending", ["", "sys.exit(0)", "raise ValueError('in the child')"])
def test_a_forked_child_that_ends_like_a_script_leaves_the_parents_store_alone(user, folder, ending):
    """It runs the parent's exit handlers, which must neither flush nor leave for it."""
    parent = user("partitions=1")
    parent.do("store.create(id='a'); store.flush()")
    code = (
        "import warnings; warnings.simplefilter('ignore'); pid = os.fork()\n"
        f"if pid == 0:\n    sys.stdin = open(os.devnull); {ending or 'pass'}; sys.exit(0)\n"
        "status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])"
    )
    parent.do(code)
    assert parent.ask("status") == (1 if ending.startswith("raise") else 0)
    assert len(servers_of(folder)) == 1
    assert parent.ask("[s.id for s in store.list()]") == ["a"]
    parent.do("store.close()")
    assert servers_of(folder) == []
