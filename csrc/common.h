// Shared by every kernel: the vector-ISA clones and small helpers. No torch header here.
#pragma once
#include <cstddef>
#include <cstdint>

#define RECON3D_RESTRICT __restrict__

// One clone per x86-64 level, chosen when the library is loaded; other compilers get the plain loop.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define RECON3D_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define RECON3D_CLONES
#endif
