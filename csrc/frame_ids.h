// The frame of each key, as kernels are given it. T tiles of kFrameTile keys cover the S keys.
#pragma once

namespace appo {

constexpr int kFrameTile = 32;  // keys; every kernel's tile of keys is one or two of these

struct FrameIds {
  const int* ids;    // (B, T kFrameTile) contiguous: frame of each key, -1 for none and beyond the last key
  const int* range;  // (B, T, 2) contiguous: smallest and largest id of each tile
};

}  // namespace appo
