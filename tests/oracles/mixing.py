"""Reference (slow, loop-by-loop) versions of the operations that change or mix images.

Nothing here is meant to be fast. Every function takes and returns NumPy arrays, computes in
float64 (except the input pipeline, whose result is float32 as in training), never changes its
arguments, and takes all random choices as arguments, so that another implementation can be
given the same choices. "paper" is Yun et al., "CutMix", ICCV 2019, arXiv 1905.04899v2.

A box is always `(top, left, bottom, right)` in pixels: rows top <= y < bottom and columns
left <= x < right.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torchvision.transforms import functional as tvf

Box = tuple[int, int, int, int]


def _limit(value: int, lowest: int, highest: int) -> int:
    """Return value, or the nearer limit where it lies outside lowest..highest."""
    if value < lowest:
        return lowest
    if value > highest:
        return highest
    return value


def official_box(height: int, width: int, lam: float, centre_y: int, centre_x: int) -> Box:
    """Give the box of the authors' released code (fact sheet, section 3, row "Box rounding").

    Each side of the cut is int(side * sqrt(1 - lam)), truncated. The box reaches cut // 2 pixels
    to both sides of the integer centre, so its unclipped sides are even (an odd cut loses one
    pixel), and it is then clipped to the image.
    """
    cut_height = int(height * math.sqrt(1.0 - lam))
    cut_width = int(width * math.sqrt(1.0 - lam))
    top = _limit(centre_y - cut_height // 2, 0, height)
    bottom = _limit(centre_y + cut_height // 2, 0, height)
    left = _limit(centre_x - cut_width // 2, 0, width)
    right = _limit(centre_x + cut_width // 2, 0, width)
    return top, left, bottom, right


def unbiased_box(height: int, width: int, lam: float, centre_y: int, centre_x: int) -> Box:
    """Give the box whose unclipped sides are the rounded sides of the paper's Eq. 2.

    The sides are exactly round(side * sqrt(1 - lam)) pixels, odd values included (Python's
    round: an exact half goes to the even neighbour). The box starts cut // 2 pixels before the
    integer centre, ends cut pixels after its start, and is then clipped to the image.
    """
    cut_height = round(height * math.sqrt(1.0 - lam))
    cut_width = round(width * math.sqrt(1.0 - lam))
    unclipped_top = centre_y - cut_height // 2
    unclipped_left = centre_x - cut_width // 2
    top = _limit(unclipped_top, 0, height)
    bottom = _limit(unclipped_top + cut_height, 0, height)
    left = _limit(unclipped_left, 0, width)
    right = _limit(unclipped_left + cut_width, 0, width)
    return top, left, bottom, right


def cutmix(
    images: np.ndarray,
    labels_onehot: np.ndarray,
    partner: Sequence[int],
    boxes: Sequence[Box],
    lam_drawn: float,
    correct_lambda: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Mix each image with its partner pixel by pixel (paper, section 3.1, Eq. 1 and Algorithm A1).

    Args:
        images: [B, C, H, W].
        labels_onehot: [B, K], one label distribution per image.
        partner: B indices; image i receives the inside of box i from image partner[i].
        boxes: B boxes (top, left, bottom, right), one per image, already clipped.
        lam_drawn: the value drawn from Beta(alpha, alpha), used for every label of the batch if
            correct_lambda is false.
        correct_lambda: if true the weight of an image's own label is the share of its own
            pixels, counted one by one; if false it is lam_drawn.

    Returns:
        The mixed images, float64 [B, C, H, W], and the mixed labels, float64 [B, K].
    """
    batch, channels, height, width = images.shape
    classes = labels_onehot.shape[1]
    mixed = np.zeros((batch, channels, height, width), dtype=np.float64)
    targets = np.zeros((batch, classes), dtype=np.float64)
    for i in range(batch):
        other = int(partner[i])
        top, left, bottom, right = boxes[i]
        own_pixels = 0
        for y in range(height):
            for x in range(width):
                inside = top <= y < bottom and left <= x < right
                if not inside:
                    own_pixels += 1
                source = other if inside else i
                for c in range(channels):
                    mixed[i, c, y, x] = float(images[source, c, y, x])
        own_weight = own_pixels / (height * width) if correct_lambda else float(lam_drawn)
        for k in range(classes):
            own_part = own_weight * float(labels_onehot[i, k])
            other_part = (1.0 - own_weight) * float(labels_onehot[other, k])
            targets[i, k] = own_part + other_part
    return mixed, targets


def variant_own_weight(height: int, width: int, box: Box, label: str) -> float:
    """Give the weight of an image's own label in the variants of Table 8 (paper, section 4.1.3).

    `area` is the share of its own pixels; `one_hot` is all or nothing, for the source with more
    pixels (the image itself where both have the same number); `half` is half.
    """
    top, left, bottom, right = box
    own_pixels = 0
    other_pixels = 0
    for y in range(height):
        for x in range(width):
            if top <= y < bottom and left <= x < right:
                other_pixels += 1
            else:
                own_pixels += 1
    if label == "area":
        return own_pixels / (own_pixels + other_pixels)
    if label == "one_hot":
        return 1.0 if own_pixels >= other_pixels else 0.0
    assert label == "half"
    return 0.5


def mixup(
    images: np.ndarray, labels_onehot: np.ndarray, partner: Sequence[int], lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Average each image and label with its partner's (mixup, arXiv 1710.09412, section 2).

    Args:
        images: [B, C, H, W].
        labels_onehot: [B, K].
        partner: B indices; image i is mixed with image partner[i].
        lam: the weight of an image's own pixels and own label, one for the whole batch.

    Returns:
        The mixed images, float64 [B, C, H, W], and the mixed labels, float64 [B, K].
    """
    batch, channels, height, width = images.shape
    classes = labels_onehot.shape[1]
    own_weight = float(lam)
    mixed = np.zeros((batch, channels, height, width), dtype=np.float64)
    targets = np.zeros((batch, classes), dtype=np.float64)
    for i in range(batch):
        other = int(partner[i])
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    own_part = own_weight * float(images[i, c, y, x])
                    other_part = (1.0 - own_weight) * float(images[other, c, y, x])
                    mixed[i, c, y, x] = own_part + other_part
        for k in range(classes):
            own_part = own_weight * float(labels_onehot[i, k])
            other_part = (1.0 - own_weight) * float(labels_onehot[other, k])
            targets[i, k] = own_part + other_part
    return mixed, targets


def ricap(
    images: np.ndarray,
    labels_onehot: np.ndarray,
    sources: Sequence[Sequence[int]],
    boundary: tuple[int, int],
    crops: Sequence[tuple[int, int]],
) -> tuple[np.ndarray, np.ndarray]:
    """Patch four crops together (RICAP, arXiv 1811.09030, section 3, with its four regions).

    Args:
        images: [B, C, H, W].
        labels_onehot: [B, K].
        sources: B lists of the four images that give image i its upper left, upper right, lower
            left and lower right region.
        boundary: the first row and the first column of the lower right region.
        crops: for each region, the (row, column) of its source where its crop begins.

    Returns:
        The patched images, float64 [B, C, H, W], and the labels weighted by the number of pixels,
        float64 [B, K].
    """
    batch, channels, height, width = images.shape
    mixed = np.zeros((batch, channels, height, width), dtype=np.float64)
    targets = np.zeros((batch, labels_onehot.shape[1]), dtype=np.float64)
    for i in range(batch):
        for y in range(height):
            for x in range(width):
                lower = y >= boundary[0]
                right = x >= boundary[1]
                region = (2 if lower else 0) + (1 if right else 0)
                source = int(sources[i][region])
                from_y = crops[region][0] + (y - boundary[0] if lower else y)
                from_x = crops[region][1] + (x - boundary[1] if right else x)
                for c in range(channels):
                    mixed[i, c, y, x] = float(images[source, c, from_y, from_x])
                targets[i] += labels_onehot[source] / (height * width)
    return mixed, targets


def bc_plus(first: np.ndarray, second: np.ndarray, ratio: float) -> np.ndarray:
    """Mix two images [C, H, W] as waves (between-class learning, arXiv 1711.10284, Eq. 2 and 3).

    p = 1 / (1 + sigma1 / sigma2 * (1 - r) / r), with sigma the standard deviation over an image's
    values; the mixture p * x1 + (1 - p) * x2 is divided by sqrt(p^2 + (1 - p)^2). At r = 0 and
    r = 1 the limits of p are 0 and 1.
    """
    values1 = [float(v) for v in first.reshape(-1)]
    values2 = [float(v) for v in second.reshape(-1)]
    sigmas = []
    for values in (values1, values2):
        mean = sum(values) / len(values)
        sigmas.append(math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)))
    p = 0.0 if ratio <= 0.0 else 1.0 / (1.0 + sigmas[0] / sigmas[1] * (1.0 - ratio) / ratio)
    scale = math.sqrt(p * p + (1.0 - p) * (1.0 - p))
    mixed = [(p * a + (1.0 - p) * b) / scale for a, b in zip(values1, values2, strict=True)]
    return np.array(mixed, dtype=np.float64).reshape(first.shape)


def concatenate(first: np.ndarray, second: np.ndarray, cut: int, vertical: bool) -> np.ndarray:
    """Put the first `cut` rows (or columns) of one image [C, H, W] before the rest of another."""
    mixed = np.zeros(first.shape, dtype=np.float64)
    for y in range(first.shape[1]):
        for x in range(first.shape[2]):
            own = (y if vertical else x) < cut
            mixed[:, y, x] = first[:, y, x] if own else second[:, y, x]
    return mixed


def fine_grained_saliency(image: np.ndarray) -> np.ndarray:
    """Give OpenCV's fine-grained saliency of an image [3, H, W], without its cuts to bytes.

    Grey values are smoothed twice by (1, 2, 1) / 4 along both axes (the border is mirrored without
    its own pixel). For each of six radii r, the mean of the window from p - r + 1 to p + r + 1
    (end excluded, both limited to 0 and side - 1), without the pixel itself, is subtracted; the
    positive and the negative parts are summed over the radii, each divided by its maximum, and
    added.
    """
    _, height, width = image.shape
    grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    grey = grey.astype(np.float64)
    for _ in range(2):
        smooth = np.zeros_like(grey)
        for y in range(height):
            for x in range(width):
                for dy, wy in ((-1, 0.25), (0, 0.5), (1, 0.25)):
                    for dx, wx in ((-1, 0.25), (0, 0.5), (1, 0.25)):
                        row, column = abs(y + dy), abs(x + dx)
                        row = 2 * (height - 1) - row if row >= height else row
                        column = 2 * (width - 1) - column if column >= width else column
                        smooth[y, x] += wy * wx * grey[row, column]
        grey = smooth
    on = np.zeros_like(grey)
    off = np.zeros_like(grey)
    for radius in (12, 24, 48, 28, 56, 112):
        for y in range(height):
            for x in range(width):
                top, bottom = (_limit(y + d, 0, height - 1) for d in (1 - radius, 1 + radius))
                left, right = (_limit(x + d, 0, width - 1) for d in (1 - radius, 1 + radius))
                total = float(grey[top:bottom, left:right].sum()) - grey[y, x]
                mean = total / ((bottom - top) * (right - left) - 1)
                on[y, x] += max(grey[y, x] - mean, 0.0)
                off[y, x] += max(mean - grey[y, x], 0.0)
    return on / on.max() + off / off.max()


def fmix_mask(noise: np.ndarray, count: int, soft: int) -> np.ndarray:
    """Binarise noise [H, W] as FMix does (arXiv 2002.12047, section 4, and its authors' code): the
    `count` highest pixels are 1, the others 0; the `soft` pixels on both sides of the edge get the
    values of an even fall from 1 to 0."""
    height, width = noise.shape
    order = sorted(
        ((y, x) for y in range(height) for x in range(width)), key=lambda p: -noise[p[0], p[1]]
    )
    mask = np.zeros_like(noise)
    for place, (y, x) in enumerate(order):
        if place < count - soft:
            mask[y, x] = 1.0
        elif place < count + soft:
            mask[y, x] = np.linspace(1, 0, 2 * soft)[place - (count - soft)]
    return mask


def cutout(images: np.ndarray, centres: Sequence[tuple[int, int]], size: int) -> np.ndarray:
    """Set one square hole of each image to 0 (Cutout, arXiv 1708.04552, and its authors' code).

    The hole covers rows y - size // 2 up to, not including, y + size // 2, and columns in the
    same way; the part outside the image is lost. An odd size thus acts like size - 1.

    Args:
        images: [B, C, H, W], already normalised, so that 0 stands for the mean colour.
        centres: B pairs (y, x).
        size: the side of the hole in pixels.

    Returns:
        The images with their holes, float64 [B, C, H, W].
    """
    batch, channels, height, width = images.shape
    half = size // 2
    result = np.zeros((batch, channels, height, width), dtype=np.float64)
    for i in range(batch):
        centre_y, centre_x = centres[i]
        for y in range(height):
            for x in range(width):
                in_rows = centre_y - half <= y < centre_y + half
                in_columns = centre_x - half <= x < centre_x + half
                for c in range(channels):
                    if in_rows and in_columns:
                        result[i, c, y, x] = 0.0
                    else:
                        result[i, c, y, x] = float(images[i, c, y, x])
    return result


def erase(images: np.ndarray, boxes: Sequence[Box], fill: Sequence[float]) -> np.ndarray:
    """Give one box of each image [C, H, W] the colour `fill` (Random Erasing, 1708.04896)."""
    result = images.astype(np.float64)
    for i, (top, left, bottom, right) in enumerate(boxes):
        for y in range(top, bottom):
            for x in range(left, right):
                for c in range(images.shape[1]):
                    result[i, c, y, x] = fill[c]
    return result


def hidden_cells(hidden: np.ndarray, cell: int) -> np.ndarray | None:
    """Tell which cells of a grid are hidden, bool [rows, columns], from the pixels [H, W] that are;
    None where a cell is hidden only in part (Hide-and-Seek, 1704.04232)."""
    height, width = hidden.shape
    found = np.zeros((math.ceil(height / cell), math.ceil(width / cell)), dtype=bool)
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            values = set()
            for y in range(row * cell, min((row + 1) * cell, height)):
                for x in range(column * cell, min((column + 1) * cell, width)):
                    values.add(bool(hidden[y, x]))
            if len(values) > 1:
                return None
            found[row, column] = values.pop()
    return found


def official_lambda_draws(
    height: int, width: int, alpha: float, draws: int, seed: int
) -> np.ndarray:
    """Simulate the official sampler and return its area-corrected lambdas, float64 [draws].

    One draw: lam ~ Beta(alpha, alpha), an integer centre uniform over the pixels, the box of
    official_box; the value is the share of the image outside the box (paper, Algorithm A1).
    """
    generator = np.random.default_rng(seed)
    values = np.zeros(draws, dtype=np.float64)
    for i in range(draws):
        lam = float(generator.beta(alpha, alpha))
        centre_y = int(generator.integers(0, height))
        centre_x = int(generator.integers(0, width))
        top, left, bottom, right = official_box(height, width, lam, centre_y, centre_x)
        values[i] = 1.0 - (bottom - top) * (right - left) / (height * width)
    return values


def official_lambda_statistics(
    height: int, width: int, alpha: float, draws: int, seed: int
) -> float:
    """Give the mean area-corrected lambda of the official sampler, by simulation.

    The expected values are the table at the end of section 3 of the fact sheet; with 100,000
    draws the standard error is about 0.0009 for alpha 0.1 and 0.0006 for alpha 1.
    """
    values = official_lambda_draws(height, width, alpha, draws, seed)
    return float(values.sum() / draws)


def pad_crop_flip_normalise(
    image_uint8_hwc: np.ndarray,
    pad: int,
    dy: int,
    dx: int,
    flip: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> np.ndarray:
    """Prepare one training image with torchvision (fact sheet, section 2.3, CIFAR recipe).

    Order: zero padding (black, before normalisation) on all four sides, crop back to the
    original size, horizontal flip, scaling to 0..1, normalisation per channel.

    Args:
        image_uint8_hwc: uint8 [H, W, 3].
        pad: number of black rows and columns added on every side.
        dy: first row of the crop, counted in the padded image, 0..2 * pad (pad = no shift).
        dx: first column of the crop, counted likewise.
        flip: whether the crop is mirrored left to right.
        mean: three channel means, on the 0..1 scale.
        std: three channel standard deviations, on the 0..1 scale.

    Returns:
        The image as float32 [3, H, W].
    """
    height, width, _ = image_uint8_hwc.shape
    if not (0 <= dy <= 2 * pad and 0 <= dx <= 2 * pad):
        raise ValueError(f"crop start ({dy}, {dx}) lies outside 0..{2 * pad}")
    picture = Image.fromarray(np.ascontiguousarray(image_uint8_hwc))
    picture = tvf.pad(picture, [pad, pad, pad, pad], fill=0, padding_mode="constant")
    picture = tvf.crop(picture, top=dy, left=dx, height=height, width=width)
    if flip:
        picture = tvf.hflip(picture)
    tensor = tvf.normalize(tvf.to_tensor(picture), mean=list(mean), std=list(std))
    return tensor.numpy()
