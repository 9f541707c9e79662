"""What `unchanged.py` runs, in stages: what a stage reads, earlier ones have written. Paths are relative to its folder.

inputs ──► plans ──► artifacts ──copied, spoiled──► commands on them, and refusals ──► what builds on those
"""

from __future__ import annotations

import json
import shlex
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ref-llama"
COMMANDS = ("plan", "pack", "inspect", "seal", "eval", "compare", "report", "generate", "chat", "doctor")
TINY = "--probe random --sequences 2 --length 16"
REUSE = "--sensitivity ref.sensitivity.json"
COMPARED = f"compare ref --text text.py --bits 3 {REUSE} --context 128 --windows 2 --methods waterfill,rtn-4"
GREEDY = "-p 'def read(path):' --temperature 0 --max-new-tokens 12"


@dataclass(frozen=True)
class Case:
    """One command: `waterfill` with these arguments, or what `unchanged.command` says of their first word."""

    line: str
    quick: bool = False
    typed: str = ""  # on standard input
    environment: dict[str, str] = field(default_factory=dict)
    cache: str = ""  # a name, where commands share one
    shape: bool = False  # of the JSON that it prints, only names and types are compared
    blur: bool = False  # numbers, and what a process is bound by, are left out
    own: bool = False  # in a process of its own, whatever it takes to start

    @property
    def forked(self) -> bool:
        """Whether it may start in a process that has imported torch and transformers: where nothing else is slow."""
        first = self.arguments[0]
        fast = "--help" in self.line or (first in ("generate", "chat") and "--engine transformers" not in self.line)
        return not (self.own or self.blur or self.shape or fast or first not in COMMANDS or first == "doctor")

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(shlex.split(self.line))

    @property
    def name(self) -> str:
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*settings, self.line, *([f"<<< {self.typed!r}"] if self.typed else [])])


def of(lines: str, **options: Any) -> list[Case]:
    """A case per line; those of the quick run begin with `+`."""
    found = [line.strip() for line in lines.splitlines() if line.strip()]
    return [Case(line.removeprefix("+ "), quick=line.startswith("+ "), **options) for line in found]


def stages(folder: Path) -> list[Callable[[], list[Case]]]:
    def on_artifacts() -> list[Case]:
        spoil(folder)
        return commands() + refusals()

    return [models, plans, lambda: artifacts(folder), on_artifacts, at_last, on_bad_settings]


# -------------------------------------------------------------------------------------------- inputs, plans, artifacts


def lay_out(folder: Path) -> None:
    shutil.copytree(EXAMPLE, folder / "ref")
    source = Path(textwrap.__file__).read_text()
    (folder / "text.py").write_text(source)
    (folder / "latin.txt").write_bytes(b"caf\xe9" * 50)
    (folder / "empty.txt").touch()
    (folder / "model.Q4_0.gguf").write_bytes(b"GGUF" + bytes(20))
    (folder / "nothing").mkdir()
    (folder / "questions.jsonl").write_text(json.dumps({"question": "a", "choices": ["b", "c"], "answer": 0}) + "\n")


def models() -> list[Case]:
    helps = [Case(f"{name} --help", quick=True) for name in COMMANDS]
    more = of("""
        + --help
        + --version
        + -h
        + python -m waterfill --version
        + worker models .
        + worker names
        + nonsense
        + plan
        + doctor --fast
    """)
    return [*helps, *more]


def plans() -> list[Case]:
    alone = of(
        f"""
        + plan ref --size 3MB --sequences 4 --length 64 --save ref.json
          worker models . --others
        + plan qwen --bits 4 {TINY} --save qwen.json --json
    """,
        own=True,
    )
    return alone + of(f"""
          plan ref --max-kl 0.05 --gain mse --text text.py --sequences 2 --length 64 --save text.json --all
          plan ref --lossless --save lossless.json
          plan qwen --bits 3 --method perturb --seed 2 {TINY} --save perturbed.json
    """)


def artifacts(folder: Path) -> list[Case]:
    shards = json.loads((folder / "ref.json").read_text()) | {"shard_bytes": 1_000_000}
    (folder / "shards.json").write_text(json.dumps(shards))
    return of(f"+ pack ref sized --size 3MB {REUSE}", own=True) + of(f"""
        + pack ref memory --bits 3.5 --for memory {REUSE} --json
          pack ref uniform --bits 4 --uniform {REUSE}
          pack ref lossless --lossless
          pack ref kept --bits 4 --keep model.embed_tokens --keep '*.layers.0.*' {REUSE}
          pack ref scalar --bits 3 --codec 'higgs-p1-*' --codec raw {REUSE}
          pack ref fast --bits 3 --codec fast --tie '*.q_proj,*.k_proj,*.v_proj' {REUSE} --all
          pack ref eight --bits 3 --codec trellis-s8 --gain unbiased {REUSE}
          pack ref small --bits 2.2 {REUSE}
          pack ref planned --plan ref.json
        + worker shards ref shards.json sharded
          pack ref textual --max-kl 0.1 --text text.py --sequences 2 --length 64 --seed 1
          pack qwen qwen-packed --plan qwen.json
          pack qwen qwen-memory --size 500kB --for memory {TINY}
          pack gpt2 gpt2-packed --bits 4 {TINY}
          pack gpt2 gpt2-memory --bits 3 --for memory {TINY}
          pack moe moe-packed --bits 4 {TINY}
          pack moe moe-memory --bits 3 --for memory {TINY}
          pack moe moe-lossless --lossless
          pack wide wide-packed --bits 4 --uniform --for memory --codec 'higgs-p1-*' {TINY}
    """)


# ------------------------------------------------------------------------------------------------------------ commands


def commands() -> list[Case]:
    measured = "eval sized --text text.py --context 128 --windows 2"
    return [
        *of(f"""
            + plan ref --bits 3 {REUSE}
            + plan ref --bits 3.25 --for memory {REUSE} --json
              plan ref --bits 4 --keep '*.down_proj' --uniform {REUSE} --all
              plan moe --bits 3 {TINY}
            + inspect sized
            + inspect memory --json
              inspect kept --all
              inspect lossless
              inspect sharded --json
              inspect moe-packed
            + worker computed sized memory
              worker computed uniform lossless kept
              worker computed scalar fast eight sharded
              worker computed qwen-packed qwen-memory gpt2-packed gpt2-memory
              worker computed moe-packed moe-memory moe-lossless
            + seal sealed --json
              seal planned
            + {measured} --against ref --json
              {measured} --against ref --statistics --no-cache
              {measured} --convention strided --stride 32
              {measured} --convention llama.cpp --against ref --json
              eval memory --text text.py --context 32 --windows 1 --convention decode
              eval lossless --against ref --text text.py --context 64 --windows 2 --batch 2
              eval ref --text text.py --context 128 --windows 2
              eval gpt2-packed --against gpt2 --text text.py --context 64 --windows 2
              eval moe-packed --against moe --text text.py --context 64 --windows 2 --json
            + generate sized {GREEDY}
              generate memory {GREEDY} --lookup 4 --json
              generate memory {GREEDY} --lookup 4 --engine transformers --json
              generate memory {GREEDY} --draft small
              generate memory {GREEDY} --draft small --engine transformers
              generate sized -p 'import' --seed 5 --temperature 0.8 --top-p 0.9 --top-k 50 --repetition-penalty 1.1
              generate gpt2-packed {GREEDY}
              generate moe-packed {GREEDY}
              generate qwen-packed {GREEDY}
            + worker calls ref
              report uniform --original ref --text text.py --context 64 --windows 1 --max-new-tokens 6 --prompt def
        """),
        *of(f"+ generate sized {GREEDY} --engine transformers\ninspect small\n{measured}", own=True),
        *of("eval sized --text text.py --context 128 --windows 2 --against ref", cache="shared"),
        *of(
            f"{COMPARED},hqq-4 --json",
            cache="shared",
        ),
        *of(
            f"""
              generate wide-packed {GREEDY} --memory 115MB
              generate wide-packed {GREEDY} --memory 115MB --lookup 2
              generate sized {GREEDY} --memory 20MB
              chat wide-packed --memory 470MB --engine transformers --temperature 0 --max-new-tokens 4
              eval wide-packed --text text.py --context 32 --windows 1 --memory 600MB
              doctor
            """,
            blur=True,
        ),
        *of("eval sized --efficiency --prompt-tokens 8 --new-tokens 4 --json\ndoctor --json", shape=True),
        *of(
            """
            + chat sized --temperature 0 --max-new-tokens 8
              chat sized --temperature 0 --max-new-tokens 8 --json --system Short.
              chat memory --engine transformers --temperature 0 --max-new-tokens 8 --lookup 2
            """,
            typed="hello\nand then?\n",
        ),
        *of(f"generate memory {GREEDY}", environment={"WATERFILL_ISA": "scalar"}),
        *of(f"generate memory {GREEDY} --engine transformers", environment={"WATERFILL_ISA": "none"}),
        *of(f"generate memory {GREEDY}", environment={"WATERFILL_ACTIVATIONS": "float"}),
        *of(f"+ generate memory {GREEDY}", environment={"WATERFILL_ISA": "abacus"}),
    ]


def at_last() -> list[Case]:
    """What reads the files of the stage before."""
    return [
        *of("eval sized --text text.py --context 128 --windows 2 --against ref --statistics --json", cache="shared"),
        *of(COMPARED, cache="shared"),
        *of("report sized --json --output page.html", cache="shared"),
        *of("""
            + inspect sealed
            + seal damaged/settings
              pack ref planned --plan text.json --overwrite
              pack ref sized --plan ref.json --json
        """),
    ]


def on_bad_settings() -> list[Case]:
    return of("""
        generate damaged/settings -p x --engine native
        generate damaged/settings -p x --engine transformers
    """)


# ------------------------------------------------------------------------------------------------------------ refusals


def refusals() -> list[Case]:
    by_damage = [
        Case(f"{command} damaged/{name}", quick=name in ("flipped", "version") and command == "inspect")
        for name in DAMAGES
        for command in (("inspect", "seal") if name in ("flipped", "code") else ("inspect",))
    ]
    by_plan = [Case(f"pack ref never --plan hostile/{name}.json", quick=name == "bytes") for name in HOSTILE]
    return (
        by_damage
        + by_plan
        + of(f"""
        + plan ref
          plan ref --size 3MB --bits 3
        + plan ref --size 3XB
          plan ref --size 3XB --json
          plan ref --size 0
          plan ref --size 1kB {REUSE}
          plan ref --bits nan
          plan ref --bits many
          plan ref --bits 3 --gain best
          plan ref --bits 3 --codec higgs-p9-n1 {REUSE}
          plan ref --bits 3 --keep 'nothing.*'
          plan ref --bits 3 --tie q,k {REUSE}
          plan ref --bits 3 --text latin.txt
          plan ref --bits 3 --text empty.txt
          plan ref --bits 3 --sequences 1
          plan ref --bits 3 --sensitivity ref.json
          plan ref --bits 3 --revision main
          plan ref --lossless --gain mse
          plan nothing --bits 3
          plan text.py --bits 3
          plan sized --bits 3
          plan org/missing --bits 3
          plan model.Q4_0.gguf --bits 3
          plan qwen --bits 3 {REUSE}
        + pack ref sized --bits 3
          pack ref nothing/.. --bits 3 --overwrite
          pack ref never --plan ref.json --bits 3
          pack ref never --plan ref.sensitivity.json
          pack qwen never --plan ref.json
        + inspect missing
          inspect nothing
          inspect ref
          inspect ref --json
          seal nothing
          eval sized
          eval sized --text missing.txt
          eval sized --text latin.txt
          eval sized --text empty.txt
          eval sized --text text.py --context 99999
          eval sized --text text.py --windows 0
          eval sized --text text.py --stride 4
          eval sized --text text.py --against qwen --context 32 --windows 1
          eval sized --tasks piqa
          eval model.Q4_0.gguf --text text.py
          compare ref --text text.py --methods best
          compare nothing --text text.py
          report ref
          report sized --text text.py
          generate sized
          generate sized -p x --temperature -1
          generate sized -p x --max-new-tokens 0
          generate sized -p x --lookup 0
          generate sized -p x --draft qwen-packed --temperature 0 --max-new-tokens 8
          generate gpt2-packed -p x --engine native
          generate damaged/flipped -p x
          generate damaged/flipped -p x --engine transformers
          eval damaged/header --text text.py --json
          chat missing
          chat ref
    """)
    )


Change = Callable[[Path], object]


def _bytes(file: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda path: (path / file).write_bytes(change((path / file).read_bytes()))


def _fields(file: str, **fields: Any) -> Change:
    return _bytes(file, lambda data: json.dumps(json.loads(data) | fields).encode())


def _flipped(data: bytes, place: int) -> bytes:
    spoiled = bytearray(data)
    spoiled[place] ^= 4
    return bytes(spoiled)


SHARD, MANIFEST = "model.safetensors", "waterfill.json"
DAMAGES: dict[str, Change] = {
    "cut": _bytes(SHARD, lambda data: data[:-1]),
    "short": _bytes(SHARD, lambda data: data[:1000]),
    "hollow": _bytes(SHARD, lambda data: b""),
    "flipped": _bytes(SHARD, lambda data: _flipped(data, -3)),
    "header": _bytes(SHARD, lambda data: _flipped(data, 100)),
    "length": _bytes(SHARD, lambda data: b"\xff" * 8 + data[8:]),
    "version": _fields(MANIFEST, version=2),
    "format": _fields(MANIFEST, format="other"),
    "digest": _fields(MANIFEST, digest="0" * 16),
    "shards": _fields(MANIFEST, shards={}),
    "torn": _bytes(MANIFEST, lambda data: data[:50]),
    "unlisted": lambda path: (path / MANIFEST).unlink(),
    "settings": _fields("generation_config.json", temperature=-1),
    "config": _bytes("config.json", lambda data: b"{}"),
    "code": lambda path: (path / "modeling_own.py").write_text("1 / 0\n"),
    "weights": lambda path: (path / "pytorch_model.bin").write_bytes(b"more"),
    "plan": _fields("waterfill-plan.json", version=9),
    "tokens": lambda path: (path / "tokenizer.json").unlink(),
}


def _tensor(**fields: Any) -> Callable[[Any], Any]:
    return lambda plan: plan | {"tensors": [plan["tensors"][0] | fields, *plan["tensors"][1:]]}


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "bytes": lambda plan: plan | {"size_bytes": plan["size_bytes"] + 1},
    "version": lambda plan: plan | {"version": 99},
    "fingerprint": lambda plan: plan | {"fingerprint": "0" * 32},
    "none": lambda plan: plan | {"tensors": []},
    "shards": lambda plan: plan | {"shard_bytes": -1},
    "budget": lambda plan: plan | {"budget": {}},
    "predicted": lambda plan: plan | {"predicted": None},
    "list": lambda plan: [plan],
    "codec": _tensor(codec="no-such-codec"),
    "rate": _tensor(codec="trellis-s64-r999"),
    "shape": _tensor(shape=[0, -1]),
    "name": _tensor(name="../elsewhere"),
    "twice": lambda plan: plan | {"tensors": plan["tensors"][:1] + plan["tensors"]},
}


def spoil(folder: Path) -> None:
    """Copies of an artifact, each damaged in one way, one with new settings; plans with a field changed."""
    for name, change in DAMAGES.items():
        change(Path(shutil.copytree(folder / "sized", folder / "damaged" / name)))
    _fields("generation_config.json", temperature=0.5)(Path(shutil.copytree(folder / "sized", folder / "sealed")))
    plan = json.loads((folder / "ref.json").read_text())
    (folder / "hostile").mkdir()
    for name, rewritten in HOSTILE.items():
        (folder / "hostile" / f"{name}.json").write_text(json.dumps(rewritten(plan)))
