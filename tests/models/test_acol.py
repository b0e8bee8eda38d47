"""ACoL: erasing by hand, and the head against the authors' form of it, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cutmix_exp.models.acol import AcolHead, erased
from cutmix_exp.models.heads import Stages


def head(threshold: float = 0.7) -> AcolHead:
    torch.manual_seed(2)
    made = AcolHead(4, 6, 3, threshold).double()
    for branch in (made.first, made.second):
        branch.fc.bias.data.uniform_(-1, 1)
    return made


def stages(count: int = 5) -> Stages:
    torch.manual_seed(1)
    last = torch.rand(count, 4, 3, 5, dtype=torch.float64)
    return torch.zeros(0), torch.zeros(0), last.requires_grad_()


def soft(*classes: int) -> Tensor:
    """Targets whose largest share is of these classes, but not by far."""
    return 0.4 * F.one_hot(torch.tensor(classes), 3) + 0.2


def by_pixels(made: AcolHead, last: Tensor, classes: list[int]) -> tuple[Tensor, ...]:
    """The authors' way: 1x1 convolutions that classify each pixel, averaged then; erasing by loops.
    Returns the logits of both, the mask bool [n, h, w] of what is kept, and both branches' maps."""

    def pixels(branch, maps):  # type: ignore[no-untyped-def]
        (one, _), (two, _) = branch.convs
        maps = F.conv2d(maps, one.weight, one.bias, padding=1).clamp(min=0)
        maps = F.conv2d(maps, two.weight, two.bias, padding=1).clamp(min=0)
        return F.conv2d(maps, branch.fc.weight[:, :, None, None], branch.fc.bias)

    first = pixels(made.first, last)
    kept = torch.ones(len(last), *last.shape[2:], dtype=torch.bool)
    for image, label in enumerate(classes):
        seen = first[image, label].detach().numpy()
        low, high = seen.min(), seen.max()
        for y, x in np.ndindex(seen.shape):
            kept[image, y, x] = bool((seen[y, x] - low) / (high - low) < made.threshold)
    second = pixels(made.second, last * kept[:, None])
    return first.mean((2, 3)), second.mean((2, 3)), kept, first, second


def test_what_is_erased_by_hand() -> None:
    """The threshold itself is erased; each image has its own minimum and maximum; a map without
    differences erases nothing."""
    maps = torch.tensor([[[0.0, 1], [2, 4]], [[-4.0, 0], [4, 2]], [[3.0, 3], [3, 3]]])
    features = torch.full((3, 2, 2, 2), 5.0)
    got = erased(features, maps, 0.5)
    assert torch.equal(got[:, 0], got[:, 1])
    assert got[:, 0].tolist() == [[[5, 5], [0, 0]], [[5, 0], [0, 0]], [[5, 5], [5, 5]]]
    assert erased(features, maps, 1.0)[0, 0].tolist() == [[5, 5], [5, 0]]


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_both_classifiers_equal_the_authors_form(threshold: float) -> None:
    made, given, classes = head(threshold), stages(), [0, 2, 1, 1, 0]
    logits, second = made(given, soft(*classes))
    wanted = by_pixels(made, given[-1], classes)
    assert 0 < float(wanted[2].double().mean()) < 1
    torch.testing.assert_close(logits, wanted[0])
    torch.testing.assert_close(second, wanted[1])
    torch.testing.assert_close(made(given), logits)  # in the test, and without labels


def test_the_class_of_the_map_is_that_of_the_largest_share() -> None:
    made, given = head(), stages()
    (_, one), (_, other) = made(given, soft(0, 0, 0, 0, 0)), made(given, soft(1, 1, 1, 1, 1))
    assert not torch.allclose(one, other)
    equal = torch.full((5, 3), 0.5) * torch.tensor([0.0, 1, 1])
    assert torch.equal(made(given, equal)[1], other)  # of equal ones the first


def test_erased_pixels_pass_no_gradient_and_the_mask_none_to_the_first_classifier() -> None:
    made, given, classes = head(), stages(), [0, 2, 1, 1, 0]
    kept = by_pixels(made, given[-1], classes)[2]
    made(given, soft(*classes))[1].square().sum().backward()
    gradient = given[-1].grad
    assert gradient is not None
    for channel in range(4):
        assert torch.equal(gradient[:, channel] != 0, kept)
    assert all(p.grad is None for p in made.first.parameters())
    assert all(p.grad is not None for p in made.second.parameters())


def test_the_added_loss_is_the_recipes_on_the_second_logits() -> None:
    made, targets = head(), soft(0, 2, 1, 1, 0)
    logits, second = made(stages(), targets)

    def criterion(given: Tensor, told: Tensor) -> Tensor:
        return F.cross_entropy(given, told, reduction="none", label_smoothing=0.3)

    added = made.auxiliary_losses((second,), targets, criterion)
    torch.testing.assert_close(added, criterion(second, targets))
    assert not torch.allclose(added, criterion(logits, targets))


def test_the_map_is_the_larger_of_both_at_each_pixel() -> None:
    made, given, classes = head(), stages(), [0, 2, 1, 1, 0]
    *_, first, second = by_pixels(made, given[-1], classes)
    got = made.maps(given[-1], torch.tensor(classes))
    assert not got.requires_grad
    larger = {"first": 0, "second": 0}
    for image, label in enumerate(classes):
        parts = [part[image, label].detach().numpy() for part in (first, second)]
        one, two = ((p - p.min()) / (p.max() - p.min()) for p in parts)
        assert np.allclose(got[image].numpy(), np.maximum(one, two))
        larger["first"] += int((one > two).sum())
        larger["second"] += int((two > one).sum())
    assert min(larger.values()) > 5


def test_masks_are_made_in_float32_under_autocast() -> None:
    """From the same features: a mask of bf16 numbers would be another one near the threshold."""
    torch.manual_seed(0)
    made = AcolHead(4, 6, 3, 0.7)
    last = torch.rand(64, 4, 6, 6)
    seen: list[Tensor] = []
    made.second.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits, second = made((last, last, last), torch.eye(3)[torch.arange(64) % 3])
        _, features = made.first(last)
    assert logits.dtype == second.dtype == torch.bfloat16
    maps = torch.einsum(
        "nc,nchw->nhw", made.first.fc.weight[torch.arange(64) % 3], features.float()
    )
    assert torch.equal(seen[0], erased(last, maps, 0.7))
