"""`python -m distsys.decide README.md`: write the table of the rules into it."""

import sys
from pathlib import Path

from distsys.decide.tables import refresh

readme = Path(sys.argv[1])
readme.write_text(refresh(readme.read_text("utf-8")), "utf-8")
