"""`python -m bus_kv` is `bus-kv`."""

import sys

from bus_kv.cli.app import main

sys.exit(main())
