"""Named corpora: text that every machine has, so that a first run needs no download.

A corpus is a function that yields ``(name, content)`` for each of its documents, in an order that never changes; the
content is a path to a UTF-8 text file or the text itself. Adding one = one function and one line in ``CORPORA``.
"""

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

_NO_LIBRARY_TEXT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def python_docs() -> Iterator[tuple[str, Path | str]]:
    """The running Python's help topics, then the sources of its standard library without its tests: about 12 MB.

    ``pydoc_data`` is left out of the sources, since it is the text of the topics once more.
    """
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"topics/{topic}", topics[topic]
    library = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = sorted(set(subfolders) - _NO_LIBRARY_TEXT - {"pydoc_data"})
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                yield f"library/{path.relative_to(library).as_posix()}", path


CORPORA: dict[str, Callable[[], Iterator[tuple[str, Path | str]]]] = {
    "python-docs": python_docs,
}
