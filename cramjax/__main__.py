"""`python -m cramjax` is the command `cramjax`."""

import sys

from cramjax.cli import main

sys.exit(main())
