"""One torch thread: the tensors of the tests are too small to be shared by several."""

import torch

torch.set_num_threads(1)
