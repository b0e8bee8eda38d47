"""A driver for the tests: runs train.py in this process and kills it with SIGKILL at a chosen
moment. Usage: crash.py MOMENT COUNT train.py-overrides...; MOMENT is step, evaluation or save."""

import io
import os
import runpy
import signal
import sys
from pathlib import Path

import torch

from cutmix_exp.training import optim, trainer

MOMENT, COUNT = sys.argv[1], int(sys.argv[2])
calls = 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(original):
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls == COUNT:
            if MOMENT == "save":  # half of the file is on the disk
                whole = io.BytesIO()
                torch_save(args[0], whole)
                args[1].write(whole.getvalue()[: len(whole.getvalue()) // 2])
                args[1].flush()
            if MOMENT == "step":  # between the backward pass and the update
                original(*args, **kwargs)
            die()
        return original(*args, **kwargs)

    return wrapper


torch_save = torch.save
if MOMENT == "step":
    optim.SGD.step = counted(optim.SGD.step)
elif MOMENT == "evaluation":
    trainer.predict = counted(trainer.predict)
elif MOMENT == "save":
    torch.save = counted(torch.save)

train = Path(__file__).resolve().parent.parent / "train.py"
sys.argv = [str(train), *sys.argv[3:]]
runpy.run_path(str(train), run_name="__main__")
