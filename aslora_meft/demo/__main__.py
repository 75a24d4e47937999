"""``python -m aslora_meft.demo MODEL [aslora|meft]``."""

import sys
import warnings

from aslora_meft.demo.run import main

warnings.simplefilter("ignore", FutureWarning)  # as the command line does
raise SystemExit(main(*sys.argv[1:]))
