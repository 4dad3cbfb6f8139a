"""What a process that ends does with what it has not flushed."""

import os
import signal

import trajstore
from tests.store.children import servers_of, until


def test_an_unflushed_store_is_flushed_at_exit(user, folder):
    process = user()
    code = (
        "t = store.create(id='a')\n"
        "with t.segment(context=[1]) as s:\n"
        "    for i in range(500): s.tokens([i] * 100)\n"
        "    s.close('stop')\n"
        "t.close()"
    )
    assert process.last(code) == 0
    assert process.words() == ""
    with trajstore.open(folder) as store:
        assert len(store.load("a").token_ids) == 50_001


def test_an_open_segment_of_a_process_that_exits_is_kept_as_far_as_it_came(user, folder):
    assert user().last("s = store.create(id='a').segment(context=[1, 2]); s.tokens([3])") == 0
    with trajstore.open(folder) as store:
        loaded = store.load("a")
        assert loaded.status == "open"
        assert loaded.token_ids.tolist() == [1, 2, 3]


def test_a_failure_to_flush_at_exit_is_reported_and_does_not_hang(child, own_server, run_name):
    process = child()
    process.do(f"store = trajstore.open({own_server.url(run_name)!r}, partitions=1, timeout=1.0)")
    own_server.kill()
    process.last("store.create()", seconds=30)
    assert "not written within 1 s" in process.words()


def test_a_server_killed_before_the_exit_is_started_again_for_the_last_flush(user, folder):
    process = user()
    (server,) = servers_of(folder)
    os.kill(server, signal.SIGKILL)
    until(lambda: not servers_of(folder), what="the server's end")
    assert process.last("store.create(id='a')") == 0
    assert process.words() == ""
    assert servers_of(folder) == []
    with trajstore.open(folder) as store:
        assert [found.id for found in store.list()] == ["a"]


def test_an_interrupt_while_opening_leaves_no_server(child, folder):
    process = child()
    process.do(
        "import subprocess\n"
        "start = subprocess.Popen.__init__\n"
        "def start_and_interrupt(self, command, *more, **options):\n"
        "    start(self, command, *more, **options)\n"
        "    if '--unixsocket' in command: signal.raise_signal(signal.SIGINT)\n"
        "subprocess.Popen.__init__ = start_and_interrupt"
    )
    assert process.last(f"trajstore.open({str(folder)!r}, partitions=1)") == -signal.SIGINT
    assert "KeyboardInterrupt" in process.words()
    assert servers_of(folder) == []
