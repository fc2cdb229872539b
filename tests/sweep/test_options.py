"""What can be swept over, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.sweep import SweepOptions
from mixt_export.sweep.options import Variant, compress_arguments, parse_counts, variant_of


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0:16:2", [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        ("1:4", [0, 1, 2, 3, 4]),
        ("0,1,2,4,8", [0, 1, 2, 4, 8]),
        (" 8 , 1 , 8 ,2:7:5", [0, 1, 2, 7, 8]),
        (None, [0, 1, 2, 4, 8, 16, 30]),
    ],
)
def test_counts(text: str | None, wanted: list[int]) -> None:
    assert parse_counts(text, 30) == wanted


def test_default_counts_of_other_depths() -> None:
    assert parse_counts(None, 1) == [0, 1]
    assert parse_counts(None, 16) == [0, 1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("31", "the model has 30 blocks"),
        ("0:40:2", "the model has 30 blocks"),
        ("4:2", "never ends"),
        ("0:8:0", "never ends"),
        ("1,,2", "'' is not understood"),
        ("-1", "'-1' is not understood"),
        ("last:4", "'last:4' is not understood"),
        ("0", "replaces no block"),
    ],
)
def test_counts_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_counts(text, 30)
    assert "--blocks" in str(caught.value)


def test_variants() -> None:
    assert SweepOptions(n_tensors=(4, 3, 4)).variants() == [Variant("n_tensors", 4), Variant("n_tensors", 3)]
    assert [variant.label for variant in SweepOptions().variants()] == ["N_T = 4"]
    assert [variant.label for variant in SweepOptions(method="svd", keep=(0.8, 0.5)).variants()] == [
        "keep 0.8",
        "keep 0.5",
    ]
    assert variant_of(Variant("keep", 0.8).to_dict()) == Variant("keep", 0.8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SweepOptions(keep=(0.5,)), "--keep does not apply to method mixt"),
        (SweepOptions(method="svd", n_tensors=(4,)), "--n-tensors does not apply to method svd"),
    ],
)
def test_values_of_another_method(options: SweepOptions, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        options.variants()


def test_unknown_method() -> None:
    with pytest.raises(UnsupportedError, match="'magic' is unknown"):
        SweepOptions(method="magic").variants()


def test_a_method_without_a_size_to_vary() -> None:
    with pytest.raises(UnsupportedError, match=r"--method laser has none of the sizes .*--n-tensors, --keep"):
        SweepOptions(method="laser").variants()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"windows": 0}, "--windows 0"),
        ({"window": 1}, "--window 1"),
        ({"limit": 0}, "--limit 0"),
        ({"refine_steps": -1}, "--refine-steps -1"),
        ({"recover_steps": -2}, "--recover-steps -2"),
    ],
)
def test_numbers_that_make_no_sense(values: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SweepOptions(**values)


def test_arguments_of_compress() -> None:
    mixt = compress_arguments(SweepOptions(refine_steps=3, calib_windows=5), Variant("n_tensors", 3), 7)
    assert mixt["blocks"] == "last:7"
    assert (mixt["n_tensors"], mixt["refine_steps"], mixt["controls"]) == (3, 3, False)
    assert mixt["settings"].windows == 5
    svd = compress_arguments(SweepOptions(method="svd"), Variant("keep", 0.5), 2)
    assert svd == {"method": "svd", "blocks": "last:2", "keep": 0.5, "calib": (), "seed": 0, "refine_steps": 0}


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['numpy'] = None\n"
        "from mixt_export.cli.main import load_verb\n"
        "load_verb('sweep').main(['--help'], standalone_mode=False)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "--n-tensors" in shown
