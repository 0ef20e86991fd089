"""`python -m distsys` is `distsys`."""

import sys

from distsys.cli.main import main

sys.exit(main())
