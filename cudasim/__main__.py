"""``export APPO_EMULATION_LIBRARY=$(python -m cudasim)``: backend "cuda" then serves CPU tensors."""

from cudasim.library import build

if __name__ == "__main__":
    print(build())
