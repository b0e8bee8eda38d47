"""Train one run, or sweep many: python train.py model=pyramidnet aug=cutmix (see README.md)."""

import os
import sys

import hydra
from omegaconf import DictConfig, OmegaConf

import cutmix_exp.startup  # noqa: F401 (first: its settings must come before torch)
from cutmix_exp.composition import help_text, hydra_messages
from cutmix_exp.config import from_dict, resolve
from cutmix_exp.distributed import launched_world
from cutmix_exp.errors import UserError
from cutmix_exp.launch import errors_told, launch, tell


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def main(composed: DictConfig) -> None:
    try:
        with errors_told():
            launch(resolve(from_dict(OmegaConf.to_container(composed, resolve=True))))
    except KeyboardInterrupt:
        tell("interrupted before the run began", 130)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(help_text())
        sys.exit()
    # Hydra raises its errors instead of printing them its own way; they are told as ours are.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    if launched_world() is not None and {"-m", "--multirun"} & set(sys.argv):
        tell(
            "-m does not work under torchrun; use: python train.py -m devices=N ...",
            UserError.status,
        )
    try:
        with errors_told(), hydra_messages([a for a in sys.argv[1:] if "=" in a]):
            main()
    except KeyboardInterrupt:
        tell("interrupted before the runs began", 130)
