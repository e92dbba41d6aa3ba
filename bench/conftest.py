"""Peers as a fixture: ``pytest bench/ --benchmark-only`` runs every case in every installed library.

One process for all: for honest ratios between libraries use ``python -m bench``.
"""

from __future__ import annotations

import importlib.util

import pytest

PEERS = {"fastbn": "numba", "torch": "torch", "onnxruntime": "onnxruntime"}


@pytest.fixture(params=list(PEERS))
def library(request: pytest.FixtureRequest) -> str:
    """Name a peer; skip what is not installed."""
    name: str = request.param
    if importlib.util.find_spec(PEERS[name]) is None:
        pytest.skip(f"{name} is not installed")
    return name
