"""python -m vitalrt.cli, which `accelerate launch -m` needs."""

import sys

from vitalrt.cli import main

sys.argv[0] = "vitalrt"  # what reports call the command
sys.exit(main())
