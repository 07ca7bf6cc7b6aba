"""Additions to a vLLM worker: loading weights of a folder, and the sum of what it was given.

vLLM's processes import it by its file name, beside `vllm_worker.py`, in an environment without this project.
"""

from collections import Counter
from typing import Any

# Bit patterns are summed in pieces, so that no copy of a whole weight is made.
CHECKSUM_PIECE = 1 << 22


class Checksum:
    """Sum of the fp32 bit patterns of weights modulo 2^63, and their number.

    It does not depend on how weights are named, split and joined. The trainer computes the same of what it sends.
    """

    def __init__(self) -> None:
        self.total, self.count = 0, 0

    def add(self, tensor: Any) -> None:
        import torch

        for piece in tensor.detach().reshape(-1).split(CHECKSUM_PIECE):
            bits = piece.float().contiguous().view(torch.int32).long().sum()
            self.total = (self.total + int(bits)) % (1 << 63)
            self.count += piece.numel()


def shapes_of(files: Any) -> Counter[tuple[int, ...]]:
    """The number of weights of each shape in some files of safetensors."""
    from safetensors import safe_open

    found: Counter[tuple[int, ...]] = Counter()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found.update(tuple(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return found


class WorkerExtension:
    """Methods of every vLLM worker, reached by ``collective_rpc``."""

    appo_loaded: tuple[int, int] | None = None
    _appo_sums: Checksum
    _appo_shapes: Counter[tuple[int, ...]] | None = None

    def appo_load(self, folder: str) -> tuple[int, int]:
        """Load the weights of a folder of safetensors in place; the checksum of what the model was handed.

        Weights of a loaded model are no longer those of a file: they are joined, and on a CPU packed. What can be
        compared with the trainer's is what arrives, and that it is as much as the model's own folder holds.
        """
        from pathlib import Path

        from safetensors import safe_open

        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no .safetensors in {folder}: is it a folder that this server can read?")
        sums = Checksum()

        def weights() -> Any:
            for file in files:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  (not a mapping)
                        tensor = opened.get_tensor(name)
                        sums.add(tensor)
                        yield name, tensor

        self.appo_check(folder, files)
        self.model_runner.reload_weights(weights_iterator=weights())  # type: ignore[attr-defined]
        self.appo_loaded = (sums.total, sums.count)
        return self.appo_loaded

    def appo_check(self, folder: str, files: list[Any]) -> None:
        """Raise ValueError for weights of other shapes than those the server was started on, before any is loaded:
        vLLM stops half way otherwise, and takes no others afterwards."""
        from pathlib import Path

        if self._appo_shapes is None:
            # Empty where the server was started on no local folder. Names differ between versions of transformers.
            own = Path(self.model_runner.model_config.model).glob("*.safetensors")  # type: ignore[attr-defined]
            self._appo_shapes = shapes_of(own)
        found = shapes_of(files)
        if self._appo_shapes and found != self._appo_shapes:
            missing, other = self._appo_shapes - found, found - self._appo_shapes
            raise ValueError(
                f"{folder}: expected weights of the shapes of the server's model; {sum(missing.values())} of them "
                f"are missing, such as {next(iter(missing), None)}, and {sum(other.values())} are others, such as "
                f"{next(iter(other), None)}. Start the server on the model that is trained."
            )

    def appo_read(self, folder: str) -> tuple[int, int]:
        """The checksum of adapters that vLLM is going to load."""
        from pathlib import Path

        from safetensors import safe_open

        sums = Checksum()
        with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                sums.add(opened.get_tensor(name))
        self.appo_loaded = (sums.total, sums.count)
        return self.appo_loaded

    def appo_watch(self) -> None:
        """Sum up whatever the model is given to load, until ``appo_watched``: weights that come without a file."""
        model, sums = self.model_runner.model, Checksum()  # type: ignore[attr-defined]
        load = model.load_weights

        def watched(weights: Any) -> Any:
            def seen() -> Any:
                for name, tensor in weights:
                    sums.add(tensor)
                    yield name, tensor

            return load(seen())

        model.load_weights, self._appo_sums = watched, sums

    def appo_watched(self) -> tuple[int, int]:
        del self.model_runner.model.load_weights  # type: ignore[attr-defined]
        self.appo_loaded = (self._appo_sums.total, self._appo_sums.count)
        return self.appo_loaded

    def appo_checksum(self) -> tuple[int, int] | None:
        return self.appo_loaded
