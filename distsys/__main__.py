"""`python -m distsys` is `distsys`."""

import sys

from distsys.cli import main

sys.exit(main())
