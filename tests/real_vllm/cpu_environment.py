"""Run by the interpreter of vLLM's CPU environment: lets its torchvision be imported beside a torch without CUDA.

The wheel of torchvision registers its operators from a library that links CUDA, which a CPU build of torch cannot load;
its import then fails at two operators that nothing here calls. They are declared before, in every process of that
environment. Nothing of the kind is needed where torch and torchvision match.
"""

import sysconfig
from pathlib import Path

DECLARE = """import torch

if not hasattr(torch.ops.torchvision, "nms"):
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _library.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

if __name__ == "__main__":
    packages = Path(sysconfig.get_paths()["purelib"])
    (packages / "torchvision_operators.py").write_text(DECLARE)
    (packages / "torchvision_operators.pth").write_text("import torchvision_operators\n")
