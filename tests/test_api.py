"""The Python functions are the steps."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import typing

import pytest

import loratool
from loratool import plugins


@pytest.mark.parametrize("name", plugins.names("steps"))
def test_signatures_follow_the_fields_of_the_steps(name: str) -> None:
    step = plugins.load("steps", name)
    parameters = inspect.signature(getattr(loratool, name)).parameters
    fields = {field.name: field for field in dataclasses.fields(step)}
    operands = [operand.name for operand in step.operands]
    assert list(parameters) == [*operands, *fields]
    for key, field in fields.items():
        assert parameters[key].default == field.default, key
        assert parameters[key].kind is inspect.Parameter.KEYWORD_ONLY


def test_every_step_has_a_function_and_help_for_every_option() -> None:
    for name in plugins.names("steps"):
        step = plugins.load("steps", name)
        assert callable(getattr(loratool, name))
        assert dataclasses.is_dataclass(step) and step.__dataclass_params__.frozen
        hints = typing.get_type_hints(step)
        assert all(
            field.metadata["help"] and hints[field.name] for field in dataclasses.fields(step)
        )


def test_importing_loratool_and_its_steps_imports_nothing_heavy() -> None:
    code = (
        "import sys, loratool; from loratool import plugins;"
        "[plugins.load('steps', n) for n in plugins.names('steps')];"
        "heavy = {'torch', 'transformers', 'numpy', 'onnx', 'onnxruntime'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = loratool.unknown


def test_extract_does_not_import_transformers(tmp_path) -> None:
    from fixtures.weights import RXNFP_BASE, RXNFP_TUNED, fetch

    fetch()
    code = (
        "import sys, loratool;"
        f"loratool.extract({str(RXNFP_BASE)!r}, {str(RXNFP_TUNED)!r}, rank=2)"
        f".save({str(tmp_path / 'adapter')!r});"
        "print('torch' in sys.modules, 'transformers' in sys.modules, 'onnx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]
