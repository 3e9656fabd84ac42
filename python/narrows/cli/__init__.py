"""The command ``narrows`` and its jobs.

Reading order: `main` (exit codes), `arguments`, `settings`, then `jobs` (fit) with `measures`, `sweep`, `applying`
(encode, decode, score), `rundir` (the folder ``--out``), and `report` with `figures`.
"""

from .main import main

__all__ = ["main"]
