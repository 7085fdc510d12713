"""How much each part of a record moves what a model says of it: Captum behind plain functions.

Everything here is a function of the model, one record and a public baseline; no other patient's
record takes part.

Sources: Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017 (Integrated
Gradients); Selvaraju et al., "Grad-CAM", ICCV 2017; Castro, Gomez, Tejada, "Polynomial calculation
of the Shapley value based on sampling", Computers and Operations Research 36, 2009; Lundberg, Lee,
"A Unified Approach to Interpreting Model Predictions", NeurIPS 2017 (SHAP).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.answers import risks_of
from shared.errors import ConfigError
from shared.task_plan import TaskPlan

Reals = NDArray[np.float64]

STEPS = 128
"""Points on the path of Integrated Gradients."""

ORDERS = 64
"""Random orders of the features that Shapley values are averaged over."""

_SEED = 0  # a page that is made twice is the same page
_BATCH = 32  # records at once; volumes are large


class Risk(nn.Module):
    """One column of `risks_of`, in double precision: (records, *input_shape) -> (records,)."""

    def __init__(self, module: nn.Module, task: TaskPlan, column: int) -> None:
        super().__init__()
        self.module = module.double().eval()
        self._task, self._column = task, column

    def forward(self, inputs: Tensor) -> Tensor:
        """The risk, or the value, of each record."""
        return risks_of(self._task, self.module(inputs))[:, self._column]


def require_captum() -> None:
    """Raise ConfigError, with the remedy, unless Captum is installed."""
    if importlib.util.find_spec("captum") is None:
        raise ConfigError(
            "explanations need the package captum, which is not installed. "
            "Install it: pip install 'fedward[explain]'."
        )


def risk_at(risk: Risk, inputs: NDArray[np.float32]) -> float:
    """What the model says of one record, shape (*input_shape,)."""
    with torch.inference_mode():
        return float(risk(_one(inputs)))


def integrated_gradients(
    risk: Risk, inputs: NDArray[np.float32], baseline: NDArray[np.float32]
) -> Reals | None:
    """Integrated Gradients of one record along the straight path from a baseline.

    Returns:
        float64, the inputs' shape; they add up to risk(inputs) - risk(baseline), but for the
        error of `STEPS` points. None for a model that moves in jumps, as trees do.
    """
    if not _is_smooth(risk, inputs):
        return None
    from captum.attr import IntegratedGradients  # noqa: PLC0415  # optional, slow to import

    found = IntegratedGradients(risk).attribute(
        _one(inputs), baselines=_one(baseline), n_steps=STEPS, internal_batch_size=_BATCH
    )
    values: Reals = found[0].detach().numpy()
    return values


def shapley_values(
    risk: Risk,
    inputs: NDArray[np.float32],
    baseline: NDArray[np.float32],
    groups: Sequence[slice],
) -> Reals:
    """Shapley values of a record's features, over `ORDERS` random orders.

    Args:
        risk: Of a table's model.
        inputs: Shape (width,).
        baseline: Likewise; a feature that is absent has its columns.
        groups: The columns of each feature, which come and go together.

    Returns:
        float64, shape (features,); they add up to risk(inputs) - risk(baseline).
    """
    from captum.attr import ShapleyValueSampling  # noqa: PLC0415

    mask = torch.zeros((1, len(inputs)), dtype=torch.long)
    for number, columns in enumerate(groups):
        mask[0, columns] = number
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(_SEED)
        found = ShapleyValueSampling(risk).attribute(
            _one(inputs),
            baselines=_one(baseline),
            feature_mask=mask,
            n_samples=ORDERS,
            perturbations_per_eval=len(groups),
        )
    each: Reals = found[0].double().numpy()
    return np.array([each[columns.start] for columns in groups])


def grad_cam(risk: Risk, inputs: NDArray[np.float32]) -> Reals | None:
    """Where a convolutional network looked for what raises the risk.

    Args:
        risk: Of an image's model.
        inputs: Shape (channels, *grid).

    Returns:
        float64, shape (*grid,), 0 or more; None for a model without a stack of convolutions.
    """
    layer = spatial_layer(risk, inputs)
    if layer is None:
        return None
    from captum.attr import LayerAttribution, LayerGradCam  # noqa: PLC0415

    coarse = LayerGradCam(risk, layer).attribute(_one(inputs), relu_attributions=True)
    grid = inputs.shape[1:]
    fine = LayerAttribution.interpolate(
        coarse.detach(), grid, interpolate_mode="trilinear" if len(grid) == 3 else "bilinear"
    )
    values: Reals = fine[0, 0].clamp(min=0).numpy()
    return values


def spatial_layer(risk: Risk, inputs: NDArray[np.float32]) -> nn.Module | None:
    """The last module that still gives a picture of its input, after two convolutions or more.

    One convolution alone, as a Transformer has to cut its patches, makes no such picture.
    """
    convolutions = [m for m in risk.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    if len(convolutions) < 2:
        return None
    last: list[nn.Module] = []

    def note(module: nn.Module, _: object, output: object) -> None:
        pictured = isinstance(output, Tensor) and output.dim() == inputs.ndim + 1
        if pictured and max(output.shape[2:]) > 1:  # type: ignore[attr-defined]
            last[:] = [module]

    handles = [m.register_forward_hook(note) for m in risk.module.modules()]
    try:
        risk_at(risk, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return last[0] if last else None


def _is_smooth(risk: Risk, inputs: NDArray[np.float32]) -> bool:
    """Whether what the model says has a gradient in its inputs."""
    start = _one(inputs).requires_grad_()
    (slope,) = torch.autograd.grad(risk(start).sum(), start, allow_unused=True)
    return slope is not None


def _one(inputs: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(inputs.astype(np.float64))[None]
