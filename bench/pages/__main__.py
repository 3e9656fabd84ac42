"""Write all pages that come from stored results: ``python bench/pages``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.pages import write

write()
