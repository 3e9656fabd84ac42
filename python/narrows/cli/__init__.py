"""The batch tool: the command ``narrows`` and the jobs behind it.

Reading order: `main` (arguments and exit codes) -> `settings` -> `jobs` (fit) and `applying` (encode, decode, score) ->
`rundir` (what lies under ``--out``) -> `report`.
"""

from .main import main

__all__ = ["main"]
