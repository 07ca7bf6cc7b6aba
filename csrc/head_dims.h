// Head sizes that attention is built for, and those whose backward is: each is an instance of every kernel.
#pragma once

// X(D, ...) for each.
#define APPO_HEAD_DIMS(X, ...) \
  X(64, __VA_ARGS__) X(80, __VA_ARGS__) X(96, __VA_ARGS__) X(128, __VA_ARGS__) X(256, __VA_ARGS__)
#define APPO_GRAD_HEAD_DIMS(X, ...) X(64, __VA_ARGS__) X(128, __VA_ARGS__)
