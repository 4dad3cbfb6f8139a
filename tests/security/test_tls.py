"""The way to the server is private: rediss:// with a certificate authority of one's own, and what is refused."""

import re

import pytest

import trajstore
from tests.builders import record_seed_case
from tests.cli.running import run


def opened(url: str, **options: object) -> trajstore.Store:
    return trajstore.open(url, **({"partitions": 1, "timeout": 3.0} | options))  # type: ignore[arg-type]


def test_run_is_written_and_read_over_tls(tls_server, run_name, tmp_path):
    with opened(tls_server.url(run_name), archive=tmp_path / "archive") as store:
        record_seed_case(store, id="x", metadata={"large": "y" * 60000}).close()
        store.flush()
        assert len(store.load("x")) == 10
        assert store.wait("x").status == "completed"
    with tls_server.server.client() as client:
        assert client.exists(f"trajstore:{{{run_name}}}:run")


def test_client_that_shows_a_certificate_is_let_in_where_one_is_asked_for(tls_server, run_name):
    pair = tls_server.authority.issue("producer@exp1")
    with tls_server.server.client() as client:
        client.config_set("tls-auth-clients", "yes")
        try:
            with opened(tls_server.url(run_name, ssl_certfile=pair, ssl_keyfile=pair)) as store:
                store.create()
                store.flush()
            with pytest.raises(trajstore.Unavailable, match="ssl_certfile="):
                opened(tls_server.url(run_name))
        finally:
            client.config_set("tls-auth-clients", "optional")


def test_clients_certificate_of_another_authority_is_refused(tls_server, other_authority, run_name):
    pair = other_authority.issue("producer@exp1")
    with pytest.raises(trajstore.Unavailable, match="did not answer"):
        opened(tls_server.url(run_name, ssl_certfile=pair, ssl_keyfile=pair))


def test_server_of_another_authority_is_refused(tls_server, other_authority, run_name):
    with pytest.raises(trajstore.Unavailable, match=r"certificate verify failed.*ssl_ca_certs="):
        opened(tls_server.url(run_name, ssl_ca_certs=other_authority.file))


def test_server_that_the_system_does_not_know_is_refused(tls_server, run_name):
    url = re.sub("&ssl_ca_certs=[^&]*", "", tls_server.url(run_name))
    with pytest.raises(trajstore.Unavailable, match="certificate verify failed"):
        opened(url)


def test_server_under_another_host_name_is_refused(tls_server, run_name):
    with pytest.raises(trajstore.Unavailable, match=r"certificate verify failed.*not valid for '127\.0\.0\.1'"):
        opened(tls_server.url(run_name, host="127.0.0.1"))


def test_plain_text_at_a_tls_port_is_an_error_before_the_deadline(tls_server, run_name):
    with pytest.raises(trajstore.Unavailable, match="did not answer"):
        opened(f"redis://localhost:{tls_server.port}/0?run={run_name}")


def test_tls_at_a_plain_port_is_an_error_at_the_deadline(tls_server, run_name):
    with pytest.raises(trajstore.Unavailable, match="did not answer"):
        opened(tls_server.url(run_name).replace(f":{tls_server.port}/", f":{tls_server.server.port}/"), timeout=1.0)


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_file_of_a_url_that_is_not_there_is_named_by_its_option(tmp_path, option):
    with pytest.raises(trajstore.SchemaError, match=f"option '{option}' names no file"):
        trajstore.open(f"rediss://localhost:1/0?run=x&{option}={tmp_path}/absent.pem")


def test_command_reads_over_tls(tls_server, run_name):
    url = tls_server.url(run_name)
    with opened(url) as store:
        record_seed_case(store, id="x")
    listed = run("ls", env={"TRAJSTORE_URL": url})
    assert (listed.returncode, "x" in listed.stdout) == (0, True), listed.stderr
    refused = run("ls", tls_server.url(run_name, host="127.0.0.1"))
    assert refused.returncode == 1
    assert "not valid for" in refused.stderr
    assert "Traceback" not in refused.stderr
