import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from ofutils import UserError, params

ROOT = Path(__file__).parents[2]


def namespace(injected="", **values):
    declared = {"scale": str, "steps": int, "seeds": int, "tolerance": float}
    usual = {"scale": "auto", "steps": 0, "seeds": 0, "tolerance": 0.1}
    cells = ["", "scale: str = 'auto'", injected] if injected else ["", "scale: str = 'auto'"]
    return {"__annotations__": declared, "In": cells, **usual, **values}


def test_an_unknown_injected_parameter_is_named_with_a_suggestion():
    with pytest.raises(UserError, match=r"unknown parameter 'stpes' \(did you mean 'steps'\?\); known: scale, steps"):
        params.start(namespace("# Parameters\nstpes = 5\n", stpes=5), "test", "hours")


def test_a_model_that_was_asked_for_has_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("OFUTILS_OUT", str(tmp_path))
    figures = tmp_path / "figures" / "test"
    assert params.start(namespace(), "test", "hours").folder == figures
    assert params.start(namespace(model=""), "test", "hours").folder == figures
    assert params.start(namespace(model="a/b"), "test", "hours").folder == figures / "a--b"


def test_variables_of_later_cells_do_not_matter_when_the_cell_runs_again(capsys):
    params.start(namespace("# Parameters\nsteps = 5\n", steps=5, results=[1], figure=None), "test", "hours")
    assert "scale tiny (OFUTILS_SCALE)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "abc"}, "parameter steps: expected int, got 'abc'"),
        ({"steps": 1.5}, "parameter steps: expected int, got 1.5"),
        ({"steps": True}, "parameter steps: expected int, got True"),
        ({"tolerance": float("nan")}, "parameter tolerance: expected float, got nan"),
        ({"steps": None}, "parameter steps: expected int, got None"),
        ({"seeds": -1}, "seeds must be at least 0, got -1"),
        (
            {"scale": "smal"},
            "unknown scale .asked for. 'smal' .did you mean 'small'.*; known: auto, tiny, small, gpu, paper",
        ),
        ({"scale": 3}, "parameter scale: expected str, got 3"),
    ],
)
def test_wrong_values_are_one_clear_line(values, message):
    with pytest.raises(UserError, match=message):
        params.start(namespace(**values), "test", "hours")


def test_integral_floats_pass_for_integers_and_integers_for_floats():
    found = namespace(steps=1000.0, tolerance=1)
    params.start(found, "test", "hours")
    assert found["steps"] == 1000 and type(found["steps"]) is int and type(found["tolerance"]) is float


def test_a_named_scale_wins_over_the_environment_and_that_over_auto(monkeypatch):
    monkeypatch.setenv("OFUTILS_SCALE", "tiny")
    assert params.resolve_scale("paper")[0] == "paper"
    assert params.resolve_scale("auto")[0] == "tiny"
    monkeypatch.delenv("OFUTILS_SCALE")
    monkeypatch.setattr(params.torch.cuda, "is_available", lambda: False)
    assert params.resolve_scale()[0] == "small"
    monkeypatch.setattr(params.torch.cuda, "is_available", lambda: True)
    assert params.resolve_scale()[0] == "gpu"
    monkeypatch.setenv("OFUTILS_SCALE", "huge")
    with pytest.raises(UserError, match="unknown scale .OFUTILS_SCALE. 'huge'"):
        params.resolve_scale()


def test_output_goes_where_the_environment_says_and_never_depends_on_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("OFUTILS_OUT", str(tmp_path))
    assert params.out() == tmp_path.resolve()
    monkeypatch.delenv("OFUTILS_OUT")
    monkeypatch.chdir(tmp_path)
    assert params.out() == params.root() == ROOT


def test_a_command_line_error_is_one_line_and_exit_code_one():
    done = subprocess.run(
        [sys.executable, "-m", "ofutils.sweep", "03_qaunt"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: unknown recipe '03_qaunt' (did you mean '03_quant'?); known: ")


# ------------------------------------------------------------------------------------ set-up files


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        name.lower().replace("_", "-"): pin
        for name, pin in (re.match(r"([\w.-]+)==([^ ;]+)", line).groups() for line in lines)
    }


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_says_nothing_that_pyproject_does_not():
    found = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(found) == {"name", "channels", "dependencies"}
    *conda, pip = found["dependencies"]
    assert [re.split("[=<>]", entry)[0] for entry in conda] == ["python", "pip"]
    assert pip == {"pip": ["-e .", "-c constraints.txt"]}
    assert Requirement(f"python{project()['requires-python']}").specifier.contains(conda[0].split("=")[1])


def test_every_dependency_is_pinned_within_its_range_and_installed_as_pinned():
    extras = [entry for group in project()["optional-dependencies"].values() for entry in group]
    for entry in [*project()["dependencies"], *extras]:
        requirement = Requirement(entry)
        pin = pins()[requirement.name.lower()]
        assert requirement.specifier.contains(pin), entry
        try:
            assert version(requirement.name).split("+")[0] == pin, entry
        except PackageNotFoundError:
            assert entry in extras, f"{entry} is not installed"


def test_settings_keep_the_checks_of_the_settings_that_they_extend():
    @params.settings
    class First:
        x: int = 0

        def __post_init__(self):
            params.require(self.x != 3, "x must not be 3")

    @params.settings
    class Second(First):
        y: params.Count = 1

    with pytest.raises(UserError, match="x must not be 3"):
        Second(x=3)
    with pytest.raises(UserError, match="y must be at least 1"):
        Second(y=0)
