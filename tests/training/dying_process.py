"""The command ``moment-ops``; the process of rank 1 dies in the step that the environment names."""

import os
import signal
import sys

import torch

from moment_ops.training.command_line import main
from moment_ops.training.trainer import Trainer

advance = Trainer.advance


def advance_or_die(self: Trainer) -> torch.Tensor:
    if os.environ["RANK"] == "1" and self.step == int(os.environ["DIE_IN_STEP"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(self)


Trainer.advance = advance_or_die  # type: ignore[method-assign]
sys.exit(main())
