"""The definition of the e4m3 format is importable here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "precision"))
