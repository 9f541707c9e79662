"""The model without its weights, and where on disk each of its tensors lies.

    checkpoint ──► build_skeleton ──► transformers model on the meta device ──► locate ──► ModelTensors, in order

Names on disk are not always the model's: prefixes come and go, and many mixtures of experts store one 2-D tensor per
expert where the model has one fused 3-D parameter. transformers' own conversion tables say how one follows from the
other; here they are applied to names alone, so that single rows can be read without building the parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, zip_longest
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from waterfill.base.dtypes import ITEM_BYTES, WEIGHT_DTYPES
from waterfill.base.errors import CheckpointError, first_line
from waterfill.files.checkpoint import CONFIG, Checkpoint


class Part(NamedTuple):
    """Checkpoint tensor `source`, or its rows `start` to `stop`, along the first axis."""

    source: str
    start: int = 0
    stop: int | None = None

    @property
    def whole(self) -> bool:
        return self.stop is None


Groups = tuple[tuple[Part, ...], ...]
"""What makes up one parameter: the parts of a group follow each other along the first axis; groups, one per expert, are
stacked along a new one."""

_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_COMPARED_ROWS = 4096


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of the model by its state-dict name, with its shape there, its safetensors dtype and its sources."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: Groups


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Any:
    """The transformers model of `checkpoint` on the meta device. Code that comes with a checkpoint is never run.

    With a `dtype`, only its parameters are there: buffers are what the model sets them to, and it computes in `dtype`
    once it has weights.

    Raises:
        CheckpointError: transformers does not know the model type or cannot build it, or is no causal language model.
    """
    file = checkpoint.path / CONFIG
    model_type = checkpoint.config.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{file} has the model type {model_type!r}, which transformers {transformers.__version__} does not know, "
            "and code that comes with a checkpoint is never run; give a model of a known type"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    except Exception as error:  # each config class validates in its own way
        raise CheckpointError(
            f"{file} is not a valid {model_type} config ({first_line(error)}); repair or replace it"
        ) from error
    _check_causal(checkpoint, config)
    options = {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device("meta") if dtype is None else _parameters_on_meta():
            return transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, experts_implementation="eager", **options
            )
    except Exception as error:  # each model class fails in its own way on a config that it cannot build
        raise CheckpointError(
            f"{file}: transformers {transformers.__version__} cannot build this {model_type} model "
            f"({first_line(error)}); repair the config, or use the version that wrote it"
        ) from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are built inside of the block give up the memory of a parameter as soon as they register it, before
    anything is written there."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # else it is being tied
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield


def _check_causal(checkpoint: Checkpoint, config: Any) -> None:
    # Some config classes map to several model classes; the mapping's value is then a tuple.
    classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    known = {cls.__name__ for cls in (classes if isinstance(classes, tuple | list) else (classes,))}
    named = [str(name) for name in checkpoint.config.get("architectures") or ()]
    if not known or not (not named or any(name in known or name.endswith(_CAUSAL_SUFFIXES) for name in named)):
        raise CheckpointError(
            f"{checkpoint.path / CONFIG} describes a {', '.join(named) or config.model_type}; give a causal "
            "language model (…ForCausalLM)"
        )


def locate(model: Any, checkpoint: Checkpoint) -> tuple[tuple[ModelTensor, ...], tuple[str, ...], tuple[str, ...]]:
    """Parameters and persistent buffers of a skeleton in execution order, the checkpoint tensors that it does not use,
    and its buffers that the checkpoint lacks, which the model sets itself.

    Tied tensors appear once, under the name that the others are tied to, wherever they are stored.

    Raises:
        CheckpointError: a parameter is absent, of another shape or an unsupported dtype, or made from the checkpoint in
            a way that does not leave its rows in one piece.
    """
    groups, ignored = _find_on_disk(model, checkpoint)
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    stored, missing, absent = [], [], []
    for same in names.values():
        name, *aliases = sorted(same, key=model.all_tied_weights_keys.__contains__)
        places = [groups[known] for known in (name, *aliases) if known in groups]
        if places:
            _check_equal(checkpoint, places)
            stored.append(_check_stored(checkpoint, name, state[name], places[0]))
        elif isinstance(state[name], nn.Parameter):
            missing.append(name)
        elif not _matches(name, model._keys_to_ignore_on_load_missing or ()):
            absent.append(name)
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} tensors of the model, such as {missing[0]!r}, and holds "
            f"{len(checkpoint.tensors)}, such as {next(iter(checkpoint.tensors), None)!r}; give every tensor that "
            f"{CONFIG} calls for"
        )
    return tuple(stored), ignored, tuple(absent)


def superfluous(model: Any, ignored: Sequence[str]) -> frozenset[str]:
    """Those of the ignored tensors that transformers leaves out without a word: masks and tables that older versions
    stored, and parts of a model that it does not run."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    return frozenset(name for name in ignored if _matches(name, patterns))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _find_on_disk(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, Groups], tuple[str, ...]]:
    """Sources by state-dict name, and the checkpoint tensors that lead to none.

    Follows `convert_and_load_state_dict_in_model` of `transformers.core_model_loading`, collecting names in place of
    tensors: rename every key; where a converter matched, gather all the keys that it makes one parameter of.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    direct: dict[str, Groups] = {}
    converted: dict[str, dict[str, list[str]]] = {}
    ignored = []
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if name not in state or (pattern is None and name in direct):
            ignored.append(key)
        elif pattern is None:
            direct[name] = ((Part(key),),)
        else:
            converted.setdefault(name, {}).setdefault(pattern, []).append(key)
    gathered: dict[str, Groups] = {}
    for name, keys in converted.items():
        converter = converter_of[next(iter(keys))]
        first, *others = converter.target_patterns
        targets = [name, *(name.replace(first, other) for other in others)]
        rows = [next(iter(state[target].shape), 0) if target in state else 0 for target in targets]
        gathered |= dict(zip(targets, _gather(checkpoint, name, converter, keys, rows), strict=False))
    return gathered | direct, tuple(ignored)


def _gather(
    checkpoint: Checkpoint, name: str, converter: Any, keys: Mapping[str, list[str]], rows: Sequence[int]
) -> list[Groups]:
    """What a converter makes of `keys` (by source pattern), if it only stacks experts, appends rows, or cuts `rows` for
    each of its targets from one tensor."""
    ordered = [[Part(key) for key in keys[pattern]] for pattern in converter.source_patterns if pattern in keys]
    match converter.operations:
        case [MergeModulelist(dim=0)] if len(ordered) == 1:
            return [tuple((part,) for part in ordered[0])]
        case [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return [tuple(tuple(filter(None, group)) for group in zip_longest(*ordered))]
        case [Concatenate(dim=0)] if len(rows) == 1:
            return [(tuple(chain.from_iterable(ordered)),)]
        case [operation] if _cuts_rows(operation) and len(rows) > 1 and len(ordered) == len(ordered[0]) == 1:
            source = ordered[0][0].source
            ends = list(accumulate(rows, initial=0))
            if ends[-1] == checkpoint.tensors[source].shape[0]:
                return [((Part(source, start, stop),),) for start, stop in pairwise(ends)]
    raise CheckpointError(
        f"{checkpoint.tensors[ordered[0][0].source].file}: {name!r} is made from tensor {ordered[0][0].source!r} by "
        f"{', '.join(map(repr, converter.operations))}, which leaves no rows to read one by one; store the model in "
        "transformers' own layout, with save_pretrained(…, save_original_format=False)"
    )


def _cuts_rows(operation: Any) -> bool:
    """Not all versions of transformers have both."""
    return type(operation).__name__ in ("Chunk", "Split") and operation.dim == 0


def _check_equal(checkpoint: Checkpoint, places: Sequence[Groups]) -> None:
    """A tied tensor that is stored under several names must be equal under all, or one of its values would be lost."""
    first, *others = (groups[0][0] for groups in places)
    dtype = checkpoint.tensors[first.source].dtype
    for other in others:
        info = checkpoint.tensors[other.source]
        if (shape_of(checkpoint, first), dtype) != (shape_of(checkpoint, other), info.dtype) or not all(
            map(torch.equal, _blocks(checkpoint, first), _blocks(checkpoint, other))
        ):
            raise CheckpointError(
                f"{info.file}: tensor {other.source!r} differs from {first.source!r}, though {CONFIG} ties them; set "
                '"tie_word_embeddings": false there'
            )


def _blocks(checkpoint: Checkpoint, part: Part) -> Iterator[torch.Tensor]:
    """Its rows, some thousands at a time."""
    stop = part.start + shape_of(checkpoint, part)[0]
    for start in range(part.start, stop, _COMPARED_ROWS):
        yield checkpoint.read(part.source, slice(start, min(start + _COMPARED_ROWS, stop)))


def _check_stored(checkpoint: Checkpoint, name: str, tensor: torch.Tensor, groups: Groups) -> ModelTensor:
    """`groups` as the place of `tensor`, if they have its shape and one dtype that a parameter, or buffer, may have."""
    permitted = WEIGHT_DTYPES if isinstance(tensor, nn.Parameter) else tuple(ITEM_BYTES)
    infos = [[checkpoint.tensors[part.source] for part in group] for group in groups]
    first = infos[0][0]
    for info in chain.from_iterable(infos):
        if info.dtype not in permitted:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has dtype {info.dtype}, which is none of "
                f"{', '.join(permitted)}; convert the checkpoint first"
            )
        if info.dtype != first.dtype:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has dtype {info.dtype}, but {first.name!r}, with which it makes up "
                f"{name!r}, has {first.dtype}; convert the checkpoint to one dtype first"
            )
    if _joined_shape([[shape_of(checkpoint, part) for part in group] for group in groups], tensor.ndim) != tuple(
        tensor.shape
    ):
        raise CheckpointError(
            f"{first.file}: tensor {first.name!r} of shape {list(first.shape)}, one of {sum(map(len, infos))} for "
            f"{name!r}, does not lead to the shape {list(tensor.shape)} that {CONFIG} calls for; give the config "
            "and all weights of one model"
        )
    return ModelTensor(name, tuple(tensor.shape), first.dtype, groups)


def shape_of(checkpoint: Checkpoint, part: Part) -> tuple[int, ...]:
    """Shape of a part of a checkpoint tensor."""
    shape = checkpoint.tensors[part.source].shape
    return shape if part.stop is None else (part.stop - part.start, *shape[1:])


def _joined_shape(groups: Sequence[Sequence[tuple[int, ...]]], dimensions: int) -> tuple[int, ...] | None:
    """Shape of the stack of the concatenations along the first axis; None if the parts do not fit together. A single
    one is a stack as well where that gives it as many `dimensions` as it should have."""
    joined = set()
    for first, *rest in groups:
        if any(shape[1:] != first[1:] for shape in rest):
            return None
        joined.add((first[0] + sum(shape[0] for shape in rest), *first[1:]) if rest else first)
    if len(joined) > 1:
        return None
    shape = joined.pop()
    return (len(groups), *shape) if len(groups) > 1 or len(shape) < dimensions else shape
