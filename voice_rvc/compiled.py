"""Functions of librosa, whose inner loops numba compiles: by one process at a time, into a cache of the project's own.

numba keeps what it compiled in files that all processes share, and writes them without a lock. Two that compile one function
at once can leave the code for one type under the name of another; whoever loads that ends in a segmentation fault, from then on.
"""

import atexit
import os
import shutil
import tempfile
from operator import attrgetter
from pathlib import Path

from common.folders import one_at_a_time
from common.scan import user_cache


def from_librosa(name: str, *example, **settings):
    """The function `librosa.<name>`, compiled for arguments of the types of the example, if there is one.

    Some functions are compiled when their module is imported, others at their first call. A caller keeps what it gets: each
    call opens a file.
    """
    if "NUMBA_CACHE_DIR" not in os.environ:
        os.environ["NUMBA_CACHE_DIR"] = str(cache_folder())
    with one_at_a_time(Path(os.environ["NUMBA_CACHE_DIR"])):
        import librosa

        function = attrgetter(name)(librosa)  # imports the module that it stands in
        if example:
            function(*example, **settings)
    return function


def cache_folder() -> Path:
    """Where compiled functions are kept: the user's cache; where that cannot be written, a folder that goes with the process."""
    try:
        folder = user_cache() / "numba"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # a read-only or missing home
        folder = tempfile.mkdtemp(prefix="numba-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return Path(folder) / "cache"
