// Which keys each row sees, as kernels are told.
#pragma once

namespace appo {

struct Visibility {
  const int* first_key;    // (B, R) contiguous; null: 0
  const int* last_key;     // (B, R) contiguous; null: S - 1
  const int* prefix_keys;  // (B, R) contiguous; null: 0
};

}  // namespace appo
