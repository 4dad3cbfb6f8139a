"""An S3 server as the place of an archive: options and secrets, lost and odd replies, silence, and forks."""

import re
import threading

import pytest
from ulid import ULID

from tests.archive.places import contents, paths, run
from tests.s3 import Answer, Proxy
from trajstore.archive.storage.local import open_storage
from trajstore.archive.storage.object_errors import credentials_advice
from trajstore.errors import SchemaError, Unavailable


def test_options_may_stand_in_the_url_or_in_the_environment(s3, monkeypatch):
    name = s3.url(str(ULID()))
    open_storage(name, s3.options).create("x", b"1")
    query = "&".join(f"{key}={value}" for key, value in s3.options.items())
    in_url = open_storage(f"{name}?{query}")
    assert in_url.read("x") == b"1"
    assert in_url.location == open_storage(name, s3.options).location
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "from the environment")
    in_environment = open_storage(name)
    assert in_environment.read("x") == b"1"
    assert in_environment.location == name
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(SchemaError, match="unset it"):  # it would win over what is given
        open_storage(name, s3.options)


def test_secrets_are_never_shown(s3):
    secret, token = s3.options["secret_access_key"], "a-session-token"

    def betray(request, ask):
        return Answer.error(403, f"no {secret} nor {token}")

    with Proxy(s3, betray) as proxy:
        url = f"{s3.url('x')}?endpoint={proxy.endpoint}&secret_access_key={secret}&token={token}"
        storage = open_storage(url, {"region": "us-east-1", "access_key_id": "tester"})
        with pytest.raises(Unavailable, match=r"403 no .* nor .* Check the credentials") as caught:
            storage.read("x")
        with pytest.raises(Unavailable, match="Check the credentials") as written:
            storage.create("x", b"")
    for text in (storage.location, repr(storage), str(caught.value), str(written.value)):
        assert secret not in text
        assert token not in text
    assert storage.location == f"{s3.url('x')}?endpoint={proxy.endpoint}&region=us-east-1"


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "ExpiredToken"])
def test_refused_credentials_are_an_error_that_names_what_to_set(s3, code):
    with Proxy(s3, lambda request, ask: Answer.error(400 if code == "ExpiredToken" else 403, code)) as proxy:
        storage = open_storage(s3.url("x"), proxy.options)
        for use in (lambda: storage.read("x"), lambda: storage.create("x", b"")):
            with pytest.raises(
                Unavailable, match=f"{code}.*credentials.*AWS_ACCESS_KEY_ID.*secret_access_key.*archive_options"
            ):
                use()


def test_missing_credentials_are_told_from_a_silent_server(s3, monkeypatch):
    """Without any, the metadata service of a cloud's machine is asked; here it lies where nobody answers."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    options = {"endpoint": s3.endpoint, "region": "us-east-1", "timeout": "1"}
    with pytest.raises(Unavailable, match=r"no credentials.*AWS_ACCESS_KEY_ID.*session_token"):
        open_storage(s3.url("x"), options).read("x")


@pytest.mark.parametrize(
    ("scheme", "text", "names"),
    [
        ("gs", "http://metadata.google.internal/token", "GOOGLE_SERVICE_ACCOUNT.*service_account in"),
        ("az", "http://169.254.169.254/metadata/identity", "AZURE_STORAGE_ACCOUNT_KEY.*account_key in"),
    ],
)
def test_each_kind_of_store_names_its_own_credentials(scheme, text, names):
    assert re.search(names, credentials_advice(Exception(text), scheme))
    assert credentials_advice(Exception("error sending request"), scheme) is None


def test_folders_that_a_console_made_are_no_files(s3):
    name = str(ULID())
    s3.put(f"{name}/", b"")
    s3.put(f"{name}/packs/", b"")
    storage = open_storage(s3.url(name), s3.options)
    assert paths(storage, "packs") == []
    assert "" not in paths(storage)


def test_a_missing_bucket_is_unavailable(s3):
    storage = open_storage("s3://no-such-bucket/x", s3.options)
    for use in (
        lambda: storage.read("x"),
        lambda: storage.create("x", b""),
        lambda: list(storage.list("")),
        lambda: storage.publish("p", {"x": b""}, lambda step: None),
    ):
        with pytest.raises(Unavailable, match="NoSuchBucket"):
            use()


USES = {
    "read": lambda storage: storage.read("x"),
    "read_ranges": lambda storage: storage.read_ranges("x", [(0, 1), (10**6, 1)]),
    "size": lambda storage: storage.size("x"),
    "open_map": lambda storage: storage.open_map("x"),
    "create": lambda storage: storage.create("y", b""),
    "list": lambda storage: list(storage.list("")),
    "remove": lambda storage: storage.remove(["x"]),
    "publish": lambda storage: storage.publish("p", {"x": b"", "y": b""}, lambda step: None),
}


@pytest.mark.parametrize("use", USES)
def test_a_server_that_is_silent_or_gone_is_unavailable(use, silent_s3, s3):
    """The session's time limit per test is far above the deadline that is asked for, and far below for ever."""
    for options in (silent_s3, {**s3.options, "endpoint": "http://127.0.0.1:1"}):
        storage = open_storage(s3.url("x"), {**options, "timeout": "1"})
        with pytest.raises(Unavailable, match=r"try again|untouched") as caught:
            USES[use](storage)
        assert storage.location in str(caught.value)


@pytest.fixture(scope="module")
def silent_s3(s3):
    """Options that lead to something that takes requests and never answers."""
    enough = threading.Event()

    def wait(request, ask):
        enough.wait(60)
        return Answer(lost=True)

    with Proxy(s3, wait) as proxy:
        yield proxy.options
        enough.set()


def once(spoil, *, path):
    """Spoil the first PUT of a path, then let everything through."""
    spoilt = []

    def rule(request, ask):
        if request.method == "PUT" and request.path.endswith(path) and not spoilt:
            spoilt.append(request)
            return spoil(request, ask)
        return ask(request)

    return rule


def written_then(answer):
    def spoil(request, ask):
        assert ask(request).status == 200
        return answer

    return spoil


@pytest.mark.parametrize("answer", [Answer(lost=True), Answer.error(500, "InternalError")], ids=["lost", "500"])
def test_a_put_whose_reply_got_lost_was_ours(s3, answer):
    with Proxy(s3, once(written_then(answer), path="/record")) as proxy:
        storage = open_storage(s3.url(str(ULID())), proxy.options)
        storage.create("record", b"mine")
        assert sum(request.path.endswith("/record") and request.method == "PUT" for request in proxy.requests) == 2
        assert storage.read("record") == b"mine"
        with pytest.raises(FileExistsError):
            storage.create("record", b"mine")


def test_a_put_that_got_lost_before_a_rivals_is_not_ours(s3):
    def rival(request, ask):
        request.body = b"theirs"
        assert ask(rewritten(request)).status == 200
        return Answer(lost=True)

    with Proxy(s3, once(rival, path="/record")) as proxy:
        storage = open_storage(s3.url(str(ULID())), proxy.options)
        with pytest.raises(FileExistsError):
            storage.create("record", b"mine")
        assert storage.read("record") == b"theirs"


def rewritten(request):
    """A request whose body was exchanged."""
    request.headers["content-length"] = str(len(request.body))
    request.headers.pop("x-amz-content-sha256", None)
    return request


def test_a_put_that_another_one_held_up_is_made_after_all(s3):
    """A 409 is no "exists": the other put may come to nothing."""
    busy = once(lambda request, ask: Answer.error(409, "ConditionalRequestConflict"), path="/record")
    with Proxy(s3, busy) as proxy:
        storage = open_storage(s3.url(str(ULID())), proxy.options)
        storage.create("record", b"mine")
        assert storage.read("record") == b"mine"


def test_a_server_that_ignores_conditional_puts_is_refused_before_it_does_harm(s3):
    def forget(request, ask):
        request.headers.pop("if-none-match", None)
        return ask(request)

    name = s3.url(str(ULID()))
    open_storage(name, s3.options).create("record", b"first")
    with Proxy(s3, forget) as proxy:
        storage = open_storage(name, proxy.options)
        with pytest.raises(Unavailable, match="ignores conditional puts"):
            storage.create("record", b"second")
    assert contents(open_storage(name, s3.options)) == {"record": b"first"}


def test_a_server_that_refuses_conditional_puts_is_unavailable_with_what_to_do(s3):
    def refuse(request, ask):
        return Answer.error(501, "NotImplemented") if "if-none-match" in request.headers else ask(request)

    with Proxy(s3, refuse) as proxy:
        storage = open_storage(s3.url(str(ULID())), proxy.options)
        with pytest.raises(Unavailable, match=r"501 Not ?Implemented.*use a server that has them"):
            storage.create("record", b"x")
        assert sum(request.method == "PUT" for request in proxy.requests) == 1, "asking again would not help"


def test_a_publish_that_fails_half_way_takes_back_what_it_wrote(s3):
    def refuse(request, ask):
        return Answer.error(403, "AccessDenied") if request.path.endswith("/bad") else ask(request)

    name = s3.url(str(ULID()))
    with Proxy(s3, refuse) as proxy:
        steps = []
        with pytest.raises(Unavailable, match="AccessDenied"):
            open_storage(name, proxy.options).publish(
                "packs/1", {**{f"{i}": b"x" for i in range(20)}, "bad": b"x"}, steps.append
            )
    assert steps == ["staged"]
    assert contents(open_storage(name, s3.options)) == {}


FULL = """
import resource, sys
from trajstore.archive.storage.local import open_storage
from trajstore.errors import Unavailable

storage = open_storage(sys.argv[1], dict(pair.split("=", 1) for pair in sys.argv[2:]))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    storage.open_map("table")
except Unavailable as error:
    print(error)
"""


def test_a_full_temporary_folder_is_told_from_a_failing_server(s3):
    name = s3.url(str(ULID()))
    open_storage(name, s3.options).create("table", bytes(8192))
    assert "set TMPDIR" in run(FULL, name, *[f"{key}={value}" for key, value in s3.options.items()])


FORK = """
import os, sys
from trajstore.archive.storage.local import open_storage
from trajstore.errors import Conflict

options = dict(pair.split("=", 1) for pair in sys.argv[2:])
storage = open_storage(sys.argv[1], options)
early = os.fork()  # before the first use
if not early:
    storage.create("by the child", b"1")
    os._exit(0)
assert os.waitpid(early, 0)[1] == 0
storage.read("by the child")
late = os.fork()
if not late:
    refused = 0
    for use in (storage, open_storage(sys.argv[1], options)):
        try:
            use.read("by the child")
        except Conflict as error:
            refused += "spawn" in str(error)
    os._exit(refused)
assert os.waitstatus_to_exitcode(os.waitpid(late, 0)[1]) == 2
storage.read("by the child")
"""


def test_use_after_a_fork_is_refused_where_it_would_hang(s3):
    run(FORK, s3.url(str(ULID())), *[f"{name}={value}" for name, value in s3.options.items()])


WITHOUT = """
import sys
sys.modules["obstore"] = None
import trajstore
from trajstore.archive.storage.local import open_storage
try:
    open_storage("s3://bucket/name")
except trajstore.Unavailable as error:
    print(error)
"""


def test_without_obstore_one_is_told_what_to_install():
    assert "pip install 'trajstore[s3]'" in run(WITHOUT)
