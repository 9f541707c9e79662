"""Put packed modules in the place of a model's own: the model's code stays transformers', only its weights change.

model on the meta device + the artifact's tensors  ──install──►  the same model, ready to be filled with buffers
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from waterfill import kernels
from waterfill.base.errors import ArtifactError
from waterfill.codecs import LOSSLESS, get_codec
from waterfill.files.artifact import StoredTensor
from waterfill.files.experts import fused_experts
from waterfill.running.hf.coded import decode_coded, hold
from waterfill.running.hf.experts import PackedExperts
from waterfill.running.hf.fused import fuse
from waterfill.running.hf.packed import PackedMatrix, pack_embedding, pack_linear, tie
from waterfill.running.streaming.fit import levels_line

_log = logging.getLogger(__name__)


def install(model: Any, tensors: Iterable[StoredTensor], *, streamed: bool = False) -> None:
    """Replace, in place, every module of `model` whose weight is packed; streamed ones hold nothing (`streaming`).

    Raises:
        ArtifactError: a tensor has no place in the model.
        WaterfillError: a tensor has a codec that is not known.
    """
    tensors = list(tensors)
    packed = {tensor.name: tensor for tensor in tensors if tensor.packed}
    dtype, ties = model.dtype, dict(getattr(model, "all_tied_weights_keys", None) or {})
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    experts = False
    for name, tensor in packed.items():
        module = _find(model, name)
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            _check_shape(tensor, tuple(module.weight.shape), transposed=isinstance(module, Conv1D))
            weight_dtype = module.weight.dtype
            _attach(_convert(module), tensor, weight_dtype, streamed)
        else:
            _attach_expert(model, tensor, streamed, shapes)
            experts = True
    if experts:  # the other implementations want all experts as one dense tensor
        model.set_experts_implementation("eager")
    _tie(model, {target: source for target, source in ties.items() if source.removesuffix(".weight") in packed})
    hold(model, [tensor for tensor in tensors if tensor.codec == LOSSLESS], dtype)
    if streamed:  # their buffers are in the files, but not in the model
        pass_by(model, [buffer.name for tensor in packed.values() for buffer in tensor.buffers])


def pass_by(model: Any, names: Sequence[str]) -> None:
    """Have transformers say nothing of these entries of the files, which the model has no place for."""
    if names:
        pattern = f"^({'|'.join(map(re.escape, names))})$"
        known = model._keys_to_ignore_on_load_unexpected  # a set, but for early versions, which add lists to it
        model._keys_to_ignore_on_load_unexpected = (
            {*known, pattern} if isinstance(known, set) else [*(known or ()), pattern]
        )


def arrange(model: Any) -> None:
    """Bring the buffers of every packed module, loaded by now, into the layout that the kernels multiply from."""
    decode_coded(model)
    every = [module for module in model.modules() if isinstance(module, PackedMatrix)]
    packed = [module for module in every if not module.streamed]
    if packed:
        kernels.set_up()
    coded = [module for module in packed if module.stored is not module.codec]
    stored = _buffer_bytes(coded)
    for module in tqdm(packed, desc="decoding weights", disable=None if coded else True, leave=False, delay=1):
        module.arrange()
    for module in every:
        module.end_loading()
    if coded:
        _log.info("%s", levels_line(stored, _buffer_bytes(coded)))
    if packed and kernels.implementation() != kernels.STORED:
        kernels.log_slow(module.codec for module in packed)
        fuse(model)


def _buffer_bytes(modules: Iterable[PackedMatrix]) -> int:
    return sum(buffer.nbytes for module in modules for buffer in module.buffers(recurse=False))


def _convert(module: nn.Module) -> Any:
    return pack_embedding(module) if isinstance(module, nn.Embedding) else pack_linear(module)


def _check_shape(tensor: StoredTensor, shape: tuple[int, ...], *, transposed: bool) -> None:
    if tensor.shape != (shape[::-1] if transposed else shape):
        raise ArtifactError(
            f"tensor {tensor.name!r} is a matrix {list(tensor.shape)} where the model has {list(shape)}; fetch the "
            "artifact again, or pack the model again"
        )


def _attach(module: PackedMatrix, tensor: StoredTensor, dtype: Any, streamed: bool) -> None:
    out_features, in_features = tensor.shape
    module.attach(get_codec(tensor.codec), (out_features, in_features), tensor.exponent, dtype, streamed=streamed)
    module.loading = True


def _attach_expert(
    model: nn.Module, tensor: StoredTensor, streamed: bool, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """`tensor` is one expert, `<module>.<parameter>.<index>`, of a fused 3-D parameter; `shapes` are those of all."""
    path, _, index = tensor.name.rpartition(".")
    parent_path, _, attribute = path.rpartition(".")
    parent = _find(model, parent_path)
    if parent is None or not index.isdecimal() or len(shapes.get(path, ())) != 3:
        raise ArtifactError(f"tensor {tensor.name!r} has no place in {type(model).__name__}; pack the model again")
    container = getattr(parent, attribute)
    if not isinstance(container, PackedExperts):
        transposed = fused_experts(parent).get(attribute, False)
        parameter = parent._parameters.pop(attribute)
        assert parameter is not None
        container = PackedExperts(len(parameter), transposed, parameter.dtype)
        setattr(parent, attribute, container)
    _check_shape(tensor, shapes[path][1:], transposed=container.transposed)
    if int(index) >= len(container):
        raise ArtifactError(f"tensor {tensor.name!r} is one expert too many: {path} has {len(container)}")
    _attach(container.expert(int(index)), tensor, container.dtype, streamed)


def _find(model: nn.Module, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _tie(model: Any, ties: dict[str, str]) -> None:
    """Tie modules, given as {parameter: the packed one that it shares}, and leave transformers none of them to tie."""
    for target, source in ties.items():
        tie(model.get_submodule(target.removesuffix(".weight")), model.get_submodule(source.removesuffix(".weight")))
    for path, module in model.named_modules():
        keys = getattr(module, "all_tied_weights_keys", None)
        if ties and isinstance(keys, dict):
            prefix = f"{path}." if path else ""
            left = {target: source for target, source in keys.items() if prefix + target not in ties}
            module.all_tied_weights_keys = module._tied_weights_keys = left  # the latter may have been patterns
