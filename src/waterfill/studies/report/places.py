"""Where each matrix belongs: its layer, its kind, and the colour that it has in every chart.

    model.layers.3.self_attn.q_proj        layer 3, kind self_attn.q_proj, family self_attn
    model.layers.3.mlp.experts.up_proj.7   layer 3, kind mlp.experts.up_proj, family mlp
    model.embed_tokens                     no layer

Names alone decide: the first number is the layer, further ones are experts. A family has one hue, its kinds have its
shades.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from waterfill.files.artifact import RAW
from waterfill.planning.plan import TensorPlan
from waterfill.studies.report.bound import coded_t2

HUES, SHADES = 4, 4  # that the style sheet knows; `f0` is for what lies outside the layers
MAX_MARKS = 1500  # beyond this many matrices, the experts of a layer are one mark


@dataclass(frozen=True)
class Place:
    """Of one matrix."""

    layer: str  # "" outside the layers
    kind: str
    label: str  # the kind's last word
    colour: str  # class of the style sheet


@dataclass(frozen=True)
class Unit:
    """What one mark stands for: a matrix, or all experts of a kind in a layer."""

    name: str
    place: Place
    tensors: tuple[TensorPlan, ...]
    measured: tuple[float, ...]  # relative noise power of each, as packed

    @property
    def weights(self) -> int:
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def bits(self) -> float:
        return 8 * self.size_bytes / self.weights

    @property
    def alpha(self) -> float:
        return sum(max(tensor.alpha, 0.0) for tensor in self.tensors)

    @property
    def kl(self) -> float:
        return sum(tensor.kl for tensor in self.tensors)

    @property
    def t2(self) -> float:
        return sum(tensor.t2 * tensor.weights for tensor in self.tensors) / self.weights

    @property
    def t2_measured(self) -> float:
        pairs = zip(self.measured, self.tensors, strict=True)
        return sum(t2 * tensor.weights for t2, tensor in pairs) / self.weights

    @property
    def t2_coded(self) -> float:
        """Without what error feedback makes of it."""
        pairs = zip(self.measured, self.tensors, strict=True)
        return sum(coded_t2(tensor, t2) * tensor.weights for t2, tensor in pairs) / self.weights

    @property
    def rho(self) -> float:
        return sum(tensor.rho * tensor.weights for tensor in self.tensors) / self.weights

    @property
    def codec(self) -> str:
        codecs = {tensor.codec for tensor in self.tensors}
        return "as it is" if codecs == {RAW} else codecs.pop() if len(codecs) == 1 else f"{len(codecs)} codecs"

    @property
    def exact(self) -> bool:
        """Whether every bit is kept, coded or not."""
        return not any(tensor.packed for tensor in self.tensors)


def units(tensors: Sequence[TensorPlan], measured_t2: dict[str, float]) -> tuple[Unit, ...]:
    """The marks of a model, in execution order."""
    place_of = places(tensors)
    groups: dict[tuple[str, str] | str, list[TensorPlan]] = {}
    for tensor in tensors:
        place = place_of[tensor.name]
        grouped = len(tensors) > MAX_MARKS and tensor.role == "expert"
        groups.setdefault((place.layer, place.kind) if grouped else tensor.name, []).append(tensor)
    result = []
    for members in groups.values():
        place = place_of[members[0].name]
        name = members[0].name if len(members) == 1 else f"{place.layer}: {place.kind}, {len(members)} experts"
        measured = tuple(measured_t2.get(tensor.name, 0.0) for tensor in members)
        result.append(Unit(name, place, tuple(members), measured))
    return tuple(result)


def places(tensors: Sequence[TensorPlan]) -> dict[str, Place]:
    """The place of every matrix by its name."""
    cut = {tensor.name: _cut(tensor.name) for tensor in tensors}
    stacks = list(dict.fromkeys(prefix for prefix, number, _ in cut.values() if number))
    families: dict[str, list[str]] = {}
    result = {}
    for name, (prefix, number, kind) in cut.items():
        if not number:
            family, layer = "", ""
        else:
            family = kind.partition(".")[0] if "." in kind else "layer"
            stack = prefix.rpartition(".")[2] or "layer"
            layer = f"layer {number}" if len(stacks) == 1 else f"{stack} {stacks.index(prefix) + 1}.{number}"
        kinds = families.setdefault(family, [])
        if kind not in kinds:
            kinds.append(kind)
        inner = [known for known in families if known]
        hue = 1 + inner.index(family) % HUES if family else 0
        colour = f"f{hue}s{kinds.index(kind) % SHADES}"
        result[name] = Place(layer, kind, kind.rpartition(".")[2] or kind, colour)
    return result


def _cut(name: str) -> tuple[str, str, str]:
    """(what stands before the layer's number, the number, the kind); no number outside the layers."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None or at == len(parts) - 1:
        return "", "", parts[-1]
    kind = ".".join(part for part in parts[at + 1 :] if not part.isdecimal())
    return ".".join(parts[:at]), parts[at], kind
