"""A whole decoder layer for one token as one native call, where it is of the Llama kind.

With packed matrices as fast as the memory, Python and small operators between them are a large part of a token.
`native/src/layer.cpp` does a layer's arithmetic in one go; sums are float32 whatever the dtype.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch

from waterfill.base.native import DTYPES, LayerView, Vector, library
from waterfill.kernels.cpu import view_of
from waterfill.kernels.reference import Packed


class DecoderLayer:
    """Matrices in one native layout, norms and biases of the activations' dtype (float32 or bfloat16).

    All tensors are kept alive here, and read in place: their values may change, their memory must not.
    """

    def __init__(
        self,
        matrices: Mapping[str, Packed],
        vectors: Mapping[str, torch.Tensor],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        epsilon: float,
        scaling: float,
        dtype: torch.dtype,
    ) -> None:
        native = library()
        assert native is not None  # a layout exists only where the library does
        self._kept = (dict(matrices), dict(vectors))
        self._views = {name: view_of(packed) for name, packed in matrices.items()}
        self._layer = LayerView(
            hidden=matrices["q"].shape[1],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            epsilon=epsilon,
            scaling=scaling,
            dtype=DTYPES[dtype],
            cache_dtype=DTYPES[dtype],
            **{name: ctypes.pointer(view) for name, view in self._views.items()},
            **{name: Vector(vector.data_ptr(), vector.numel()) for name, vector in vectors.items()},
        )
        self._native, self._isa = native, native.isas[matrices["q"].layout]
        self.head_dim, self.dtype = head_dim, dtype

    def __call__(
        self,
        hidden: torch.Tensor,
        rotary: Sequence[torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        position: int,
    ) -> torch.Tensor:
        """Hidden states `[1, 1, hidden]` after the layer; `position` of the cache is written.

        The cache is `[1, heads, capacity, head_dim]`, `rotary` (cos, sin) of head_dim elements each.
        """
        out = torch.empty_like(hidden)
        cosine, sine = rotary
        self._native.decode_layer(
            self._isa,
            self._layer,
            hidden.data_ptr(),
            out.data_ptr(),
            cosine=cosine.data_ptr(),
            sine=sine.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            capacity=keys.shape[2],
            position=position,
        )
        return out
