"""``python -m narrows``: the command line. Signals have their handlers before the libraries are imported."""

from typing import NoReturn

from . import _process

__all__ = ["run"]


def run() -> NoReturn:
    """Run the command of this process, and end the process."""
    _process.run(_main)


def _main() -> int:
    from .cli import main

    return main()


if __name__ == "__main__":
    run()
