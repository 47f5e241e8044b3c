"""One tiny run for all of the node's tests; making it costs a tokenizer and a data set."""

from __future__ import annotations

import numpy as np
import pytest

from model.data import Tokens, decode_tokens
from node.trainer import Trainer
from protocol.blobs import BlobStore
from protocol.ids import BlobId
from protocol.publication import SignedManifest
from tests.node.runs import tiny_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[SignedManifest, BlobStore]:
    """A signed manifest and the store with its blobs; tests only read them."""
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def heldout(run: tuple[SignedManifest, BlobStore]) -> Tokens:
    """The run's held-out tokens [T]."""
    signed, store = run
    data = store.read(BlobId(signed.manifest.data.heldout))
    return np.array(decode_tokens(data, signed.manifest.model.vocab_size))


@pytest.fixture
def trainer(run: tuple[SignedManifest, BlobStore], heldout: Tokens) -> Trainer:
    """A trainer in the run's initial state."""
    return Trainer(run[0].manifest, heldout=heldout)
