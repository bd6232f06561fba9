"""``python -m moment_ops``: the command ``moment-ops``, in the form that torchrun starts."""

import sys

from moment_ops.training.command_line import main

sys.exit(main())
