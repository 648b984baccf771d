"""Changes of an image's style that leave what it shows: stand-ins for domains that nobody has seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

_LEVELS = 4
_BRIGHTEST = 0.98
_SPREAD = 0.8


def grey(images: Tensor) -> Tensor:
    """Every pixel the mean of its channels.

    Args:
        images: shape (n, 3, h, w), in [0, 1].

    Returns:
        As the images.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.styles import grey
        >>> grey(torch.tensor([0.0, 0.25, 0.5]).view(1, 3, 1, 1)).flatten().tolist()
        [0.25, 0.25, 0.25]
    """
    return images.mean(1, keepdim=True).expand_as(images)


def edges(images: Tensor) -> Tensor:
    """Dark lines on white: 1 − the Sobel gradient of the blurred grey image, over its 98 % quantile in the image.

    Args:
        images: shape (n, 3, h, w), in [0, 1].

    Returns:
        As the images.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.styles import edges
        >>> step = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]).expand(1, 3, 6, 6)  # dark on the left, light beside it
        >>> edges(step)[0, 0, 0].round(decimals=3).tolist()
        [1.0, 0.5, 0.0, 0.0, 0.5, 1.0]
    """
    blurred = avg_pool2d(_framed(images.mean(1, keepdim=True), 1), 3, stride=1)
    sobel = images.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]).expand(1, 1, 3, 3)
    framed = _framed(blurred, 1)
    slope = (conv2d(framed, sobel).square() + conv2d(framed, sobel.mT).square()).sqrt()
    steepest = slope.flatten(1).quantile(_BRIGHTEST, dim=1).clamp(min=1e-6)
    return (1 - (slope / steepest.view(-1, 1, 1, 1)).clamp(max=1)).expand_as(images)


def posterised(images: Tensor) -> Tensor:
    """Flat patches: a 5 × 5 mean, rounded to five values a channel.

    Args:
        images: shape (n, 3, h, w), in [0, 1].

    Returns:
        As the images.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.styles import posterised
        >>> posterised(torch.full((1, 3, 8, 8), 0.3)).unique().tolist()
        [0.25]
    """
    return (avg_pool2d(_framed(images, 2), 5, stride=1) * _LEVELS).round() / _LEVELS


def retextured(images: Tensor) -> Tensor:
    """Fourier amplitudes times log-normal noise, the same for all images; phases, which hold shapes, and means stay.

    Xu et al., CVPR 2021, arXiv:2105.14020, mix the amplitudes of two images; noise in place of a second image is our
    reading, for images that are alone.

    Args:
        images: shape (n, 3, h, w), in [0, 1].

    Returns:
        As the images.

    Example:
        >>> import torch
        >>> from sap_lightning.functional.styles import retextured
        >>> image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> both = retextured(torch.cat([image, image]))
        >>> bool((both[0] == both[1]).all()), bool((both[0] - image).abs().max() > 0.1)
        (True, True)
    """
    # On the CPU and in float32, so that it is the same noise on every device.
    noise = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0))
    noise[:, 0, 0] = 0
    spectrum = torch.fft.fft2(images.float())
    return torch.fft.ifft2(spectrum * (_SPREAD * noise).exp().to(images.device)).real.clamp(0, 1).to(images.dtype)


STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    "grey": grey,
    "edges": edges,
    "posterised": posterised,
    "retextured": retextured,
}
"""By name; each takes images (n, 3, h, w) in [0, 1] and gives as many."""


def _framed(images: Tensor, width: int) -> Tensor:
    return pad(images, (width,) * 4, mode="replicate")
