"""The commands over this package: each module holds one, which is registered in `trajstore.commands`."""
