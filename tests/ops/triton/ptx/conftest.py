"""Kernels compiled for a GPU run in processes of their own, which `../test_ptx.py` starts.

Elsewhere Triton may be set to interpret them, and be in use for other devices. There those tests are left out.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "0" else ["test_compiled_*.py"]
