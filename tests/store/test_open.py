"""What `open` and `open_archive` take, what they refuse, and that a refusal changes nothing."""

import json
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

import trajstore
from tests.builders import record_seed_case
from tests.store.children import record_of, servers_of, until
from trajstore.archiver import Archiver
from trajstore.recovery import recover


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with the files' content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# Folders


def test_a_folder_of_something_else_is_refused_and_left_alone(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    before = tree(folder)
    with pytest.raises(trajstore.Conflict, match=r"not empty and no trajstore \(it holds notes\.txt\)"):
        trajstore.open(folder)
    assert tree(folder) == before


def test_a_file_whose_name_begins_like_the_marker_does_not_make_a_store(folder):
    folder.mkdir()
    (folder / "store.jsonl").write_text("{}")
    with pytest.raises(trajstore.Conflict, match=r"it holds store\.jsonl"):
        trajstore.open(folder)


def test_a_file_is_no_folder(folder):
    folder.write_text("mine")
    with pytest.raises(trajstore.Conflict, match="is a file"):
        trajstore.open(folder)
    assert folder.read_text() == "mine"


@pytest.mark.parametrize("path", ["file/below", "link", "n" * 300, "nul\0byte"])
def test_a_path_that_cannot_be_a_folder_is_a_clear_error_and_changes_nothing(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
    before = tree(tmp_path)
    with pytest.raises(trajstore.Unavailable, match="cannot be used as a store"):
        trajstore.open(tmp_path / path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read only", "closed"])
def test_a_folder_that_one_may_not_write_to_is_a_clear_error(child, mode):
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o755)
        folder = Path(above) / "store"
        folder.mkdir(mode=mode)
        folder.chmod(mode)
        process = child(cwd=Path("/"))
        if os.getuid() == 0:
            process.do("os.setgid(65534); os.setuid(65534)")
        with pytest.raises(AssertionError, match=r"Unavailable: .* cannot be used as a store: .*[Pp]ermission"):
            process.do(f"trajstore.open({str(folder)!r})")
        folder.chmod(0o755)
        assert list(folder.iterdir()) == []


def test_create_false_wants_a_store_and_creates_nothing(folder):
    with pytest.raises(trajstore.NotFound, match=r"no trajstore in .*no store\.json"):
        trajstore.open(folder, create=False)
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(trajstore.NotFound):
        trajstore.open(folder, create=False)
    assert list(folder.iterdir()) == []


def test_create_false_wants_a_run_on_a_server_and_creates_nothing(backend, run_name, tmp_path):
    with pytest.raises(trajstore.NotFound, match="there is no run"):
        trajstore.open(backend.url(run_name), create=False, archive=tmp_path / "archive")
    with backend.client() as client:
        assert list(client.scan_iter(f"*{run_name}*")) == []
    assert not (tmp_path / "archive").exists()


def test_a_store_of_a_newer_format_is_refused_and_left_alone(folder):
    with trajstore.open(folder, partitions=1):
        pass
    (folder / "store.json").write_text(json.dumps({"format": 2, "run": "main"}))
    before = tree(folder)
    with pytest.raises(trajstore.SchemaError, match="format 2; this trajstore reads up to 1"):
        trajstore.open(folder)
    assert tree(folder) == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "one"}'])
def test_a_marker_that_cannot_be_read_is_an_error_that_names_it(folder, content):
    folder.mkdir()
    (folder / "store.json").write_text(content)
    with pytest.raises(trajstore.SchemaError, match=r"store\.json cannot be read"):
        trajstore.open(folder)
    assert [path.name for path in folder.iterdir()] == ["store.json"]


@pytest.mark.parametrize(
    "leftover",
    ["", ".store.json.4711", "store.json", "redis/", "archive/packs/", "archive/.archive.json.4711"],
)
def test_what_a_crash_while_the_folder_was_made_has_left_opens(folder, leftover):
    folder.mkdir()
    if not leftover.startswith((".", "store.json")) and leftover:
        (folder / "store.json").write_text('{"format": 1, "run": "main"}')
    place = folder / leftover
    if leftover.endswith("/"):
        place.mkdir(parents=True)
    elif leftover:
        place.parent.mkdir(exist_ok=True)
        place.write_text('{"format": 1, "run": "main"}' if leftover == "store.json" else "")
    with trajstore.open(folder, partitions=1) as store:
        record_seed_case(store, id="a")
    with trajstore.open(folder, create=False) as store:
        assert len(store.load("a")) == 10


def test_many_threads_open_one_new_folder_at_once(folder):
    together = threading.Barrier(8)

    def open_() -> trajstore.Store:
        together.wait(30)
        return trajstore.open(folder, partitions=1)

    with ExitStack() as stores, ThreadPoolExecutor(8) as threads:
        opened = [stores.enter_context(future.result(60)) for future in [threads.submit(open_) for _ in range(8)]]
        assert len({store.incarnation for store in opened}) == 1
        assert len(servers_of(folder)) == 1
    assert servers_of(folder) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partitions": 0}, "partitions must lie in"),
        ({"partitions": 5000}, "partitions must lie in"),
        ({"partitions": "4"}, "partitions must be a non-negative integer"),
        ({"timeout": 0}, "timeout must be positive"),
        ({"timeout": float("nan")}, "timeout must be positive"),
        ({"timeout": float("inf")}, "timeout must be positive"),
        ({"ack": "disk"}, "ack must be 'memory' or 'fsync'"),
        ({"buffer_bytes": "1 GB"}, "buffer_bytes must be a non-negative integer"),
        ({"archive": 7}, "a folder or a URL, not 7"),
        ({"archive": b"cold"}, "a folder or a URL, not b'cold'"),
        ({"archive_options": {"region": "x"}}, "archive_options need archive="),
        (
            {"archive_options": {"region": "x"}, "archive": "cold"},
            "region are an object store's, but .*cold is a folder",
        ),
        ({"archive_options": "region=x"}, "a mapping of names to text, .* not str"),
        ({"archive_options": {1: "x"}, "archive": "s3://b/x"}, "not dict with other keys"),
        ({"archive_options": {"region": None}, "archive": "s3://b/x"}, "region of the object store must be text"),
        ({"archive_options": {"regoin": "x"}, "archive": "s3://b/x"}, "regoin"),
    ],
)
def test_options_that_cannot_be_right_are_refused_before_anything_is_made(folder, options, message):
    with pytest.raises(trajstore.SchemaError, match=message):
        trajstore.open(folder, **options)
    assert not folder.exists()


def test_options_of_an_object_store_are_refused_where_the_run_has_none(open_store, folder, tmp_path):
    open_store()
    with pytest.raises(trajstore.SchemaError, match="has no archive; leave them out, or give the archive"):
        open_store(archive_options={"region": "x"})
    open_store(archive=tmp_path / "cold")
    with pytest.raises(trajstore.SchemaError, match=r"its archive in the folder .*cold; leave them out"):
        open_store(archive_options={"region": "x"})
    trajstore.open(folder, partitions=1).close()
    with pytest.raises(trajstore.SchemaError, match="its archive in the folder"):
        trajstore.open(folder, archive_options={"region": "x"})
    assert servers_of(folder) == []


def test_an_empty_location_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(trajstore.SchemaError, match="the location is empty"):
        trajstore.open("")
    assert list(tmp_path.iterdir()) == []


def test_another_number_of_partitions_is_refused(folder):
    with trajstore.open(folder, partitions=3):
        pass
    with pytest.raises(trajstore.Conflict, match="has 3 partitions, which are fixed; 4 were asked for"):
        trajstore.open(folder, partitions=4)
    assert servers_of(folder) == []


def test_an_open_that_fails_after_the_server_was_started_stops_it(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(trajstore.Conflict, match="not empty and no archive"):
        trajstore.open(folder, archive=tmp_path / "other")
    assert servers_of(folder) == []


# URLs


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("redis://localhost:1/0", r"names no run; add it: redis://localhost:1/0\?run=NAME"),
        ("redis://localhost:1/0?run=", "names no run|cannot be an id"),
        ("redis://localhost:1/0?run=a/b", "cannot be an id"),
        ("http://localhost/?run=a", "no usable Redis URL"),
        ("redis://localhost:port/0?run=a", "no usable Redis URL"),
        ("redis://localhost:1/0?run=a&colour=blue", "no usable Redis URL"),
        ("redis://localhost:1/0?run=a&retry=3", "its option 'retry' can be given in code only"),
    ],
)
def test_a_url_that_cannot_be_right_is_refused(location, message):
    with pytest.raises(trajstore.SchemaError, match=message):
        trajstore.open(location)


def test_an_embedded_server_is_reached_by_its_socket_too(folder):
    with trajstore.open(folder, partitions=1) as store:
        store.create(id="a")
        store.flush()
        socket = record_of(folder)["socket"]
        with trajstore.open(f"unix://{socket}?run=main", archive=folder / "archive") as same:
            assert [found.id for found in same.list()] == ["a"]
            assert socket in repr(same)


def test_a_password_is_shown_in_no_error_and_no_repr(own_server, run_name):
    with own_server.client() as client:
        client.config_set("requirepass", "s3cret")
    url = own_server.url(run_name).replace("redis://", "redis://default:{}@")
    with trajstore.open(url.format("s3cret"), partitions=1) as store:
        assert "s3cret" not in repr(store)
        assert "s3cret" not in store.location
    with pytest.raises(trajstore.Unavailable, match="check the user and password") as refused:
        trajstore.open(url.format("wr0ng"))
    assert "wr0ng" not in str(refused.value)
    own_server.kill()
    with pytest.raises(trajstore.Unavailable, match="did not answer") as gone:
        trajstore.open(url.format("s3cret"))
    assert "s3cret" not in str(gone.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cret@host:1/0",
        "redis://:s3cret/x@host:1/0",
        "redis://:s3cret#x@host:1/0",
        "redis://host:1/0?password=s3cret",
    ],
)
def test_a_password_is_not_shown_where_the_url_is_at_fault(url):
    with pytest.raises(trajstore.SchemaError, match="names no run") as error:
        trajstore.open(url)
    assert "s3cret" not in str(error.value)


@pytest.fixture
def loading(own_server, run_name):
    """Stops a server that holds a run, and starts it again as one that takes long to load its log."""
    with ExitStack() as starting:

        def load(microseconds: int) -> str:
            with trajstore.open(own_server.url(run_name), partitions=1) as store:
                for _ in range(3000):  # it looks at its clients only now and then
                    store.create()
            own_server.stop()
            own_server.options["key-load-delay"] = str(microseconds)
            thread = threading.Thread(target=own_server.start)
            thread.start()
            starting.callback(thread.join, 60)
            retries = Retry(NoBackoff(), 0)  # by themselves they would wait until it has loaded
            with redis.Redis(port=own_server.port, protocol=2, retry=retries) as client:
                until(lambda: is_loading(client), what="a server that loads")
            return own_server.url(run_name)

        yield load


def is_loading(client: "redis.Redis[bytes]") -> bool:
    try:
        client.ping()
    except redis.BusyLoadingError:
        return True
    except redis.ConnectionError:
        return False
    raise AssertionError("it has loaded its log before anybody could look")


@pytest.mark.parametrize("how", ["open", "recover"])
def test_opening_waits_for_a_server_behind_a_url_that_is_loading_its_log(loading, how, caplog):
    url = loading(100)
    if how == "recover":
        assert recover(url).summaries == 3000
    with trajstore.open(url, create=False) as store:
        assert len(store.list()) == 3000
    assert caplog.text.count("the server is loading its log; waiting up to 30 s") == 1


def test_waiting_for_a_server_that_is_loading_its_log_has_a_deadline_and_says_what_it_waited_for(loading):
    with pytest.raises(trajstore.Unavailable, match=r"still loading its log after 0\.5 s.*longer timeout="):
        trajstore.open(loading(200), timeout=0.5)


def test_opening_waits_a_moment_for_a_server_that_has_just_been_started(own_server, run_name):
    trajstore.open(own_server.url(run_name), partitions=1).close()
    own_server.stop()
    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(trajstore.open, own_server.url(run_name), create=False)
        own_server.start()
        opening.result(30).close()


def test_fsync_is_refused_on_a_server_that_does_not_fsync(own_server, run_name):
    with pytest.raises(trajstore.Conflict, match="appendfsync everysec"):
        trajstore.open(own_server.url(run_name), ack="fsync")


# Archives


@pytest.fixture
def archived(folder):
    """A folder whose store has one trajectory in the archive only and one in the hot log only."""
    with trajstore.open(folder, partitions=1, ack="fsync") as store:
        record_seed_case(store, id="old").close()
        store.flush()
        Archiver(store).run(once=True)
        record_seed_case(store, id="new")
    return folder


@pytest.mark.parametrize("place", [".", "archive"])
def test_an_archive_is_read_without_any_server(archived, child, place):
    process = child(env={"PATH": "", "TRAJSTORE_SERVER": "/nowhere"})
    process.do(f"archive = trajstore.open_archive({str(archived / place)!r})")
    assert process.ask("[s.id for s in archive.list()]") == ["old"]
    assert process.ask("archive.load('old').token_ids.tolist()") == [1, 2, 3, 4, 5, 10, 11, 12, 13, 14]
    assert process.ask("len(archive.events('old')) > 5 and len(archive.overlaps('old')) == 1")
    with pytest.raises(AssertionError, match="NotFound"):
        process.ask("archive.load('new')")
    assert servers_of(archived) == []


def test_an_archive_folds_as_the_store_does(archived):
    archive = trajstore.open_archive(archived)
    with trajstore.open(archived) as store:
        for policy in ("last_segment_wins", "as_sampled"):
            one, other = archive.load("old", policy=policy), store.load("old", policy=policy)
            assert one.routed_experts.tobytes() == other.routed_experts.tobytes()
            assert np.array_equal(one.logprobs, other.logprobs, equal_nan=True)


@pytest.mark.parametrize(
    ("place", "options", "message"),
    [
        (".", {"region": "x"}, "region are an object store's, but .* is a folder"),
        ("archive", "region=x", "a mapping of names to text, .* not str"),
        ("archive", [("region", "x")], "not list"),
    ],
)
def test_open_archive_refuses_options_that_cannot_be_right(archived, place, options, message):
    with pytest.raises(trajstore.SchemaError, match=message):
        trajstore.open_archive(archived / place, options=options)


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_where_no_archive_is_open_archive_finds_none_and_makes_none(tmp_path, place):
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    with pytest.raises(trajstore.NotFound, match="there is no archive"):
        trajstore.open_archive(tmp_path / place)
    assert tree(tmp_path) == before


def test_an_archive_elsewhere_is_found_again_without_being_named(folder, tmp_path):
    with trajstore.open(folder, partitions=1, archive=tmp_path / "cold"):
        pass
    with trajstore.open(folder) as store:
        assert store.archive.root.location == str(tmp_path / "cold")
    assert not (folder / "archive").exists()


def test_a_run_on_a_server_finds_its_archive_again_without_being_told(open_store, tmp_path):
    open_store(archive=tmp_path / "cold")
    assert open_store().archive.root.location == str(tmp_path / "cold")


def test_a_second_archive_would_split_the_run_and_is_refused(open_store, tmp_path):
    open_store(archive=tmp_path / "cold")
    with pytest.raises(trajstore.Conflict, match="a second one would split the run"):
        open_store(archive=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_archive_that_is_not_where_it_was_is_not_begun_anew(open_store, tmp_path):
    """A reader on a host that does not have it mounted must not find an empty one."""
    open_store(archive=tmp_path / "cold")
    (tmp_path / "cold").rename(tmp_path / "moved")
    with pytest.raises(trajstore.Conflict, match=r"holds no archive\. Give archive= where"):
        open_store()
    assert not (tmp_path / "cold").exists()
    assert open_store(archive=tmp_path / "moved").archive.root.location == str(tmp_path / "moved")
    assert open_store().archive.root.location == str(tmp_path / "moved")


def test_an_embedded_store_whose_archive_was_removed_is_refused(archived):
    (archived / "archive").rename(archived.with_name("taken away"))
    with pytest.raises(trajstore.Conflict, match="holds no archive"):
        trajstore.open(archived)
    assert servers_of(archived) == []


def test_an_archive_of_a_lost_hot_log_is_not_written_to_by_a_new_run(open_store, archived, tmp_path):
    with pytest.raises(trajstore.Conflict, match="the hot log was lost"):
        open_store(archive=archived / "archive")


def test_an_archive_of_another_run_is_refused(open_store, archived):
    open_store()
    with pytest.raises(trajstore.Conflict, match="archives incarnation"):
        open_store(archive=archived / "archive")
