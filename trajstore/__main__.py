"""`python -m trajstore` is the `trajstore` command."""

from trajstore.cli import main

if __name__ == "__main__":
    main(prog_name="trajstore")
