// Parameters of group_divergence_from_logits. G responses, N positions, V tokens, S = K J slots.
#pragma once
#include <stdint.h>

namespace appo {

struct DivergenceParams {
  const void* logits;    // (G, N, V), unit stride along V; before temperature
  const float* lse;      // (G, N) contiguous: natural log-sum-exp of logits / temperature
  const int64_t* slots;  // (S, G) position of each member's token, -1 for a missing member
  float* partial;        // (S, C): the sum over the tokens of each of C chunks of the vocabulary
  int64_t logits_stride_g, logits_stride_n;  // in elements
  int64_t responses;                         // G
  int64_t positions;                         // N
  int64_t vocabulary;                        // V
  int64_t slot_count;                        // S
  int64_t chunks;                            // C = ceil(V / kDivergenceChunk)
  float inverse_temperature;
  float log_uniform;  // -log V: what a missing member has in every place under k3
  int k3;             // 0: kl, 1: k3
  int element;        // Element of logits
};

// Tokens per block; a constant, so that a slot's sum does not depend on the others.
constexpr int kDivergenceChunk = 8192;

}  // namespace appo
