"""Exported folders load in transformers with equal logits and equal token ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.errors import CheckpointError, DataError
from model.export import export_huggingface
from model.generate import generate
from model.tokenizer import Tokenizer, train_tokenizer
from model.transformer import Transformer
from tests.model.shapes import TEXTS, small_config, small_model

DATA = train_tokenizer(TEXTS, 400)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def exported(folder: Path, config: ModelConfig, *, scale: float = 1.0) -> Transformer:
    model = small_model(config)
    with torch.no_grad():  # larger than initial weights, so that attention is far from uniform
        for parameter in model.parameters():
            parameter.mul_(scale)
    export_huggingface(folder, config=config, weights=model.state_dict(), tokenizer=DATA)
    return model


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_logits_equal_transformers(tmp_path: Path, tie: bool, num_kv_heads: int) -> None:
    from transformers import AutoModelForCausalLM

    model = exported(tmp_path, small_config(vocab_size=400, num_kv_heads=num_kv_heads, tie=tie), scale=5.0)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reference.dtype == torch.float32
    tokens = torch.randint(0, 400, (3, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(tokens), reference(tokens).logits
        loss = reference(tokens, labels=tokens).loss
        assert float(ours.abs().max()) > 0.1
        assert float((ours - theirs).abs().max()) < 1e-4
        assert float(model.loss(tokens)) == pytest.approx(float(loss), abs=1e-5)


def test_other_rope_base_and_epsilon_are_carried_over(tmp_path: Path) -> None:
    from dataclasses import replace

    from transformers import AutoModelForCausalLM

    config = replace(small_config(vocab_size=400), rope_theta=500.0, norm_eps=1e-3)
    model = exported(tmp_path, config, scale=5.0)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        assert float((model(tokens) - reference(tokens).logits).abs().max()) < 1e-4


def test_names_and_shapes_load_strictly(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    exported(tmp_path, small_config(vocab_size=400, tie=False))
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_tokenizer_encodes_equally(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    exported(tmp_path, small_config(vocab_size=400))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(DATA)
    assert theirs.eos_token_id == ours.eot_id
    for text in (TEXTS[0], "  naïve 漢字 🙂\t\n x = {}\n", "", " a <|endoftext|> b", "isn't , . !"):
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_greedy_generation_equals_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = exported(tmp_path, small_config(vocab_size=400), scale=5.0)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert theirs[0, 3:].tolist() == list(generate(model, [5, 6, 7], max_tokens=20, temperature=0))


def test_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the run's own tokenizer"):
        exported(tmp_path, small_config(vocab_size=500))


def test_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="name another folder"):
        exported(tmp_path / "file" / "below", small_config(vocab_size=400))
    assert os.listdir(tmp_path) == ["file"]
