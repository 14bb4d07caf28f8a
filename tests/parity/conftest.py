"""The small model of the model tests is importable here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "dsjax" / "models"))
