"""Passwords and keys are used, and never shown, logged or stored."""

import logging
from collections.abc import Iterator

import pytest

import trajstore
from tests.cli.running import invoke
from tests.consumers.rollouts import finish
from trajstore.archive.root import ArchiveRoot
from trajstore.archiver import Archiver
from trajstore.log.wire import describe_url
from trajstore.materializer import Materializer

SECRET = "S3cr3tW0rd"


def said(error: BaseException | None) -> Iterator[str]:
    """All that an error and those beneath it say, however they are shown."""
    while error is not None:
        yield from (str(error), repr(error), repr(error.args), *getattr(error, "__notes__", ()))
        error = error.__cause__ or error.__context__


@pytest.fixture
def guarded(own_server):
    """A server with a password."""
    with own_server.client() as client:
        client.config_set("requirepass", SECRET)
    return own_server


def url_with(server, run_name, password):
    return server.url(run_name).replace("redis://", f"redis://default:{password}@")


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:{}@127.0.0.1:1/0?run=x",
        "redis://user:p%40{}@127.0.0.1:1/0?run=x",
        "redis://127.0.0.1:1/0?run=x&username=u&password={}",
        "redis://:{}/y@h:1/0?run=x",
        "redis://:{}#y@h:1/0?run=x",
        "redis://u:{}?y@h:1/0?run=x",
        "redis://u:{}?y@h:1/0",
        "redis://u:{}[@h:1/0?run=x",
        "redis://u:{}\u2100@h:1/0?run=x",
        "redis://u:{}",
        "redis://u:{}@h:port/0?run=x",
        "redis://u:{}@h:99999/0?run=x",
        "redis://h:1/0?run=x&password={}&bogus=1",
        "redis://h:1/0?run=x&socket_timeout={}",
        "redis://h:1/0?run=x&protocol={}",
        "rediss://h:1/0?run=x&ssl_cert_reqs={}",
        "rediss://u:{}@127.0.0.1:1/0?run=x&ssl_keyfile=/nowhere&ssl_password={}",
        "http://u:{}@h/0?run=x",
        "unix://u:{}@/nowhere?run=x",
        "redis:/u:{}@h:1/0?run=x",
    ],
)
def test_url_that_leads_nowhere_is_an_error_without_its_password(url, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(trajstore.TrajstoreError) as refused:
        trajstore.open(url.replace("{}", SECRET), timeout=0.5)
    assert SECRET not in "".join(said(refused.value))
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:p@h:1/0?run=x", "redis://h:1/0"),
        ("redis://h", "redis://h"),
        ("rediss://[::1]:6379/0?run=a@b", "rediss://[::1]:6379/0"),
        ("unix:///run/x.sock?run=x", "unix:///run/x.sock"),
        ("redis://u:p?x@h:1/0", "redis://***"),
        ("redis://u:p", "redis://***"),
        ("s3://bucket/exp1?secret_access_key=p", "s3://bucket/exp1"),
        ("runs/what?@1", "runs/what?@1"),
    ],
)
def test_url_is_shown_without_what_may_be_secret(url, shown):
    assert describe_url(url) == shown


def test_wrong_password_is_named_as_such_and_not_repeated(guarded, run_name, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(trajstore.Unavailable, match="check the user and password of the URL") as refused:
        trajstore.open(url_with(guarded, run_name, SECRET + "x"), timeout=2.0)
    assert SECRET not in "".join(said(refused.value))
    assert SECRET not in caplog.text


def test_password_is_shown_by_no_object_and_stored_nowhere(guarded, run_name, tmp_path, caplog):
    """Neither in the log, nor in the server's append-only file, nor in the archive."""
    caplog.set_level(logging.DEBUG)
    url, archive = url_with(guarded, run_name, SECRET), tmp_path / "archive"
    with trajstore.open(url, archive=archive, partitions=1) as store:
        trajectory = finish(store, group="g", group_size=1)
        Materializer(store).run(once=True)
        archiver = Archiver(store)
        archiver.run(once=True)
        shown = [store, store.location, trajectory, store.archive, archiver, store.wire, store.keys, store.hot]
        assert SECRET not in "".join(map(repr, shown))
        assert run_name in repr(store)
    files = [path for path in archive.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert run_name.encode() in guarded.aof().read_bytes()
    assert SECRET.encode() not in guarded.aof().read_bytes()
    assert SECRET not in caplog.text


def test_connection_that_is_lost_is_an_error_without_the_password(guarded, run_name, caplog):
    caplog.set_level(logging.DEBUG)
    with trajstore.open(url_with(guarded, run_name, SECRET), partitions=1, timeout=1.0) as store:
        trajectory = store.create()
        store.flush()
        guarded.kill()
        trajectory.close()
        with pytest.raises(trajstore.Unavailable) as lost:
            store.flush(trajectory.id)
        with pytest.raises(trajstore.Unavailable) as silent:
            store.load(trajectory.id)
    for error in (lost.value, silent.value):
        assert SECRET not in "".join(said(error))
    assert SECRET not in caplog.text


@pytest.mark.parametrize("password", [SECRET, SECRET + "x"])
def test_command_never_prints_the_password(guarded, run_name, password):
    """Given as an argument or by the environment, to a server that takes it and one that does not."""
    with trajstore.open(url_with(guarded, run_name, SECRET), partitions=1) as store:
        finish(store, id="x")
    url = url_with(guarded, run_name, password)
    for arguments, environment in (
        (["ls", url], {}),
        (["ls"], {"TRAJSTORE_URL": url}),
        (["show", url, "x"], {}),
        (["show", url, "absent"], {}),
        (["backlog", url], {}),
        (["archive", url, "--once"], {}),
        (["materialize", url, "--once"], {}),
        (["verify", url], {}),
        (["rebuild", url, "--partitions", "3"], {}),
    ):
        assert SECRET not in invoke(*arguments, env=environment).output, arguments


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/x?access_key_id=AKIA{}&secret_access_key={}&region=eu-west-1",
        "s3://bucket/x?aws_session_token={}&region=eu-west-1",
    ],
)
def test_keys_of_an_object_store_are_neither_shown_nor_recorded(url):
    """What a run records is `location`."""
    url = url.replace("{}", SECRET)
    root = ArchiveRoot.at(url)
    assert root.location == "s3://bucket/x?region=eu-west-1"
    assert SECRET not in repr(root) + repr(root.storage)
    done = invoke("archive", url, "--once")
    assert done.exit_code == 1
    assert SECRET not in done.output
