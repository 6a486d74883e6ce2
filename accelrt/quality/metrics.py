"""How far two results are apart. All metrics compute in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_error(result: Any, reference: Any) -> float:
    """Relative L2 error, ``||result - reference|| / ||reference||``.

    Args:
        result, reference: tensors or arrays of one shape, any dtype.

    Returns:
        0.0 for identical inputs; infinity if only the reference is zero.

    Raises:
        ValueError: if the shapes differ.
    """
    x, y = _pair("relative_error", result, reference)
    error, norm = float((x - y).norm()), float(y.norm())
    if error == 0.0:
        return 0.0
    return error / norm if norm else math.inf


def psnr(images: Any, reference: Any, *, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB, ``10 log10(data_range^2 / MSE)``.

    Args:
        images, reference: tensors or arrays of one shape.
        data_range: distance between the smallest and the largest possible value.

    Returns:
        Decibels over all elements; infinity for identical inputs.

    Raises:
        ValueError: if the shapes differ, nothing is given, or ``data_range`` is not positive.
    """
    x, y = _pair("psnr", images, reference)
    _check_range("psnr", data_range)
    if x.numel() == 0:
        raise ValueError("psnr: the inputs are empty")
    mse = float((x - y).square().mean())
    return 10 * math.log10(data_range**2 / mse) if mse else math.inf


def ssim(
    images: Any,
    reference: Any,
    *,
    data_range: float = 1.0,
    window: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> float:
    """Mean structural similarity with a Gaussian window.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error
    visibility to structural similarity", IEEE TIP 2004, section III.B and equation 13,
    per channel, averaged over the windows that lie within the image, over channels and
    images.

    Args:
        images, reference: tensors or arrays ``[..., H, W]`` of one shape.
        data_range: distance between the smallest and the largest possible value.
        window: side of the square window in pixels, odd.
        sigma: standard deviation of the window's weights in pixels.
        k1, k2: the stabilising constants.

    Returns:
        At most 1.0, which means identical.

    Raises:
        ValueError: if the shapes differ, the images are smaller than the window, or an
            argument is out of range.
    """
    x, y = _pair("ssim", images, reference)
    _check_range("ssim", data_range)
    if window < 1 or window % 2 == 0:
        raise ValueError(f"ssim: window is {window}; allowed: odd numbers >= 1")
    if sigma <= 0:
        raise ValueError(f"ssim: sigma is {sigma}; allowed: above 0")
    if x.dim() < 2 or min(x.shape[-2:]) < window or x.numel() == 0:
        raise ValueError(
            f"ssim: the images are {tuple(x.shape)}; height and width must be at least {window}"
        )
    x, y = (t.reshape(-1, 1, *t.shape[-2:]) for t in (x, y))
    line = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    line = torch.exp(-line.square() / (2 * sigma**2))
    line /= line.sum()

    def mean(t: Tensor) -> Tensor:
        rows = F.conv2d(t, line.view(1, 1, 1, -1))
        return F.conv2d(rows, line.view(1, 1, -1, 1))

    mean_x, mean_y = mean(x), mean(y)
    var_x = mean(x * x) - mean_x.square()
    var_y = mean(y * y) - mean_y.square()
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float((luminance * structure).mean())


def _pair(metric: str, a: Any, b: Any) -> tuple[Tensor, Tensor]:
    x, y = (torch.as_tensor(t).detach().to("cpu", torch.float64) for t in (a, b))
    if x.shape != y.shape:
        raise ValueError(
            f"{metric}: shapes {tuple(x.shape)} and {tuple(y.shape)} differ; they must be equal"
        )
    return x, y


def _check_range(metric: str, data_range: float) -> None:
    if not 0 < data_range < math.inf:
        raise ValueError(f"{metric}: data_range is {data_range}; allowed: above 0")
