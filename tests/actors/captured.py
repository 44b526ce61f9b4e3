"""What flows through a model's targets, captured by hooks and by autograd: the reference of moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.pytorch_utils import Conv1D

from actors.calibration import _draw, collect, finished
from actors.models import list_targets, load_model
from actors.moments import Moments
from actors.types import BuildPlan, ModelSource, TargetSpec

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    model: nn.Module
    targets: tuple[TargetSpec, ...]

    @property
    def names(self) -> list[str]:
        return [target.name for target in self.targets]

    def called(self, *names: str) -> tuple[TargetSpec, ...]:
        return tuple(target for target in self.targets if target.module.split(".")[-1] in names)


def setting_of(folder: Path) -> Setting:
    model = load_model(folder, ModelSource(str(folder)))
    return Setting(model, list_targets(model))


def weight(module: nn.Module) -> Floats:
    matrix = module.weight.T if isinstance(module, Conv1D) else module.weight
    return matrix.detach().double().numpy()


@dataclass(frozen=True)
class Seen:
    """Inputs (tokens, n), outputs less the bias (tokens, m) and gradients (tokens, m), of which those of the
    `predicted` tokens are averaged."""

    inputs: Floats
    outputs: Floats
    gradients: Floats
    predicted: int

    def spread(self, side: str) -> tuple[Floats, Floats]:
        """Mean and covariance over all tokens alike."""
        rows = self.inputs if side == "input" else self.outputs
        return rows.mean(0), np.cov(rows.T, bias=True)

    def curvature(self, matrix: Floats) -> tuple[Floats, Floats, Floats]:
        """Of the smaller side: the moment of gradients over the root of their norms, with the trace of the
        gradients' own, and the mean and covariance that their norms weight."""
        wide = matrix.shape[0] <= matrix.shape[1]
        back, rows = (self.gradients, self.outputs) if wide else (self.gradients @ matrix, self.inputs)
        norms = np.linalg.norm(back, axis=1)
        held = back[norms > 0] / np.sqrt(norms[norms > 0, None])
        gradient = held.T @ held * ((norms**2).sum() / norms.sum() / self.predicted)
        return gradient, np.average(rows, axis=0, weights=norms), np.cov(rows.T, bias=True, aweights=norms)


Labels = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def of_the_data(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that predict something, and what they should have predicted."""
    return logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()


def drawn(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    probabilities = torch.softmax(logits.detach(), -1).float()
    labels = torch.stack([_draw(rows, index) for index, rows in enumerate(probabilities)])
    return logits.flatten(0, 1), labels.flatten()


def captured(setting: Setting, ids: torch.Tensor, labels: Labels = of_the_data) -> dict[str, Seen]:
    """What flows through the targets in one pass of the model in float64 and back."""
    model, found, gradients = setting.model.double(), {}, {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            # As they are now: models change some of them in place.
            found[name] = args[0].clone(), output.clone()
            output.register_hook(lambda gradient: gradients.update({name: gradient}))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in setting.names]
    model.get_input_embeddings().weight.requires_grad_(True)
    predictions, wanted = labels(model(ids).logits, ids)
    torch.nn.functional.cross_entropy(predictions, wanted, reduction="sum").backward()
    model.get_input_embeddings().weight.requires_grad_(False)
    for handle in handles:
        handle.remove()
    seen = {}
    for name, (inputs, output) in found.items():
        bias = model.get_submodule(name).bias
        flat = [inputs, output if bias is None else output - bias, gradients[name]]
        seen[name] = Seen(*(tensor.detach().flatten(0, 1).numpy() for tensor in flat), len(wanted))
    model.float()
    return seen


def close(found: torch.Tensor | None, expected: Floats, tolerance: float) -> None:
    """Equal relative to the largest entry."""
    assert found is not None
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def same(found: dict[str, Moments], expected: dict[str, Moments], tolerance: float) -> None:
    assert [*found] == [*expected]
    for name, moments in expected.items():
        one = found[name]
        assert (one.side, one.tokens) == (moments.side, moments.tokens)
        close(one.input_mean, moments.input_mean.numpy(), tolerance)
        for here, there in ((one.spread, moments.spread), (one.weighted, moments.weighted)):
            assert (here is None) == (there is None)
            if here is not None and there is not None:
                close(here.mean, there.mean.numpy(), tolerance)
                close(here.covariance, there.covariance.numpy(), tolerance)
        assert (one.gradient is None) == (moments.gradient is None)
        if moments.gradient is not None:
            close(one.gradient, moments.gradient.numpy(), tolerance)


def all_groups(
    setting: Setting, ids: torch.Tensor, made: BuildPlan, gradients: Sequence[str] = (), labels: str = "data"
) -> dict[str, Moments]:
    found: dict[str, Moments] = {}
    for group in made.groups:
        chosen = [target for target in setting.targets if target.name in group]
        found |= finished(collect(setting.model, chosen, ids, made, gradients, labels))
    return found
