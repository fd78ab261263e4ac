"""Functions of librosa, whose inner loops numba compiles: by one process at a time, into a cache of the project's own.

numba keeps what it compiled in files that all processes share, and writes them without a lock. Two that compile one function
at once can leave the code for one type under the name of another; whoever loads that ends in a segmentation fault, from then on.
"""

import os
from operator import attrgetter
from pathlib import Path

from common.folders import one_at_a_time
from common.scan import user_cache


def from_librosa(name: str, *example, **settings):
    """The function `librosa.<name>`, compiled for arguments of the types of the example, if there is one.

    Some functions are compiled when their module is imported, others at their first call. A caller keeps what it gets: each
    call opens a file.
    """
    cache = Path(os.environ.setdefault("NUMBA_CACHE_DIR", str(user_cache() / "numba")))
    with one_at_a_time(cache):
        import librosa

        function = attrgetter(name)(librosa)  # imports the module that it stands in
        if example:
            function(*example, **settings)
    return function
