"""Image files to tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.errors import UserError


def decode(file: Path) -> Tensor:
    """An image file as uint8 [3, H, W], RGB. Raises UserError: it is no image, or truncated."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read as an image: {error}; replace the file or remove it"
        ) from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
