"""Readers of an archive after a fork, as torch's DataLoader makes its workers."""

import os
import threading

import numpy as np

import trajstore
from tests.builders import record_seed_case


def test_archive_reads_on_in_a_forked_child_though_another_thread_held_its_locks(durable, archive, folder):
    trajectory = record_seed_case(durable)
    expected = durable.load(trajectory.id).routed_experts
    archive()
    reader = trajstore.open_archive(folder)
    reader.load(trajectory.id)
    manifest, packs = reader._view._archive().manifest(0), reader._view._archive().packs
    held, released = threading.Event(), threading.Event()

    def hold():
        with manifest._lock, packs._lock:
            held.set()
            released.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = os.fork()
    if child == 0:
        same = np.array_equal(reader.load(trajectory.id).routed_experts, expected)
        os._exit(0 if same else 1)
    released.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
