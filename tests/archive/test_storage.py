"""What an archive asks of any place for its files: the same suite on a folder and on an S3 server."""

import mmap
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ulid import ULID

from tests.archive.places import age, paths
from trajstore.archive.storage.local import LocalStorage, open_storage
from trajstore.archive.storage.object_ranges import PART_BYTES, cut, requests
from trajstore.errors import SchemaError, Unavailable

LARGE = bytes(range(251)) * (20 * 2**20 // 251)
ODD_NAMES = [*"#?%&+*~^|:;=@$!,'\"`()[]{}<>\\", " ", "%20", "é", "日本", "..x", ".x", "x.", "a b", "-", "null"]


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """Location and options of an archive that nobody else uses."""
    if request.param == "local":
        return str(tmp_path / "archive"), None
    s3 = request.getfixturevalue("s3")
    return s3.url(str(ULID())), s3.options


@pytest.fixture
def storage(place):
    return open_storage(*place)


def test_a_file_reads_back_whole_in_parts_and_mapped(storage):
    storage.create("packs/07/x", b"0123456789")
    assert storage.read("packs/07/x") == b"0123456789"
    assert storage.read_ranges("packs/07/x", [(8, 2), (0, 3), (1, 1), (4, 0)]) == [b"89", b"012", b"1", b""]
    assert storage.size("packs/07/x") == 10
    assert bytes(storage.open_map("packs/07/x")) == b"0123456789"


def test_what_is_missing_is_not_found(storage):
    storage.create("here", b"1")
    for path in ("nowhere", "no/where", "here/below"):
        for ask in (
            storage.read,
            storage.size,
            storage.open_map,
            lambda path: storage.read_ranges(path, [(0, 1)]),
            lambda path: storage.read_ranges(path, []),
        ):
            with pytest.raises(FileNotFoundError):
                ask(path)


def test_a_folder_is_no_file(storage):
    storage.create("folder/x", b"1")
    for ask in (storage.read, storage.size, storage.open_map):
        with pytest.raises(FileNotFoundError):
            ask("folder")


def test_a_range_past_the_end_comes_back_shorter(storage):
    storage.create("x", b"0123456789")
    asked = [(8, 5), (10, 1), (500_000, 3), (0, 10**12), (2**62, 2**40)]
    assert storage.read_ranges("x", asked) == [b"89", b"", b"", b"0123456789", b""]
    assert storage.read_ranges("x", [(11, 1)]) == [b""]


def test_an_empty_file_is_a_file(storage):
    storage.create("a/empty", b"")
    storage.publish("pack", {"empty": b""}, lambda step: None)
    for path in ("a/empty", "pack/empty"):
        assert storage.read(path) == b""
        assert storage.read_ranges(path, [(0, 4), (7, 1)]) == [b"", b""]
        assert storage.size(path) == 0
        assert bytes(storage.open_map(path)) == b""
    assert paths(storage) == ["a/empty", "pack/empty"]


def test_large_files_travel_whole(storage):
    storage.publish("pack", {"c/0/0": memoryview(LARGE), "zarr.json": b"{}"}, lambda step: None)
    storage.create("table", LARGE)
    for path in ("pack/c/0/0", "table"):
        assert storage.size(path) == len(LARGE)
        assert storage.read(path) == LARGE
        mapped = storage.open_map(path)
        assert isinstance(mapped, mmap.mmap)
        assert mapped[:] == LARGE
        ranges = [(0, PART_BYTES + 1), (PART_BYTES - 1, 2), (5, len(LARGE)), (len(LARGE) - 3, 3)]
        assert storage.read_ranges(path, ranges) == [LARGE[start : start + length] for start, length in ranges]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(ranges=st.lists(st.tuples(st.integers(0, 1_200_000), st.integers(0, 700_000)), max_size=8))
def test_any_ranges_are_slices(storage, ranges):
    """Also where they overlap, repeat, touch, or lie far apart."""
    if not paths(storage):
        storage.create("x", LARGE[:1_000_000])
    got = storage.read_ranges("x", ranges)
    assert got == [LARGE[:1_000_000][start : start + length] for start, length in ranges]


@settings(max_examples=300)
@given(
    size=st.integers(0, 40),
    ranges=st.lists(st.tuples(st.integers(0, 45), st.integers(0, 30)), max_size=6),
)
def test_requests_cover_what_is_wanted_each_byte_once(size, ranges):
    """In units of 1 MiB, so that ranges reach over several parts; an object's bytes are their unit's number."""
    asked = requests([(start << 20, length << 20) for start, length in ranges])
    assert all(0 < length <= PART_BYTES for _, length in asked)
    assert all(a + length <= b for (a, length), (b, _) in pairwise(asked))
    small = [(start >> 20, length >> 20) for start, length in asked]
    blocks = [bytes(range(min(start, size), min(start + length, size))) for start, length in small]
    wanted = cut(ranges, small, blocks)
    assert wanted == [bytes(range(min(start, size), min(start + length, size))) for start, length in ranges]


def test_create_refuses_what_is_there(storage):
    storage.create("manifest/07/00000001.json", b"first")
    for data in (b"second", b"first"):
        with pytest.raises(FileExistsError):
            storage.create("manifest/07/00000001.json", data)
    assert storage.read("manifest/07/00000001.json") == b"first"
    assert paths(storage) == ["manifest/07/00000001.json"], "and it leaves nothing of its own behind"


RACE = """
import sys
from trajstore.archive.storage.local import open_storage

storage = open_storage(sys.argv[1], dict(pair.split("=", 1) for pair in sys.argv[3:]))
storage.create(f"ready/{sys.argv[2]}", b"")
print(flush=True)
sys.stdin.readline()
for number in range(30):
    try:
        storage.create(f"manifest/07/{number:08}.json", sys.argv[2].encode())
        print(number, flush=True)
    except FileExistsError:
        pass
"""


def test_exactly_one_of_two_processes_creates_a_file(place, storage):
    location, options = place
    pairs = [f"{name}={value}" for name, value in (options or {}).items()]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, location, name, *pairs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    for racer in racers:
        racer.stdout.readline()
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    won = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sorted(won[0] + won[1], key=int) == [str(number) for number in range(30)]
    for name, numbers in zip("ab", won, strict=True):
        for number in numbers:
            assert storage.read(f"manifest/07/{int(number):08}.json") == name.encode()


def test_publish_puts_all_files_in_place_and_says_its_steps(storage):
    seen = []
    storage.publish(
        "packs/07/00000001-x",
        {"zarr.json": b"{}", "routed/c/0": memoryview(b"abc")},
        lambda step: seen.append((step, paths(storage, "packs"))),
    )
    whole = ["packs/07/00000001-x/routed/c/0", "packs/07/00000001-x/zarr.json"]
    assert [step for step, _ in seen] == ["staged", "synced", "moved"]
    assert seen[0][1] == []
    assert seen[2][1] == whole
    assert paths(storage) == whole
    assert storage.read("packs/07/00000001-x/routed/c/0") == b"abc"


@pytest.mark.parametrize("step", ["staged", "synced"])
def test_a_publish_that_is_broken_off_leaves_nothing(storage, step):
    class LeaseLost(Exception):
        pass

    def stop(at):
        if at == step:
            raise LeaseLost

    with pytest.raises(LeaseLost):
        storage.publish("packs/07/1", {"zarr.json": b"{}"}, stop)
    assert paths(storage) == []


def test_errors_of_a_step_come_out_as_they_are(storage):
    """A step may ask Redis; its failure is not the archive's."""

    def stop(at):
        raise Unavailable("the server does not answer")

    with pytest.raises(Unavailable, match=r"^the server does not answer$"):
        storage.publish("packs/07/1", {"zarr.json": b"{}"}, stop)


def test_a_listing_holds_all_below_a_folder_and_only_that(storage):
    before = time.time()
    for path in ("a/x", "a/b/y", "ab/z", "a.txt", "top"):
        storage.create(path, path.encode())
    assert paths(storage) == ["a.txt", "a/b/y", "a/x", "ab/z", "top"]
    assert paths(storage, "a") == ["a/b/y", "a/x"]
    assert paths(storage, "a/b") == ["a/b/y"]
    assert paths(storage, "b") == paths(storage, "a/x") == paths(storage, "top/x") == []
    found = next(storage.list("ab"))
    assert found.size == 4
    assert abs(found.modified - before) < 3600


def test_a_listing_is_whole_beyond_a_thousand_files(storage):
    names = [f"{number:04}" for number in range(1203)]
    storage.publish("many", dict.fromkeys(names, b"x"), lambda step: None)
    assert paths(storage, "many") == [f"many/{name}" for name in names]
    storage.remove(f"many/{name}" for name in names[1:])
    assert paths(storage) == ["many/0000"]


def test_odd_names_are_kept(storage):
    for name in ODD_NAMES:
        storage.create(f"odd/{name}", name.encode())
    assert paths(storage, "odd") == sorted(f"odd/{name}" for name in ODD_NAMES)
    for name in ODD_NAMES:
        assert storage.read(f"odd/{name}") == name.encode()
        assert storage.size(f"odd/{name}") == len(name.encode())
    storage.remove([f"odd/{name}" for name in ODD_NAMES])
    assert paths(storage) == []


@pytest.mark.parametrize("path", ["", "/dev/null/x", "../x", "a/../../x", "./x", "a//b", "a/", "a\0b"])
def test_a_path_that_leads_elsewhere_is_refused(storage, path):
    for use in (
        storage.read,
        storage.size,
        storage.open_map,
        lambda path: storage.read_ranges(path, [(0, 1)]),
        lambda path: storage.create(path, b""),
        lambda path: storage.remove([path]),
        lambda path: storage.publish(path, {"x": b""}, lambda step: None),
        lambda path: storage.publish("x", {path: b""}, lambda step: None),
    ):
        with pytest.raises(SchemaError, match="no path inside an archive"):
            use(path)
    assert paths(storage) == []


def test_removed_files_are_gone_and_removing_them_again_is_no_error(storage):
    storage.publish("packs/07/1", {"zarr.json": b"{}", "events/c/0": b"x"}, lambda step: None)
    storage.create("packs/07/2", b"x")
    storage.remove(["packs/07/1/zarr.json", "packs/07/1/events/c/0", "packs/08/none", "packs/07/2/none"])
    assert paths(storage) == ["packs/07/2"]
    storage.remove(["packs/07/1/zarr.json"])
    storage.remove([])
    storage.remove(["packs/07/2"])
    assert paths(storage) == []
    storage.create("packs/07/2", b"again")
    assert storage.read("packs/07/2") == b"again"


def test_staging_is_cleared_of_what_is_old_and_ours(storage):
    old, new = ULID.from_timestamp(time.time() - 7200), ULID()
    for path in (f"staging/{old}", f"staging/{new}", "staging/foreign"):
        storage.create(path, b"x")
    if isinstance(storage, LocalStorage):
        age(storage.path / "staging")
    storage.clear_staging(older_than=3600)
    assert paths(storage) == ["staging/" + name for name in sorted([str(new), "foreign"])]


def test_a_location_leads_back_to_its_archive(place, storage):
    storage.create("x", b"1")
    secrets = {name: value for name, value in (place[1] or {}).items() if "key" in name}
    assert open_storage(storage.location, secrets).read("x") == b"1"
