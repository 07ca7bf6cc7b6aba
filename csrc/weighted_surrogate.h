// Parameters of the row-wise passes of logits_weighted_surrogate. M rows of V logits; row m is token m % T of
// sequence m / T.
#pragma once
#include <stdint.h>

namespace appo {

struct SurrogateParams {
  const void* logits;          // (B, T, V), unit stride along V
  void* gradient;              // (B, T, V), unit stride along V; may be `logits`
  const int64_t* targets;      // (M,) token id in [0, V) of every valid row
  const float* mask;           // (M,) 0 for rows that are not read, and whose gradient is 0
  float* logprobs;             // (M,) log-probability of the target
  float* entropy;              // (M,) in nats
  float* row_max;              // (M,) largest z, z = logits / temperature
  float* log_sum;              // (M,) log sum exp(z - row_max): together the row's lse, without its rounding
  const float* slope;          // (M,) d loss / d logprob
  const float* entropy_slope;  // (M,) d loss / d entropy
  int64_t logits_stride_b, logits_stride_t;      // in elements
  int64_t gradient_stride_b, gradient_stride_t;  // in elements
  int64_t rows;                                  // M
  int64_t tokens;                                // T
  int64_t vocabulary;                            // V
  float inverse_temperature;
  int element;  // Element of logits and gradient
};

}  // namespace appo
