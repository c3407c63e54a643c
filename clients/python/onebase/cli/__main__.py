"""`python -m onebase.cli` is `onebase`."""

import sys

from . import main

sys.exit(main())
