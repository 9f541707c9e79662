"""Our own methods: a plan within a budget is packed into a real artifact, whose files are weighed and decoded again."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from waterfill.base.progress import Step
from waterfill.codecs import Encoded, get_codec
from waterfill.files.artifact import Artifact, open_artifact
from waterfill.packing.pack import pack_plan
from waterfill.planning.budget import Budget
from waterfill.planning.menu import codec_names
from waterfill.planning.plan import Plan
from waterfill.planning.planner import Request, make_plan
from waterfill.studies.comparison.base import Candidate, Method, Put, StudiedModel


def plan_for(subject: StudiedModel, budget: Budget, request: Request, *, fed_back: bool = False) -> Plan:
    """The plan that `waterfill pack` would carry out; with error feedback where it is to be `fed_back`.

    Raises:
        Unavailable: there are no tokens to calibrate feedback on.
    """
    architecture = subject.architecture
    if not fed_back:
        return make_plan(subject.name, architecture, subject.sensitivity, budget, request)
    feedback = subject.feedback
    left = feedback.left(architecture.matrices, codec_names(architecture, request.codecs, request.purpose))
    return make_plan(
        subject.name,
        architecture,
        subject.sensitivity,
        budget,
        request,
        calibration=feedback.record,
        left=left,
    )


def packed(plan: Plan, *, title: str, name: str, progress: Step | None = None) -> Method:
    """A plan as a method. Its identity is the plan's: whatever changes the bytes changes it."""
    calibrated = plan.calibration is not None

    def run(subject: StudiedModel, put: Put) -> Candidate:
        return pack_and_decode(subject, plan, put, progress)

    return Method(name, title, "waterfill", run, "waterfill", calibrated=calibrated, options=plan.identity)


def pack_and_decode(subject: StudiedModel, plan: Plan, put: Put, progress: Step | None = None) -> Candidate:
    """Pack into a temporary directory, and decode what lies there."""
    step = None if progress is None else lambda _, done, total: progress(done, total)
    with TemporaryDirectory(prefix="waterfill-compare-") as folder:
        feedback = None if plan.calibration is None else subject.feedback.feedback
        packed_at = Path(folder) / "packed"
        out = pack_plan(plan, subject.checkpoint, subject.architecture, packed_at, feedback=feedback, progress=step)
        artifact = open_artifact(out, verify=False)
        decode(artifact, put)
        predicted = plan.predicted
        return Candidate(
            size_bytes=artifact.size_bytes,
            bits=plan.bits,
            predicted=(predicted.kl, predicted.kl_low, predicted.kl_high),
        )


def decode(artifact: Artifact, put: Put) -> None:
    """Every packed matrix of an artifact, decoded by its codec from the buffers on disk."""
    for tensor in artifact.tensors.values():
        if not tensor.packed:
            continue
        rows, width = tensor.shape
        buffers = {key: artifact.read(buffer.name) for key, buffer in zip(tensor.keys, tensor.buffers, strict=True)}
        encoded = Encoded((rows, width), buffers, tensor.exponent, noise_power=0.0, power=0.0)
        put(tensor.name, get_codec(tensor.codec).decode(encoded))
