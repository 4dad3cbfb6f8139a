"""The stores of the command's tests serve here, too."""

from tests.cli.conftest import durable, durable_server, folder

__all__ = ["durable", "durable_server", "folder"]
