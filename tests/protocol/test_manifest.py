"""The manifest: strict on the way in, one canonical form, every problem one printable line that names the field."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from protocol.errors import UserError
from protocol.manifest import Manifest, gamma_bound
from tests.protocol.samples import damaged, identity, manifest, manifest_fields

VALID = manifest()


def problem(text: str) -> str:
    """The one line that is shown for a bad TOML file."""
    with pytest.raises(UserError) as error:
        Manifest.from_toml(text)
    line = str(error.value)
    assert line.isprintable(), line
    return line


def toml(section: str, key: str, value: str) -> str:
    """The valid file with one value replaced."""
    lines = VALID.to_toml().splitlines()
    start = lines.index(f"[{section}]") if section else 0
    index = next(i for i in range(start, len(lines)) if lines[i].startswith(f"{key} = "))
    lines[index] = f"{key} = {value}"
    return "\n".join(lines)


# ---- the two forms ---------------------------------------------------------------------------------------------------------


def test_toml_goes_round() -> None:
    assert Manifest.from_toml(VALID.to_toml()) == VALID


def test_canonical_form_goes_round() -> None:
    again = Manifest.from_canonical(VALID.canonical())
    assert again == VALID
    assert again.canonical() == VALID.canonical()
    assert again.run_id == VALID.run_id == hashlib.sha256(VALID.canonical()).hexdigest()


def test_defaults_are_written_out() -> None:
    """A later version with other defaults must still see this run as it was meant."""
    canonical = json.loads(VALID.canonical())
    assert canonical["sync"]["gamma"] == 0.7
    assert set(canonical) == set(Manifest.model_fields)


def test_key_order_and_comments_do_not_change_the_run() -> None:
    text = VALID.to_toml()
    without_comments = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert Manifest.from_toml(without_comments).run_id == VALID.run_id
    assert Manifest.from_toml(text.replace("\n", "\r\n")).run_id == VALID.run_id


def test_every_value_changes_the_run() -> None:
    assert manifest(name="b-test").run_id != VALID.run_id
    assert manifest(initial_state={"sha256": "33" * 32, "seed": 1}).run_id != VALID.run_id


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    lr=st.floats(1e-9, 1.0),
    alpha=st.floats(0.0, 0.99),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63 - 1),
    name=st.from_regex(r"[a-z0-9_-]{1,64}", fullmatch=True),
)
def test_any_valid_manifest_goes_round_both_ways(lr: float, alpha: float, share: float, seed: int, name: str) -> None:
    original = manifest(
        name=name,
        inner={"lr": lr, "sequence_tokens": 64},
        sync={"alpha": alpha, "gamma": share * gamma_bound(alpha)},
        initial_state={"seed": seed, "sha256": "44" * 32},
    )
    assert Manifest.from_toml(original.to_toml()) == original
    assert Manifest.from_canonical(original.canonical()) == original


def test_data_that_stays_local_has_no_index() -> None:
    local = {"kind": "local", "heldout": "22" * 32, "heldout_tokens": 4096, "train_tokens": 0}
    original = manifest(data=local)
    assert Manifest.from_toml(original.to_toml()) == original


def test_every_field_is_documented() -> None:
    def walk(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                assert field.annotation.__doc__
                walk(field.annotation)
            else:
                assert field.description, f"{model.__name__}.{name}"

    walk(Manifest)


# ---- bad files -------------------------------------------------------------------------------------------------------------


def test_not_toml() -> None:
    assert "not valid TOML" in problem("name = ")
    assert "not valid TOML" in problem("\0")


def test_an_empty_file_names_a_missing_field() -> None:
    assert "name" in problem("")


@pytest.mark.parametrize("line", ["name = 'b-test'", "[model]\nnum_layers = 3", "model.num_layers = 3"])
def test_a_duplicate_key(line: str) -> None:
    text = VALID.to_toml()
    assert "not valid TOML" in problem(f"{line}\n{text}" if "[" not in line else f"{text}\n{line}")


@pytest.mark.parametrize(("section", "key"), [("", "naem"), ("model", "num_layer"), ("sync", "gama")])
def test_an_unknown_key(section: str, key: str) -> None:
    text = VALID.to_toml()
    text = text.replace(f"[{section}]\n", f"[{section}]\n{key} = 1\n") if section else f"{key} = 1\n{text}"
    line = problem(text)
    assert "unknown key" in line
    assert f"{section}.{key}".lstrip(".") in line


def test_an_unknown_key_s_own_characters_are_harmless() -> None:
    problem('"\\u001b[2J\\n\\u202e" = 1\n' + VALID.to_toml())
    assert len(problem("a" * 10_000 + " = 1\n" + VALID.to_toml())) < 400


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "name", '"Capital"'),
        ("", "name", '"../../etc/passwd"'),
        ("", "name", '""'),
        ("", "name", '"a\\n"'),
        ("", "name", "1"),
        ("", "format", "2"),
        ("", "organiser", '"somebody"'),
        ("model", "num_layers", '"2"'),
        ("model", "num_layers", "2.0"),
        ("model", "num_layers", "true"),
        ("model", "num_layers", "0"),
        ("model", "num_layers", "-1"),
        ("model", "num_layers", "1000000000000"),
        ("model", "tie_embeddings", "1"),
        ("model", "rope_theta", "nan"),
        ("model", "norm_eps", "inf"),
        ("tokenizer", "blob", '"../../../etc/passwd"'),
        ("tokenizer", "blob", f'"{"G" * 64}"'),
        ("data", "kind", '"pickle"'),
        ("inner", "lr", "nan"),
        ("inner", "lr", "-0.1"),
        ("inner", "optimizer", '"sgd"'),
        ("inner", "beta1", "1.0"),
        ("sync", "algorithm", '"magic"'),
        ("sync", "inner_steps", "0"),
        ("sync", "exchange_timeout_s", "inf"),
        ("sync", "alpha", "1.0"),
        ("sync", "gamma", "nan"),
        ("pipeline", "stages", "0"),
        ("pipeline", "stages", "65"),
        ("pipeline", "skip_ratio", "0.6"),
        ("pipeline", "codec", '"q4"'),
        ("initial_state", "seed", "-1"),
        ("initial_state", "sha256", '"33"'),
    ],
)
def test_a_bad_value_is_named(section: str, key: str, value: str) -> None:
    assert f"{section}.{key}".lstrip(".") in problem(toml(section, key, value))


@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        ("model", "num_heads", "5", "not divisible by num_heads"),
        ("model", "num_heads", "64", "must be even"),
        ("model", "num_kv_heads", "3", "not divisible by num_kv_heads"),
        ("model", "max_sequence_tokens", "32", "must not exceed model.max_sequence_tokens"),
        ("data", "heldout_tokens", "64", "must exceed inner.sequence_tokens"),
        ("data", "kind", '"local"', "left out for kind local"),
        ("inner", "min_sequences", "65", "must not exceed inner.max_sequences"),
        ("sync", "decay_rounds", "1", "must not exceed sync.total_rounds"),
    ],
)
def test_an_impossible_shape(section: str, key: str, value: str, reason: str) -> None:
    assert reason in problem(toml(section, key, value))


@pytest.mark.parametrize(("alpha", "bound"), [(0.0, 2.0), (0.5, 1.5), (0.3, 1.82), (0.9, 0.38)])
def test_the_gamma_bound(alpha: float, bound: float) -> None:
    assert gamma_bound(alpha) == pytest.approx(bound)
    below = manifest(sync={"alpha": alpha, "gamma": bound - 0.01})
    assert below.sync.gamma < bound
    for gamma in (bound + 0.001, 0.0):
        text = below.to_toml().replace(f"gamma = {below.sync.gamma}", f"gamma = {gamma}")
        line = problem(text)
        assert "2(1 − α²)" in line
        assert "lower gamma or alpha" in line
    # diloco's γ only mends what lost messages pulled apart, without momentum, so 2 is its bound at any α; pair-average has no γ.
    assert "below 2" in problem(
        below.to_toml().replace('"noloco"', '"diloco"').replace(f"gamma = {bound - 0.01}", "gamma = 2.0")
    )
    assert manifest(sync={"alpha": alpha, "gamma": 2.0, "algorithm": "pair-average"}).sync.gamma == 2.0


def test_the_number_of_parameters_is_the_sum_of_the_shapes() -> None:
    embeddings, norms = 512 * 64, 5 * 64
    attention = 2 * (64 * 64 + 64 * 64 + 2 * 64 * 32)
    feed_forward = 2 * 3 * 64 * 128
    assert VALID.model.num_parameters == embeddings + norms + attention + feed_forward
    untied = VALID.model.model_copy(update={"tie_embeddings": False})
    assert untied.num_parameters == VALID.model.num_parameters + embeddings


# ---- bytes from a peer -----------------------------------------------------------------------------------------------------


def canonical_with(**changes: Any) -> bytes:
    fields = json.loads(VALID.canonical()) | changes
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"1" * 60_000,
        b" " + VALID.canonical(),
        VALID.canonical() + b"\n",
        VALID.canonical().replace(b'"seed":0', b'"seed":0,"seed":0'),  # a duplicate key
        VALID.canonical().replace(b'"seed":0', b'"seed":1,"seed":0'),
        VALID.canonical().replace(b'"seed":0', b'"seed":-0'),
        VALID.canonical().replace(b'"name":"a-test"', b'"name":"\\u0061-test"'),
        VALID.canonical().replace(b"0.001", b"1e-3"),
        VALID.canonical().replace(b"0.001", b"NaN"),
        VALID.canonical().replace(b"0.001", b"1e999"),
        VALID.canonical().replace(b"1000000", b"1" + b"0" * 5000),
        VALID.canonical().replace(b"1000000", b"1" + b"0" * 4000),
        canonical_with(extra=1),
        canonical_with(name="A"),
        canonical_with(pipeline={}),  # a default left out
    ],
)
def test_only_the_exact_canonical_bytes_are_taken(data: bytes) -> None:
    with pytest.raises(UserError) as error:
        Manifest.from_canonical(data)
    assert "\n" not in str(error.value)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=damaged(VALID.canonical()))
def test_damaged_canonical_bytes_are_another_manifest_or_a_user_error(data: bytes) -> None:
    try:
        read = Manifest.from_canonical(data)
    except UserError:
        return
    assert read.canonical() == data


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=damaged(VALID.to_toml().encode()))
def test_a_damaged_file_is_another_manifest_or_a_user_error(data: bytes) -> None:
    try:
        read = Manifest.from_toml(data.decode(errors="replace"))
    except UserError as error:
        line = str(error)
    else:
        line = ""
        assert Manifest.from_canonical(read.canonical()) == read
    assert line.isprintable()


@pytest.mark.parametrize("text", ["a = " + "[" * 10_000, "a = " + "9" * 10_000, "a = 0x" + "9" * 10_000])
def test_a_file_that_python_s_own_parser_chokes_on(text: str) -> None:
    problem(text)


@pytest.mark.parametrize(
    ("section", "key"), [("data", "train_tokens"), ("inner", "warmup_steps"), ("sync", "total_rounds")]
)
def test_no_integer_is_unbounded(section: str, key: str) -> None:
    """Hexadecimal gets round the parser's limit on digits, and such a number could not even be printed."""
    assert key in problem(toml(section, key, "0x" + "9" * 10_000))


def test_the_sample_s_organiser_is_a_real_identity() -> None:
    assert VALID.organiser_peer == identity(0).peer_id
    assert manifest_fields()["tokenizer"]["blob"] == VALID.tokenizer_blob
