"""The optional packages that export needs, asked for by the extra that installs them."""

from __future__ import annotations

import importlib
from typing import Any

from coraq.errors import CoraqError

EXTRAS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}


def require(package: str) -> Any:
    """The imported package.

    Raises:
        CoraqError: it is not installed; the hint says how to get it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        extra = EXTRAS[package]
        raise CoraqError(
            f"this needs the package {package}, which cannot be imported ({error})",
            f"pip install 'coraq[{extra}]' (in a checkout: pip install -e '.[{extra}]')",
        ) from error
