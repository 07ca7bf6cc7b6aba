"""The examples run as they are written, and the README shows what is in them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from appo.config import APPOConfig

ROOT = Path(__file__).parent.parent


def test_own_trainer_runs_as_written():
    done = subprocess.run(
        [sys.executable, ROOT / "examples/own_trainer.py"], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"frames \[\d.*\], loss -?\d\.\d+, mean weight 1\.\d+", done.stdout), done.stdout


def test_readme_shows_the_example_as_it_is():
    shown = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown and shown[1].strip() in (ROOT / "examples/own_trainer.py").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_load(path):
    config = APPOConfig.load(path)
    assert config.group_size == 8 and config.model.startswith("Qwen/")


def test_importing_the_packages_is_light():
    """The operators need torch and triton only, and naming appo loads nothing."""
    code = (
        "import sys, appo; assert 'torch' not in sys.modules\n"
        "import appo_kernels; assert 'transformers' not in sys.modules and 'appo.train.trainer' not in sys.modules\n"
        "assert not {'accelerate', 'numpy.testing', 'rich', 'omegaconf'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
