"""A file system of fsspec whose files are this machine's, and which writes down what it is asked for.

What it does wrong is said by environment variables, so that other processes see it too.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem


class Counted(LocalFileSystem):
    """counted:///a/path"""

    protocol = "counted"
    LOG = "COUNTED_LOG"  # a file: one line for each transfer, `get PATH` or `put PATH`
    FAILS = "COUNTED_FAILS"  # the name of a file that cannot be transferred
    SHORT = "COUNTED_SHORT"  # the name of a file of which the first 100 bytes arrive
    SLOW = "COUNTED_SLOW"  # seconds that each transfer takes

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("counted://"))

    def _transfer(self, kind: str, path: str) -> None:
        time.sleep(float(os.environ.get(self.SLOW, "0")))
        if Path(path).name == os.environ.get(self.FAILS):
            raise OSError("the line is down")
        with Path(os.environ[self.LOG]).open("a") as log:
            log.write(f"{kind} {path}\n")

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        self._transfer("get", rpath)
        super().get_file(rpath, lpath, **options)
        if Path(rpath).name == os.environ.get(self.SHORT):
            os.truncate(lpath, 100)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self._transfer("put", rpath)
        super().put_file(lpath, rpath, **options)
