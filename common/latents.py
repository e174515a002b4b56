"""An autoencoder's latent space: digits in it, walks through it, its map by t-SNE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.rng import generator

if TYPE_CHECKING:
    import torch

    from common.data import HF_MNIST

PERPLEXITY = 30.0  # t-SNE's neighbourhood size


def encode_digits(autoencoder: Any, digits: HF_MNIST, count: int, seed: int, device: Any = "cpu") -> tuple:
    """(latents (N, D), labels (N,), images (N, 1, 28, 28)) of `count` random digits, fewer if there are fewer.

    The first two are numpy arrays, the images, in [0, 1], a tensor.
    """
    import torch

    rows = torch.randperm(len(digits), generator=generator(seed, "t-SNE digits"))[:count]
    images, labels = digits[rows]
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(part.to(device)).cpu() for part in images.split(1000)])
    return latents.numpy(), labels.numpy(), images


def tsne_map(latents: Any, perplexity: float = PERPLEXITY) -> Any:
    """(N, D) latents -> (N, 2) map (van der Maaten & Hinton 2008), begun from the principal components; numpy arrays.

    perplexity: less than N.
    """
    from sklearn.manifold import TSNE

    init = "pca" if latents.shape[1] > 1 else "random"
    return TSNE(2, perplexity=perplexity, init=init, random_state=0).fit_transform(latents)


def walks_between(autoencoder: Any, images: torch.Tensor, steps: int) -> torch.Tensor:
    """Straight walks through the latent space: images (2N, 1, 28, 28) in [0, 1] -> (N * steps, 1, 28, 28).

    Walk i leads from image i to image N + i.
    """
    import torch

    with torch.no_grad():
        first, last = autoencoder.encode(images).chunk(2)  # (N, D) each
        way = torch.linspace(0, 1, steps, device=images.device).view(1, -1, 1)  # (1, S, 1)
        return autoencoder.decode(torch.lerp(first[:, None], last[:, None], way).flatten(0, 1))  # (N * S, 1, 28, 28)
