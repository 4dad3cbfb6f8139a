"""Memory cut from slabs: nobody's bytes lie over another's, and a slab goes with the last that is cut from it."""

import gc
import weakref

import numpy as np

from trajstore.chance import Chance
from trajstore.slabs import Slabs


def test_arrays_do_not_overlap_whatever_their_sizes():
    slabs = Slabs()
    sizes = [100, 65_536, 65_537, 1_572_864, 3 << 20, 4 << 20, 70_001] * 6
    arrays = [slabs.cut(size) for size in sizes]
    for number, array in enumerate(arrays):
        array.fill(number)
    assert [len(array) for array in arrays] == sizes
    assert all((array == number).all() for number, array in enumerate(arrays))


def test_slab_goes_with_its_last_array():
    slabs = Slabs()
    first, second = slabs.cut(3 << 20), slabs.cut(3 << 20)
    assert first.base is second.base
    slab = weakref.ref(first.base)
    while slabs.cut(3 << 20).base is slab():
        pass
    del first
    gc.collect()
    assert slab() is not None
    del second
    gc.collect()
    assert slab() is None


def test_arrays_begin_at_whole_cache_lines_of_their_slab():
    slabs = Slabs()
    places = [np.asarray(slabs.cut(size)).ctypes.data for size in (65_537, 70_001, 1_572_863, 99_999)]
    assert {(place - places[0]) % 64 for place in places} == {0}


def test_thread_that_cuts_while_another_does_gets_memory_of_its_own_and_one_rest_is_kept(monkeypatch):
    slabs, empty, between = Slabs(), np.empty, []

    def interrupted(*arguments):
        if not between:
            between.append(None)
            between[0] = slabs.cut(1 << 20)
        return empty(*arguments)

    monkeypatch.setattr(np, "empty", interrupted)
    first = slabs.cut(1 << 20)
    second = slabs.cut(1 << 20)
    for number, array in enumerate((first, between[0], second)):
        array.fill(number)
    assert [array.max() for array in (first, between[0], second)] == [0, 1, 2]
    assert len(slabs._rests) == 1


def test_what_is_small_or_large_by_itself_keeps_no_slab():
    slabs = Slabs()
    assert all(np.asarray(slabs.cut(size)).base is None for size in (1, 65_535, 4 << 20, 100 << 20))


def test_no_word_is_given_twice():
    chance = Chance()
    words = [chance.word() for _ in range(2_000)]
    assert len(set(words)) == 2_000
    assert max(words).bit_length() > 60
    assert max(words) < 1 << 64
