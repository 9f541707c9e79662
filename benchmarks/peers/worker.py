"""Other libraries' products and models, run in a process of their own. `kernel_peers.py` starts it and asks.

    python -m benchmarks.peers.worker FAMILY        {"call": METHOD, "arguments": {…}} a line ──► {"result": …} a line

It needs numpy and the library it is asked for, and of waterfill what needs nothing itself (`files.gguf`, `files.ggml`):
any interpreter that has the former will do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, ClassVar

import numpy as np

from waterfill.files import ggml as ggml_library

TRIAL_BYTES = 96 << 20  # of weights, with which variants of a product are compared before the best one is kept
TRIAL_PASSES = 5

Pass = Callable[[], object]  # one pass over all weights of a product


def seconds_of(run: Pass) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class PeerProducts(ABC):
    """Matrix-vector products by name, each with enough distinct weights that every pass reads DRAM."""

    kinds: dict[str, Sequence[Any]]  # name -> the variants of which the fastest is taken

    def __init__(self) -> None:
        self._passes: dict[str, Pass] = {}

    def names(self) -> list[str]:
        return list(self.kinds)

    def prepare(self, name: str, rows: int, width: int, cold_bytes: int, threads: int) -> dict[str, Any]:
        """Make a product ready; returns its variant, the weights of a pass and the bytes that it reads."""
        variants = self.kinds[name]
        if len(variants) > 1:
            times = []
            for variant in variants:
                run, weights, _ = self.build(variant, rows, width, TRIAL_BYTES, threads)
                times.append(min(seconds_of(run) for _ in range(TRIAL_PASSES)) / weights)
                del run
            variants = [variants[int(np.argmin(times))]]
        self._passes[name], weights, size_bytes = self.build(variants[0], rows, width, cold_bytes, threads)
        return {"variant": self.label(variants[0]), "weights": weights, "size_bytes": size_bytes}

    def seconds(self, name: str) -> float:
        return seconds_of(self._passes[name])

    def drop(self) -> None:
        self._passes.clear()

    @abstractmethod
    def build(self, variant: Any, rows: int, width: int, cold_bytes: int, threads: int) -> tuple[Pass, int, int]:
        """(one pass, its weights, the bytes it reads)."""

    @abstractmethod
    def label(self, variant: Any) -> str:
        """How a report names the variant."""


class OnnxRuntime(PeerProducts):
    """MatMulNBits with integer activations (accuracy_level 4), a graph of many nodes: calls cost nothing."""

    kinds: ClassVar = {f"onnxruntime {bits} bit": [(bits, group) for group in (128, 32)] for bits in (4, 2)}

    def __init__(self) -> None:
        super().__init__()
        import onnx
        import onnxruntime

        self._onnx, self._runtime = onnx, onnxruntime

    def label(self, variant: tuple[int, int]) -> str:
        return f"groups of {variant[1]}"

    def build(
        self, variant: tuple[int, int], rows: int, width: int, cold_bytes: int, threads: int
    ) -> tuple[Pass, int, int]:
        (bits, group), helper, types = variant, self._onnx.helper, self._onnx.TensorProto
        codes = np.random.default_rng(0).integers(0, 256, rows * width * bits // 8, dtype=np.uint8)
        scales = np.full(rows * width // group, 0.01, np.float32)
        size_bytes = codes.nbytes + scales.nbytes
        count = -(-cold_bytes // size_bytes)
        nodes, weights, outputs = [], [], []
        for i in range(count):
            shape = [rows, width // group, group * bits // 8]
            weights.append(helper.make_tensor(f"codes{i}", types.UINT8, shape, np.roll(codes, i).tobytes(), raw=True))
            weights.append(helper.make_tensor(f"scales{i}", types.FLOAT, shape[:2], scales.tobytes(), raw=True))
            options = {"K": width, "N": rows, "bits": bits, "block_size": group, "accuracy_level": 4}
            inputs, domain = ["x", f"codes{i}", f"scales{i}"], "com.microsoft"
            nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain=domain, **options))
            outputs.append(helper.make_tensor_value_info(f"y{i}", types.FLOAT, [1, rows]))
        x = helper.make_tensor_value_info("x", types.FLOAT, [1, width])
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(helper.make_graph(nodes, "products", [x], outputs, weights), opset_imports=opsets)
        model.ir_version = 10
        session_options = self._runtime.SessionOptions()
        session_options.intra_op_num_threads, session_options.inter_op_num_threads = threads, 1
        serialised = model.SerializeToString()
        del model, weights
        session = self._runtime.InferenceSession(serialised, session_options, providers=["CPUExecutionProvider"])
        feed = {"x": np.random.default_rng(1).standard_normal((1, width), dtype=np.float32)}
        return lambda: session.run(None, feed), rows * width * count, size_bytes * count


class OpenVino(PeerProducts):
    """MatMul with u4 weights, zero points and fp16 scales; activations quantised in groups."""

    kinds: ClassVar = {"openvino u4": [128]}

    def __init__(self) -> None:
        super().__init__()
        import openvino
        from openvino import opset13

        self._openvino, self._ops = openvino, opset13

    def label(self, variant: int) -> str:
        return f"groups of {variant}"

    def build(self, variant: int, rows: int, width: int, cold_bytes: int, threads: int) -> tuple[Pass, int, int]:
        ov, ops, group = self._openvino, self._ops, variant
        codes = np.random.default_rng(0).integers(0, 256, rows * width // 2, dtype=np.uint8)
        groups = rows * width // group
        scales, zeros = np.full((rows, width // group, 1), 0.01, np.float16), np.full((groups + 1) // 2, 0x88, np.uint8)
        size_bytes = codes.nbytes + scales.nbytes + zeros.nbytes
        count = -(-cold_bytes // size_bytes)
        x = ops.parameter([1, width], ov.Type.f32)
        kept: list[np.ndarray] = [zeros]  # tensors do not own what they are made of
        outputs = []
        for i in range(count):
            kept.append(np.roll(codes, i))
            stored = ov.Tensor(kept[-1], ov.Shape([rows, width // group, group]), ov.Type.u4)
            offset = ov.Tensor(zeros, ov.Shape([rows, width // group, 1]), ov.Type.u4)
            levels = ops.convert(ops.constant(stored, shared_memory=True), np.float16)
            levels = ops.subtract(levels, ops.convert(ops.constant(offset, shared_memory=True), np.float16))
            weight = ops.reshape(ops.multiply(levels, ops.constant(scales)), ops.constant([rows, width]), False)
            outputs.append(ops.result(ops.matmul(x, ops.convert(weight, np.float32), False, True)))
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
        }
        request = ov.Core().compile_model(ov.Model(outputs, [x], "products"), "CPU", options).create_infer_request()
        kept.append(np.random.default_rng(1).standard_normal((1, width), dtype=np.float32))
        request.set_input_tensor(ov.Tensor(kept[-1]))

        def run(request: Any = request, kept: Any = kept) -> None:
            request.infer()

        return run, rows * width * count, size_bytes * count


def family(name: str) -> Any:
    """The library called `name`; ImportError where it is not installed."""
    if name == "onnxruntime":
        return OnnxRuntime()
    if name == "openvino":
        return OpenVino()
    from benchmarks.peers.ggml import Ggml, LlamaCpp
    from benchmarks.peers.llama_server import LlamaServer

    llama = LlamaCpp if ggml_library.package() == "llama-cpp-python" else LlamaServer
    return {"ggml": Ggml, "llama.cpp": llama}[name]()


def package_of(name: str) -> str:
    """What is installed to have it."""
    return ggml_library.package() if name in ("ggml", "llama.cpp") else name


def main() -> None:
    name = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print where they like; the answers stay clean

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        peer = family(name)
    except Exception as error:
        return answer(error=f"{type(error).__name__}: {error}")
    package = package_of(name)
    answer(result=f"{package} {metadata.version(package)}")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(result=getattr(peer, request["call"])(**request["arguments"]))
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")
    return None


if __name__ == "__main__":
    main()
