"""The parts of a model that can be trained, each as `training.Trained`: scales, norms, an adapter.

What is stored has fewer bits than what is trained: scales and adapters are rounded to fp16, norms to the dtype that the
artifact has them in. States are of rounded values, so that the best one is the best of those that can be written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from waterfill.base.dtypes import TORCH_DTYPES
from waterfill.base.errors import WaterfillError
from waterfill.files.artifact import StoredTensor
from waterfill.running.hf.packed import PackedMatrix
from waterfill.tuning.rewriting import Buffers, kept_buffers, scales_buffers
from waterfill.tuning.scales import TrainedScales, train_scales

ALL_LINEAR = "all-linear"  # what PEFT calls every linear layer but the head
STORED_DTYPE = torch.float16  # of an adapter's weights


class Scales:
    """Gains of every scale that is stored per row and group."""

    def __init__(self, model: Any) -> None:
        self.matrices: dict[str, TrainedScales] = train_scales(model)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [matrix.gains for matrix in self.matrices.values()]

    def state(self) -> list[Tensor]:
        """Gains as they are: products are of rounded scales already."""
        return [gains.detach().clone() for gains in self.parameters]

    def changed(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Buffers]:
        """Buffers for `rewriting`, of an artifact's tensors."""
        return {name: scales_buffers(tensors[name], matrix.scales) for name, matrix in self.matrices.items()}


class Norms:
    """Weights and biases of normalisation layers.

    Raises:
        WaterfillError: the model has none.
    """

    def __init__(self, model: Any, tensors: Mapping[str, StoredTensor]) -> None:
        model.requires_grad_(False)
        self._named = {
            f"{path}.{name}": parameter
            for path, module in model.named_modules()
            if "norm" in type(module).__name__.lower()
            for name, parameter in module.named_parameters(recurse=False)
            if f"{path}.{name}" in tensors
        }
        if not self._named:
            raise WaterfillError("the model has no normalisation layers with weights; train scales or an adapter")
        for parameter in self._named.values():
            parameter.requires_grad_(True)
        self._dtypes = [TORCH_DTYPES[tensors[name].dtype] for name in self._named]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._named.values())

    def state(self) -> list[Tensor]:
        """Rounded to what the artifact has them in."""
        pairs = zip(self.parameters, self._dtypes, strict=True)
        return [parameter.detach().to(dtype).to(parameter.dtype) for parameter, dtype in pairs]

    def changed(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Buffers]:
        """As of `Scales`."""
        return {name: kept_buffers(tensors[name], parameter) for name, parameter in self._named.items()}


class Adapter:
    """A LoRA adapter of PEFT beside every packed linear layer but the head.

    Raises:
        WaterfillError: peft is not installed, or finds no layer.
    """

    def __init__(self, model: Any, *, rank: int, alpha: int, seed: int) -> None:
        try:
            import peft
        except ImportError as error:
            raise WaterfillError('adapters need peft, which is not installed: pip install "waterfill[tune]"') from error
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = peft.LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=ALL_LINEAR, task_type="CAUSAL_LM", lora_dropout=0.0
            )
            try:
                self.model: Any = peft.get_peft_model(model, config)
            except ValueError as error:
                raise WaterfillError(f"peft finds no layer of this model to put an adapter beside ({error})") from error
        self.model.eval()
        self.layers: dict[str, Any] = {
            name: module
            for name, module in model.named_modules()
            if hasattr(module, "lora_A") and isinstance(module.base_layer, PackedMatrix)
        }

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def state(self) -> list[Tensor]:
        """Rounded to `STORED_DTYPE`."""
        return [parameter.detach().to(STORED_DTYPE).to(parameter.dtype) for parameter in self.parameters]

    def set_layer(self, name: str, b: Tensor, a: Tensor) -> None:
        """Have a layer add b a x: `[out, rank]` and `[rank, in]`."""
        layer = self.layers[name]
        (adapter,) = layer.active_adapters
        share = layer.scaling[adapter] ** -0.5
        with torch.no_grad():
            layer.lora_A[adapter].weight.copy_(a * share)
            layer.lora_B[adapter].weight.copy_(b * share)

    @property
    def size_bytes(self) -> int:
        """Of its weights as they are stored."""
        return STORED_DTYPE.itemsize * sum(parameter.numel() for parameter in self.parameters)

    def save(self, folder: Any, base: str) -> None:
        """Write it as PEFT does, beside a base model of that name."""
        for parameter in self.parameters:
            parameter.data = parameter.data.to(STORED_DTYPE)
        self.model.peft_config[self.model.active_adapter].base_model_name_or_path = base
        self.model.save_pretrained(folder)
