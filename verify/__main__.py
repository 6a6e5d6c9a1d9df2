"""`python -m verify`: the same as the command `invref-verify`."""

import sys

from verify.cli import main

sys.exit(main())
