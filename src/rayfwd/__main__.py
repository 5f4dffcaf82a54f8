"""`python -m rayfwd` is `rayfwd`."""

import sys

from rayfwd.cli import main

if __name__ == "__main__":
    sys.exit(main())
