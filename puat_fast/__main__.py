"""`python -m puat_fast` is `puat-fast`."""

import sys

from puat_fast.cli import main

sys.exit(main())
