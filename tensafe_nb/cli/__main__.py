"""`python -m tensafe_nb.cli` is `tensafe-nb`."""

import sys

from tensafe_nb.cli.main import main

sys.exit(main())
