"""Small models to train: two multilayer perceptrons, a convolutional net, a transformer. torch is imported late.

The data are random and the learning rate is tiny, so that the model cannot fit the batches and drive gradients to zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Task = tuple[nn.Module, list[tuple[Tensor, Tensor]]]  # the model returns logits (rows, classes)

BATCHES = 32
LR = 1e-6


def _images(shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    import torch

    return [(torch.randn(shape), torch.randint(10, (shape[0],))) for _ in range(BATCHES)]


def _mlp(*widths: int) -> Task:
    from torch import nn

    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), _images((32, widths[0]))


def _convnet() -> Task:
    from torch import nn

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
    )  # fmt: skip
    return model, _images((32, 1, 28, 28))


def _transformer(words: int = 256, width: int = 128, length: int = 64, rows: int = 8) -> Task:
    import torch
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
            layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
            self.head = nn.Linear(width, words)

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(length)
            y = self.layers(self.words(x) + self.places.weight, mask=mask, is_causal=True)
            logits: Tensor = self.head(y)
            return logits.flatten(0, 1)

    texts = [torch.randint(words, (rows, length + 1)) for _ in range(BATCHES)]
    return Transformer(), [(t[:, :-1], t[:, 1:].flatten()) for t in texts]


MODELS: dict[str, Callable[[], Any]] = {
    "MLP 784-128-10": lambda: _mlp(784, 128, 10),
    "MLP 784-2048-2048-2048-10": lambda: _mlp(784, 2048, 2048, 2048, 10),
    "convnet 28x28": _convnet,
    "transformer, 4 layers of 128": _transformer,
}


def iteration(
    name: str, optimizer: Callable[[Any], torch.optim.Optimizer | None], *, compiled: bool = False
) -> tuple[Callable[[], None], torch.optim.Optimizer] | None:
    """A function that runs one training iteration, compiled as a whole if ``compiled``, and its optimizer.

    Model and data are the same for every contender.
    """
    import torch
    from torch.nn.functional import cross_entropy

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batches = MODELS[name]()
    opt = optimizer(model.parameters())
    if opt is None:
        return None
    for group in opt.param_groups:
        group["lr"] = LR
    turn = itertools.cycle(batches)

    def work(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        opt.step()

    if compiled:
        work = torch.compile(work)

    def run() -> None:
        work(*next(turn))

    return run, opt
