"""The definition of frame_mass (docs/method.md eq. 2): dense, in the dtype of its inputs, under plain autograd."""

from torch import Tensor

from appo_kernels.attention.reference import attention_matrix, mass_of, visible_keys


def frame_mass(
    query: Tensor,
    key: Tensor,
    frame_ids: Tensor,
    *,
    num_frames: int,
    lse: Tensor | None = None,
    first_key: Tensor | None = None,
    last_key: Tensor | None = None,
    prefix_keys: Tensor | None = None,
    scale: float | None = None,
    reduction: str = "sum",
    per_head: bool = False,
) -> Tensor:
    """See ``appo_kernels.frame_mass``. ``lse`` is what the softmax here works out for itself; it is not read."""
    seen = visible_keys(query, key.shape[2], first_key, last_key, prefix_keys)
    probabilities, _ = attention_matrix(query, key, seen, scale)
    mass = mass_of(probabilities, frame_ids, num_frames, reduction)
    return mass if per_head else mass.mean(1)
