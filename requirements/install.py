"""Install what a lock file pins into the environment of this interpreter, then the package itself from this checkout.

    python requirements/install.py requirements/lock.txt      exactly what was tested; pip compares every file's hash
    python requirements/install.py                            the newest of everything that pyproject.toml allows

On Linux the package index has torch with CUDA's libraries, some 3 GB. They are installed only if the torch that was
found asks for them: a CPU build is taken where pip finds one that `torch-cpu.txt` knows (PIP_EXTRA_INDEX_URL,
PIP_FIND_LINKS).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib.metadata import requires
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA = ("cuda-", "nvidia-", "triton")  # what torch brings on Linux, by the beginning of the name
PACKAGE = ["--editable", f"{HERE.parent}[dev]"]


def main(lock: Path | None) -> None:
    if lock is None:
        pip("--upgrade", *PACKAGE)
        return
    pins = read_pins(lock)
    torch = {name: pin for name, pin in pins.items() if name == "torch"}
    cuda = {name: pin for name, pin in pins.items() if name.startswith(CUDA)}
    install_torch(torch["torch"])
    install_pins({name: pin for name, pin in pins.items() if name not in torch.keys() | cuda.keys()})
    if wants_cuda():
        install_pins(cuda)
    pip("--no-deps", "--no-build-isolation", *PACKAGE)
    subprocess.run([sys.executable, "-m", "pip", "check"], check=True, stdout=subprocess.DEVNULL)


def read_pins(lock: Path) -> dict[str, str]:
    """The entries of a lock file by package: one or several requirements with their hashes."""
    pins: dict[str, str] = {}
    for entry in re.split(r"^(?=[a-zA-Z])", lock.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        name = entry.partition("==")[0]
        pins[name] = pins.get(name, "") + entry
    return pins


def install_torch(pin: str) -> None:
    """A known CPU build of the version that is pinned, else the package index's own build."""
    cpu = (HERE / "torch-cpu.txt").read_text("utf-8")
    version = pin.partition(" ")[0]
    if sys.platform == "linux" and f"{version}+cpu " in cpu and pip("--no-deps", "-r", HERE / "torch-cpu.txt", check=False):
        return
    install_pins({"torch": pin})


def wants_cuda() -> bool:
    """Whether the installed torch needs CUDA's libraries."""
    return any(requirement.startswith(CUDA) for requirement in requires("torch") or ())


def install_pins(pins: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "chosen.txt"
        chosen.write_text("".join(pins.values()), encoding="utf-8")
        pip("--no-deps", "--require-hashes", "-r", chosen)


def pip(*arguments: str | Path, check: bool = True) -> bool:
    """Whether `pip install` succeeded; where it had to, a failure ends the script with pip's own message."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, check=False, stderr=None if check else subprocess.DEVNULL)
    if check and done.returncode:
        sys.exit(done.returncode)
    return done.returncode == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
