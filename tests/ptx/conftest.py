"""Compiled kernels are cached outside the user's cache, in a directory that survives between runs of the tests."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "appo-triton-cache"))
