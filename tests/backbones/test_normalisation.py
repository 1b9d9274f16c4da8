"""Local response normalisation against its formula, whatever computes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sppnet.backbones.architectures import LocalResponseNorm


def by_formula(x: np.ndarray, size: int, alpha: float, beta: float) -> np.ndarray:
    """(C, H, W) -> the same, cell by cell."""
    result, reach = np.empty_like(x), size // 2
    for c, i, j in np.ndindex(*x.shape):
        around = x[c, max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]
        result[c, i, j] = x[c, i, j] * (1 + alpha * (around**2).sum() / size**2) ** -beta
    return result


@pytest.mark.parametrize(("size", "alpha", "beta"), [(3, 5e-5, 0.75), (5, 1e-3, 0.75), (1, 1e-3, 0.5), (3, 1e-4, 1.0)])
@pytest.mark.parametrize("shape", [(2, 4, 5), (3, 1, 1), (9, 17, 2), (31, 2, 211)])  # the last: more than three pieces
def test_normalisation_follows_its_formula(shape: tuple[int, int, int], size: int, alpha: float, beta: float) -> None:
    x = np.random.default_rng(0).normal(0, 100, shape)
    expected = by_formula(x, size, alpha, beta)
    layer, image = LocalResponseNorm(size, alpha, beta), torch.tensor(x)[None]
    np.testing.assert_allclose(layer(image)[0], expected, rtol=1e-10)
    with torch.inference_mode():
        np.testing.assert_allclose(layer(image)[0], expected, rtol=1e-10)
        np.testing.assert_allclose(layer(image.float())[0], expected, rtol=2e-5)
    np.testing.assert_array_equal(image[0], x)


def test_images_of_a_batch_are_normalised_apart_in_any_memory_layout() -> None:
    images = 50 * torch.randn(3, 5, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        last = LocalResponseNorm()(images.contiguous(memory_format=torch.channels_last))
        assert torch.equal(LocalResponseNorm()(images), last)
        assert last.is_contiguous(memory_format=torch.channels_last)
        for image, normalised in zip(images, last, strict=True):
            np.testing.assert_allclose(normalised, by_formula(image.numpy(), 3, 5e-5, 0.75), rtol=1e-10)


def test_bfloat16_is_rounded_once() -> None:
    images = (50 * torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))).bfloat16()
    with torch.inference_mode():
        normalised = LocalResponseNorm()(images)
        assert normalised.dtype == torch.bfloat16
        assert torch.equal(normalised, LocalResponseNorm()(images.float()).bfloat16())


def test_gradients_are_those_of_the_formula() -> None:
    images = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LocalResponseNorm(3, 0.3), (images,))


def test_an_empty_map_stays_empty() -> None:
    with torch.inference_mode():
        assert LocalResponseNorm()(torch.empty(0, 4, 6, 6)).shape == (0, 4, 6, 6)


@pytest.mark.parametrize("size", [0, 2, 4])
def test_a_size_without_a_centre_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be odd, .* got {size}"):
        LocalResponseNorm(size)
