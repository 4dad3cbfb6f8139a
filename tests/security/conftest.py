"""A server that speaks TLS, under a certificate authority that lives as long as the test run."""

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme

from tests.servers import RealServer, binary_of, free_port, running


class Authority(NamedTuple):
    """A certificate authority, its certificate as a file, and a folder for what it issues."""

    ca: trustme.CA
    file: Path
    folder: Path

    def issue(self, name: str) -> Path:
        """Key and certificate for a host name or somebody's address, in one file."""
        path = self.folder / f"{name}.pem"
        self.ca.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(str(path))
        return path


class TlsServer(NamedTuple):
    """A server with a TLS port beside its plain one, at the host name `localhost`."""

    server: RealServer
    port: int
    authority: Authority

    def url(self, run: str, *, host: str = "localhost", **options: object) -> str:
        """Where a store of that run is; `ssl_ca_certs` is the right one unless given."""
        given = {"ssl_ca_certs": self.authority.file} | options
        return f"rediss://{host}:{self.port}/0?run={run}" + "".join(f"&{name}={value}" for name, value in given.items())


def authority(folder: Path) -> Authority:
    """A new one."""
    folder.mkdir()
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    return Authority(ca, folder / "ca.pem", folder)


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """One that nobody has a reason to trust."""
    return authority(tmp_path_factory.mktemp("other") / "ca")


@pytest.fixture(scope="module", params=["redis", "valkey"])
def tls_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    """Asks for a client's certificate, and lets those in that have none."""
    if binary_of(request.param) is None:
        pytest.skip(f"backend {request.param}: no server of that kind on this machine")
    folder = tmp_path_factory.mktemp("tls")
    ours, port = authority(folder / "ca"), free_port()
    pair = str(ours.issue("localhost"))
    options = {
        "tls-port": str(port),
        "tls-cert-file": pair,
        "tls-key-file": pair,
        "tls-ca-cert-file": str(ours.file),
        "tls-auth-clients": "optional",
    }
    if not _has_tls(request.param, folder, options):
        pytest.skip(f"backend {request.param}: this build has no TLS")
    with running(request.param, folder / "server", **options) as server:
        yield TlsServer(server, port, ours)


def _has_tls(name: str, folder: Path, options: Mapping[str, str]) -> bool:
    """A build without it ends at once."""
    binary = binary_of(name)
    assert binary is not None
    arguments = [part for option, value in options.items() for part in (f"--{option}", value)]
    command = [binary, "--port", "0", "--dir", str(folder), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        starts = any("Ready to accept connections" in line for line in process.stdout)
        process.kill()
    return starts
