"""Lying artifacts with digests that are right, through every loader: a sample of `benchmarks.fuzz_artifacts`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.artifact_drafts import read, write
from tests.support.artifact_loaders import LOADERS, judge
from tests.support.artifact_mutations import Mutator
from tests.support.fuzz_samples import sample_artifacts

CASES = range(1000, 1006)

SAMPLE = """
import os, sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, transformers
from tests.support.artifact_loaders import judge
from tests.support.artifact_drafts import write
from tests.support.artifact_mutations import Mutator
torch.set_num_threads(1)
warnings.simplefilter("ignore")
transformers.utils.logging.disable_progress_bar()
folder, first, last = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
mutator = Mutator({path.name: path for path in folder.joinpath("samples").iterdir()}, 0)
for number in range(first, last):
    what, draft = mutator.case(number)
    print(number, what, flush=True)
    write(draft, folder / str(number))
    judge(folder / str(number))
print("done")
"""


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    made = sample_artifacts(folder / "made")
    (folder / "samples").mkdir()
    return {name: path.rename(folder / "samples" / name) for name, path in made.items()}


@pytest.mark.parametrize("name", ["mixed", "shards"])
def test_what_is_changed_was_sound_and_sealing_it_again_keeps_it_so(
    samples: dict[str, Path], tmp_path: Path, name: str
) -> None:
    write(read(samples[name]), tmp_path / "again")
    said = judge(tmp_path / "again")
    assert set(said) == set(LOADERS)
    assert {name for name, answer in said.items() if answer != "runs"} <= {
        "engine",
        "engine, streamed",
    }  # kept matrices


def test_cases_are_the_same_for_the_same_seed(samples: dict[str, Path]) -> None:
    one, other = Mutator(samples, 3), Mutator(samples, 3)
    assert [one.case(i)[0] for i in range(9)] == [other.case(i)[0] for i in (*range(8), 8)]
    assert one.case(5)[1].files == other.case(5)[1].files


def test_every_loader_runs_or_refuses_a_lying_artifact(samples: dict[str, Path]) -> None:
    """In a process of its own, which a lie may end."""
    folder = next(iter(samples.values())).parent.parent
    arguments = [sys.executable, "-c", SAMPLE, Path(__file__).parents[2], folder, CASES.start, CASES.stop]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("done\n"), f"{done.stdout[-200:]}\n{done.returncode}\n{done.stderr[-2000:]}"
